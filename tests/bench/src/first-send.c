/* A static program without a C library whose first act is to send: nothing that starts can be quicker to let a
 * packet out. Its exit status: 0, the datagram has left; 1, it was dropped (EPERM); 2, something else. */

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/syscall.h>

static long call(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
    long result;
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    register long x8 __asm__("x8") = number;
    __asm__ volatile("svc 0" : "+r"(x0)
                     : "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5), "r"(x8) : "memory");
    return x0;
#else
#error "how does this architecture make a system call?"
#endif
}

#define EPERM 1

void _start(void)
{
    /* 127.0.0.1, port 9 */
    struct sockaddr_in to = { .sin_family = AF_INET };
    to.sin_port = __builtin_bswap16(9);
    to.sin_addr.s_addr = __builtin_bswap32(0x7f000001);
    long s = call(SYS_socket, AF_INET, SOCK_DGRAM, 0, 0, 0, 0);
    long sent = call(SYS_sendto, s, (long)"x", 1, 0, (long)&to, sizeof to);
    call(SYS_exit_group, sent == 1 ? 0 : sent == -EPERM ? 1 : 2, 0, 0, 0, 0, 0);
    __builtin_unreachable();
}
