//! Test beds for cgtproxy: real packets, real cgroups and a real nftables in sandboxes that leave
//! the host alone. `tests/README.md` tells how to write a test and how to run one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "whatever goes wrong in a test bed is a failed test, and a panic is how one says so"
)]

pub mod agent;
pub mod amount;
mod command;
pub mod confinement;
mod host_cgroup;
pub mod injection;
pub mod installed;
pub mod others;
pub mod package;
pub mod proxies;
pub mod relayed;
pub mod sandbox;
pub mod session;
pub mod steady;
pub mod system;
pub mod wait;
pub mod wire;

pub use sandbox::{Sandbox, sandbox};
pub use system::System;
