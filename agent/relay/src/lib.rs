//! The relay: takes connections that the helper's rules redirect to it, and carries them on to SOCKS5 and HTTP
//! proxies. It runs as its user, needs no privilege, and is told by the agent what to do.
//!
//! [`run`] starts it, [`service`] is what the agent talks to, [`relay`] listens for each proxy's [`entry`], [`tcp`],
//! [`udp`] and [`dns`] are what becomes of what arrives, and [`upstream`] is where it goes.

#![forbid(unsafe_code)]

pub mod cli;
mod conntrack;
mod copy;
mod dns;
mod entry;
mod fake;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod http;
mod original;
mod relay;
mod run;
mod service;
mod sockets;
mod socks;
mod target;
mod tcp;
mod tls;
mod udp;
mod upstream;

pub use run::main;
