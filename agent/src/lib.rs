//! The agent, as a library that its programs and tests share.

#![forbid(unsafe_code)]

pub mod cli;
pub mod command;
pub mod config;
pub mod connection;
pub mod doctor;
pub mod exec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod policy;
pub mod relay;
pub mod reload;
pub mod run;
pub mod server;
pub mod state;
pub mod subtree;
pub mod sync;
mod systemd;
pub mod view;
pub mod watch;

pub use cgtproxy_proto::{notify, text};
