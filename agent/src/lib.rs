//! The agent, as a library that its programs and tests share.
//!
//! [`run`] starts its tasks, which share [`state`]: [`watch`] learns of control groups and [`reload`] of the
//! configuration ([`config`]), [`policy`] decides and asks nobody, [`ledger`] knows what the helper lacks and [`sync`] tells
//! it, and [`relay`] is told of proxies elsewhere. [`server`] answers the user's own programs with what [`view`] makes of
//! it. Those are the commands ([`command`]; [`doctor`] is the largest) and cgtproxy-exec ([`exec`]).

#![forbid(unsafe_code)]

pub mod cli;
pub mod command;
pub mod config;
pub mod connection;
// The bounds are of such builds.
#[cfg(test)]
#[cfg(all(debug_assertions, target_arch = "x86_64"))]
#[path = "../../tests/counts/counter.rs"]
mod counter;
pub mod doctor;
pub mod exec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod ledger;
mod makers;
pub mod otherwise;
pub mod policy;
pub mod relay;
pub mod reload;
pub mod run;
pub mod said;
pub mod server;
pub mod state;
pub mod subtree;
pub mod sync;
mod systemd;
mod timing;
pub mod view;
pub mod watch;

pub use cgtproxy_proto::{notify, text};
