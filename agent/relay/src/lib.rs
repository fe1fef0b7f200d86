//! The relay: takes connections that the helper's rules redirect to it, and carries them on to SOCKS5 and HTTP
//! proxies. It runs as its user, needs no privilege, and is told by the agent what to do.
//!
//! [`service`] is what the agent talks to, [`relay`] listens for each proxy's [`entry`], [`tcp`], [`udp`] and [`dns`]
//! are what becomes of what arrives, and [`upstream`] is where it goes.

#![forbid(unsafe_code)]

pub mod cli;
mod conntrack;
mod copy;
pub mod dns;
pub mod entry;
pub mod fake;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod http;
pub mod original;
pub mod relay;
pub mod service;
mod sockets;
pub mod socks;
pub mod target;
pub mod tcp;
mod tls;
pub mod udp;
pub mod upstream;
