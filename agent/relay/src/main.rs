//! cgtproxy-relay: carries redirected connections on to SOCKS5 and HTTP proxies.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cgtproxy_relay::main()
}
