//! The relay and real servers of others': sshd, stunnel, dante.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a panic is a failed test"
)]

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use cgtproxy_tests::others::{SERVERS, server};
use cgtproxy_tests::proxies::{dante, tinyproxy};
use cgtproxy_tests::relayed::{Relayed, assert_from_the_internet, config};
use cgtproxy_tests::sandbox::{INTERNET_V4, INTERNET_V6, Outcome, Program, Sandbox, User, sandbox};
use cgtproxy_tests::wait::wait_until;
use cgtproxy_tests::wire::{Afterwards, Speech};

fn bed(sb: &Sandbox, uid: u32, upstream: &str, certificates: &str) -> Relayed {
    let builder = Relayed::builder(sb).uid(uid).certificates(certificates);
    builder.start(&config(&format!("upstream: '{upstream}'")))
}

/// sshd on the internet, where somebody with the sandbox's user's key may log in, and `ssh -D` of that user's own.
struct Ssh {
    _server: Program,
    client: Program,
}

impl Ssh {
    fn start(sb: &Sandbox, user: &User) -> Self {
        let uid = user.uid();
        let account = format!(
            "cp -L /etc/passwd /run/passwd; cp -L /etc/shadow /run/shadow
             grep -q ^sshd: /run/passwd || echo 'sshd:x:990:65534::/run/sshd:/usr/sbin/nologin' >> /run/passwd
             echo 'alice:x:{uid}:{uid}::/run/home/{uid}:/bin/sh' >> /run/passwd
             echo 'alice:*:1::::::' >> /run/shadow
             mount --bind /run/passwd /etc/passwd; mount --bind /run/shadow /etc/shadow
             mkdir -p -m 755 /run/sshd /run/ssh
             ssh-keygen -q -t ed25519 -N '' -f /run/ssh/host
             ssh-keygen -q -t ed25519 -N '' -f /run/ssh/key
             chown {uid} /run/ssh/key
             printf '%s\\n' 'ListenAddress 192.0.2.2:2222' 'HostKey /run/ssh/host' \
                 'AuthorizedKeysFile /run/ssh/key.pub' 'StrictModes no' 'UsePAM no' 'PidFile none' > /run/ssh/config"
        );
        sb.run(&["sh", "-euc", &account]);
        let arguments = ["-D", "-e", "-f", "/run/ssh/config"];
        let mut sshd = server("/usr/sbin/sshd", &arguments);
        // Since OpenSSH 9.8 it runs others, which it looks for where they would be installed.
        let parts = [
            ("SshdSessionPath", "sshd-session"),
            ("SshdAuthPath", "sshd-auth"),
        ];
        let parts = parts.map(|(key, name)| (key, format!("{SERVERS}/usr/lib/openssh/{name}")));
        let there = parts.iter().filter(|(_, path)| Path::new(path).exists());
        let options: Vec<_> = there.map(|(key, path)| format!("-o{key}={path}")).collect();
        sshd.extend(options.iter().map(String::as_str));
        let server = sb
            .internet_program(&sshd)
            .listening(SocketAddr::new(INTERNET_V4, 2222));
        Self {
            _server: server,
            client: Self::client(user),
        }
    }

    fn client(user: &User) -> Program {
        let cgroup = user.cgroup("app.slice/ssh.scope");
        let argv = [
            "ssh",
            "-F",
            "none",
            "-N",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-i",
            "/run/ssh/key",
            "-p",
            "2222",
            "-D",
            "127.0.0.1:1080",
            "alice@192.0.2.2",
        ];
        user.program(&cgroup, &argv)
            .listening(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1080))
    }
}

#[test]
fn ssh_is_a_proxy_and_nothing_goes_direct_without_it() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let mut ssh = Ssh::start(sb, &sb.user(1001));
        let bed = bed(sb, 1001, "socks5h://127.0.0.1:1080", "");
        let other = bed.user.cgroup("app.slice/app-b.scope").app();
        for to in sb.destinations() {
            assert_from_the_internet(&bed.tcp(to), to);
            assert_eq!(other.tcp(to), cgtproxy_tests::sandbox::direct(to));
        }
        bed.assert_ends_are_passed_on(sb);
        // Names are looked up where sshd is.
        let [to, _] = sb.destinations();
        fs::write("/run/hosts", format!("{} secret.example\n", to.ip())).expect("/run is ours");
        sb.run(&["mount", "--bind", "/run/hosts", "/etc/hosts"]);
        let server = format!("@{}", sb.fresh_v4());
        let dig = bed.user.cgroup("app.slice/app-a.scope/dig");
        let argv = ["dig", "+short", "+tries=1", &server, "secret.example"];
        let answer = bed.user.output(&dig, &argv);
        let fake = SocketAddr::new(answer.trim().parse().expect("an address"), to.port());
        assert_eq!(bed.tcp(fake), Outcome::Redirected { to });
        // ssh knows no UDP.
        for to in sb.destinations() {
            let outcome = bed.app.udp(to);
            assert_eq!(outcome, Outcome::Silent);
            sb.assert_nothing_left_for(to.ip());
        }
        wait_until("it to be known that there is no UDP", || {
            bed.agent("status").contains("it ended the connection")
        });
        let doctor = bed.agent("doctor");
        assert!(!doctor.contains("[upstream-down]"), "{doctor}");
        ssh.client.kill();
        for to in sb.destinations() {
            assert_eq!(bed.tcp(to), Outcome::Closed);
            sb.assert_nothing_left_for(to.ip());
        }
        ssh.client = Ssh::client(&bed.user);
        for to in sb.destinations() {
            assert_from_the_internet(&bed.tcp(to), to);
        }
    });
}

/// An HTTP proxy on the internet that grants everything, and then says and reads nothing. It is within TLS at port 8445.
fn stuck(sb: &Sandbox) -> Program {
    let speech = Speech {
        say: b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        then: Afterwards::Hold,
    };
    sb.speaker(SocketAddr::new(INTERNET_V4, 3129), &speech)
}

/// tinyproxy on the internet within TLS: at port 8443 with a certificate for its address, at 8444 for another.
fn stunnel(sb: &Sandbox) -> [Program; 2] {
    let certificates = "mkdir -p /run/tls; cd /run/tls
        authority() {
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj \"/CN=$1\" \\
                -addext keyUsage=critical,keyCertSign -keyout $1.key -out $1.pem
        }
        certificate() {
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=proxy \\
                -keyout $1.key -out $1.csr
            printf 'subjectAltName=IP:%s' $2 > $1.ext
            openssl x509 -req -in $1.csr -CA ours.pem -CAkey ours.key -CAcreateserial -days 2 \\
                -extfile $1.ext -out $1.crt
            cat $1.key $1.crt > $1.both
        }
        authority ours; authority theirs
        certificate right 192.0.2.2; certificate wrong 192.0.2.3
        chmod 644 *.pem
        printf '%s\\n' 'foreground = yes' 'pid =' \\
            '[right]' 'accept = 192.0.2.2:8443' 'connect = 192.0.2.2:3128' 'cert = /run/tls/right.both' \\
            '[wrong]' 'accept = 192.0.2.2:8444' 'connect = 192.0.2.2:3128' 'cert = /run/tls/wrong.both' \\
            '[stuck]' 'accept = 192.0.2.2:8445' 'connect = 192.0.2.2:3129' 'cert = /run/tls/right.both' \\
            '[ends]' 'accept = 192.0.2.2:8446' 'connect = 192.0.2.2:3130' 'cert = /run/tls/right.both' \\
            > stunnel.conf";
    sb.run(&["sh", "-euc", certificates]);
    let at = |port| SocketAddr::new(INTERNET_V4, port);
    let proxy = tinyproxy(sb, "BasicAuth me secret");
    let arguments = ["/run/tls/stunnel.conf"];
    let tls = sb
        .internet_program(&server("/usr/bin/stunnel4", &arguments))
        .listening(at(8443))
        .listening(at(8444));
    [proxy, tls]
}

#[test]
fn a_proxy_within_tls_must_prove_who_it_is() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _servers = stunnel(sb);
        let right = "https://me:secret@192.0.2.2:8443";
        let bed_of = |uid, upstream, authority: &str| {
            bed(sb, uid, upstream, &format!("/run/tls/{authority}.pem"))
        };
        let good = bed_of(1001, right, "ours");
        for to in sb.destinations() {
            // The first makes a connection, the others find one.
            for _ in 0..3 {
                assert_from_the_internet(&good.tcp(to), to);
            }
            assert_eq!(good.app.udp(to), Outcome::Forbidden);
        }
        let bad = [
            (bed_of(1002, right, "theirs"), "certificate"),
            (
                bed_of(1003, "https://me:secret@192.0.2.2:8444", "ours"),
                "certificate",
            ),
            (
                bed_of(1004, "https://me:wrong@192.0.2.2:8443", "ours"),
                "it refuses this user and password",
            ),
            (bed_of(1005, "https://me:secret@192.0.2.2:3128", "ours"), ""),
        ];
        for (bed, why) in bad {
            // Who waits for TLS from a server without waits for ten seconds.
            let [to, _] = sb.destinations();
            assert_eq!(bed.app.end_of_one(to), Outcome::Closed);
            sb.assert_nothing_left_for(to.ip());
            let doctor = bed.agent("doctor");
            assert!(doctor.contains("[upstream-down]"), "{doctor}");
            assert!(doctor.contains(why), "{doctor}");
        }
    });
}

#[test]
fn a_server_may_end_first_within_tls() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _servers = stunnel(sb);
        let _proxy = sb.http_proxy(SocketAddr::new(INTERNET_V4, 3130));
        let bed = bed(sb, 1001, "https://192.0.2.2:8446", "/run/tls/ours.pem");
        // Only that: where the application ends first, stunnel throws away what it has not read from a proxy that ends
        // afterwards ('Read socket closed (HUP)').
        bed.assert_servers_may_end_first(sb);
    });
}

#[test]
fn an_application_that_is_gone_is_not_waited_for_within_tls() {
    sandbox(|sb| {
        // How long the kernel remembers a silent connection of which one side has ended, and one that nobody has open.
        for (file, seconds) in [
            ("netfilter/nf_conntrack_tcp_timeout_close_wait", "4"),
            ("ipv4/tcp_fin_timeout", "1"),
        ] {
            fs::write(format!("/proc/sys/net/{file}"), seconds).expect("the network is ours");
        }
        let _helper = sb.helper().start();
        let _servers = stunnel(sb);
        let _stuck = stuck(sb);
        let bed = bed(sb, 1001, "https://192.0.2.2:8445", "/run/tls/ours.pem");
        let [to, _] = sb.destinations();
        let open = || bed.upstream()["connections"].as_u64();
        let connection = bed.app.open_tcp(to).expect("the relay is there");
        connection.say("hello");
        wait_until("bytes to have got there", || {
            sb.unread_connections(3129) > 0
        });
        assert_eq!(open(), Some(1));
        drop(connection);
        wait_until("it to be over", || open() == Some(0));
    });
}

#[test]
fn connections_within_tls_stay_within_the_bound() {
    /// What docs/how-it-works.md says, in KiB, without connections and for each.
    const BASE: u64 = 16 * 1024;
    const CONNECTION: u64 = 100;
    const CONNECTIONS: u32 = 100;
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _servers = stunnel(sb);
        let _stuck = stuck(sb);
        let bed = bed(sb, 1001, "https://192.0.2.2:8445", "/run/tls/ours.pem");
        let [to, _] = sb.destinations();
        let buffers =
            "for f in tcp_rmem tcp_wmem; do echo 4096 65536 131072 > /proc/sys/net/ipv4/$f; done";
        sb.run(&["sh", "-ec", buffers]);
        bed.app.hoard(to, CONNECTIONS);
        wait_until("bytes of each connection to have got there", || {
            sb.unread_connections(3129) >= CONNECTIONS as usize
        });
        let peak = bed.relay.peak_memory();
        let bound = BASE + u64::from(CONNECTIONS) * CONNECTION;
        assert!(peak < bound, "{peak} KiB, and {bound} are allowed");
    });
}

#[test]
fn ipv6_goes_to_a_server_and_beyond_it() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let _server = dante(sb, INTERNET_V6);
        let bed = bed(sb, 1001, "socks5://[2001:db8::2]:1080", "");
        let [_, to] = sb.destinations();
        assert_from_the_internet(&bed.tcp(to), to);
        let flow = bed.app.open_udp(to);
        for _ in 0..3 {
            assert_from_the_internet(&Outcome::in_the_end(|| flow.ask()), to);
        }
    });
}

/// A server of the test bed's own that hears what it is told, as a user's at an address of this machine.
fn curious(sb: &Sandbox, uid: u32, role: &[&str], at: SocketAddr) -> Program {
    let (role, options) = role.split_first().expect("a role");
    let at_text = at.to_string();
    let argv = [&[*role, &at_text], options].concat();
    sb.user(uid).server(&argv).listening(at)
}

/// One that takes everybody.
fn hearing(sb: &Sandbox, uid: u32, at: SocketAddr) -> Program {
    let hear = Speech {
        say: Vec::new(),
        then: Afterwards::Hear,
    };
    let hear = serde_json::to_string(&hear).expect("it has names for all it has");
    curious(sb, uid, &["speaker", &hear], at)
}

/// microsocks as a user's at an address of this machine, with more arguments.
fn socks_of(sb: &Sandbox, uid: u32, at: SocketAddr, arguments: &[&str]) -> Program {
    let user = sb.user(uid);
    let (host, port) = (at.ip().to_string(), at.port().to_string());
    let argv = ["microsocks", "-i", &host, "-p", &port];
    user.program(
        &user.cgroup("app.slice/socks.service"),
        &[&argv, arguments].concat(),
    )
    .listening(at)
}

#[test]
fn another_user_at_one_of_a_proxys_addresses_is_passed_over() {
    sandbox(|sb| {
        fs::write("/run/hosts", "::1 both\n127.0.0.1 both\n").expect("/run is ours");
        sb.run(&["mount", "--bind", "/run/hosts", "/etc/hosts"]);
        let _helper = sb.helper().start();
        let (v4, v6) = ("127.0.0.1:1080", "[::1]:1080");
        for (own, other) in [(v4, v6), (v6, v4)] {
            let bobs = hearing(sb, 1002, other.parse().expect("an address"));
            let _alices = socks_of(sb, 1001, own.parse().expect("an address"), &[]);
            let alice = bed(sb, 1001, "socks5://both:1080", "");
            for to in sb.destinations() {
                let outcome = alice.tcp(to);
                assert!(matches!(outcome, Outcome::Direct { .. }), "{outcome:?}");
            }
            assert_has_heard_nothing(&bobs);
        }
    });
}

/// Insists that nobody has told a server anything.
fn assert_has_heard_nothing(server: &Program) {
    let log = server.log();
    let words: Vec<_> = log
        .lines()
        .filter_map(|l| l.strip_prefix("heard "))
        .collect();
    assert!(words.iter().all(|word| word.starts_with("0 ")), "{log}");
}

#[test]
fn another_users_server_at_a_proxys_port_is_told_nothing() {
    sandbox(|sb| {
        sb.run(&["ip", "address", "add", "192.0.2.9/24", "dev", "uplink"]);
        let _helper = sb.helper().start();
        for (number, (host, listens)) in [
            ("127.0.0.1", "127.0.0.1"),
            ("localhost", "0.0.0.0"),
            ("[::1]", "[::1]"),
            ("[::1]", "[::]"),
            ("127.0.0.1", "[::]"),
            ("[::ffff:127.0.0.1]", "[::]"),
            // The machine's own: the kernel speaks with itself from the first one of a network.
            ("192.0.2.1", "0.0.0.0"),
            ("192.0.2.9", "0.0.0.0"),
            ("[2001:db8::1]", "[::]"),
        ]
        .into_iter()
        .enumerate()
        {
            let uid = 1010 + u32::try_from(number).expect("a few");
            let at = format!("{listens}:1080").parse().expect("an address");
            let bobs = hearing(sb, 1002, at);
            let upstream = format!("socks5://me:secret@{host}:1080");
            let alice = bed(sb, uid, &upstream, "");
            for to in sb.destinations() {
                assert_eq!(alice.tcp(to), Outcome::Closed, "{host} {listens}");
                sb.assert_nothing_left_for(to.ip());
            }
            let who = "is another user's (uid 1002)";
            let status = alice.agent("status");
            assert!(status.contains(who), "{status}");
            let log = alice.relay.log();
            assert_eq!(log.matches(who).count(), 1, "{log}");
            if ["127.0.0.1", "localhost", "[::1]"].contains(&host) {
                let doctor = alice.agent("doctor");
                assert!(doctor.contains("[upstream-of-another]"), "{doctor}");
            }
            assert_has_heard_nothing(&bobs);
            drop(bobs);
            // Whose it is to be.
            let socks = socks_of(sb, uid, at, &["-u", "me", "-P", "secret"]);
            for to in sb.destinations() {
                let outcome = alice.tcp(to);
                assert!(matches!(outcome, Outcome::Direct { .. }), "{outcome:?}");
            }
            drop(socks);
        }
    });
}

#[test]
fn a_server_of_the_systems_or_of_an_allowed_user_may_be_the_proxy() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let at: SocketAddr = (Ipv4Addr::LOCALHOST, 1080).into();
        let upstream = "upstream: 'socks5://127.0.0.1:1080'";
        let strict = Relayed::builder(sb).uid(1001).start(&config(upstream));
        let lax = format!("{upstream}, upstream-user: [1002, 100000]");
        let lax = Relayed::builder(sb).uid(1003).start(&config(&lax));
        for (uid, is_common) in [(0, true), (990, true), (1002, false), (100_000, false)] {
            let server = socks_of(sb, uid, at, &[]);
            let [to, _] = sb.destinations();
            let outcome = lax.tcp(to);
            assert!(
                matches!(outcome, Outcome::Direct { .. }),
                "{uid}: {outcome:?}"
            );
            let [to, _] = sb.destinations();
            let outcome = strict.tcp(to);
            let carried = matches!(outcome, Outcome::Direct { .. });
            assert_eq!(carried, is_common, "{uid}: {outcome:?}");
            assert!(carried || outcome == Outcome::Closed, "{uid}: {outcome:?}");
            drop(server);
        }
        // The key is taken over while everything goes on, spare connections included.
        let _server = socks_of(sb, 1002, at, &[]);
        let [to, _] = sb.destinations();
        assert!(matches!(lax.tcp(to), Outcome::Direct { .. }));
        lax.agent.write_config(&config(upstream));
        lax.agent.reload();
        wait_until("it to be refused", || {
            let [to, _] = sb.destinations();
            lax.tcp(to) == Outcome::Closed
        });
    });
}

#[test]
fn who_takes_a_connection_and_hides_is_told_nothing_either() {
    sandbox(|sb| {
        let _helper = sb.helper().start();
        let at: SocketAddr = (Ipv4Addr::LOCALHOST, 1080).into();
        let alice = bed(sb, 1001, "socks5://127.0.0.1:1080", "");
        for hidden in ["fleeting", "bound"] {
            let server = curious(sb, 1002, &[hidden], at);
            wait_until("it to have had ten connections", || {
                let [to, _] = sb.destinations();
                let outcome = alice.app.tcp(to);
                assert!(
                    matches!(outcome, Outcome::Closed | Outcome::Refused),
                    "{outcome:?}"
                );
                server.log().lines().count() > 10
            });
            assert_has_heard_nothing(&server);
        }
    });
}
