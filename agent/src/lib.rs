//! The agent, as a library that its programs share. Manual pages and completions are made of its command lines.
//!
//! [`run`] starts its tasks, which share [`state`]: [`watch`] learns of control groups and [`reload`] of the
//! configuration ([`config`]), [`policy`] decides and asks nobody, [`ledger`] knows what the helper lacks and [`sync`] tells
//! it, and [`relay`] is told of proxies elsewhere. [`server`] answers the user's own programs with what [`view`] makes of
//! it. Those are the commands ([`command`]; [`doctor`] is the largest) and cgtproxy-exec ([`exec`]).

#![forbid(unsafe_code)]

pub mod cli;
pub mod command;
mod config;
mod connection;
// The bounds are of such builds.
#[cfg(test)]
#[cfg(all(debug_assertions, target_arch = "x86_64"))]
#[path = "../../tests/counts/counter.rs"]
mod counter;
mod doctor;
pub mod exec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod ledger;
mod makers;
mod otherwise;
mod policy;
mod relay;
mod reload;
mod run;
mod said;
mod server;
mod state;
mod subtree;
mod sync;
mod systemd;
mod timing;
mod view;
mod watch;

use cgtproxy_proto::{notify, text};
