//! The privileged helper of cgtproxy.
//!
//! A call travels one way: [`server`] accepts the connection and learns from the kernel whose it is
//! ([`peer`]), [`session`] takes a message apart, [`cgroup`] opens what it names, [`registry`] turns it into a
//! [`nft::Plan`], and [`nft`] commits that, whole or not at all. [`state`] holds these together, and [`kernel`] is
//! where it ends. [`snapshot`] is what a helper tells the next one.
//! [`route`] brings marked packets back in, and [`monitor`] notices when somebody takes any of it away.

mod access;
mod bypass;
pub mod cgroup;
pub mod cli;
pub mod config;
mod conntrack;
// The bounds are of such builds.
#[cfg(test)]
#[cfg(all(debug_assertions, target_arch = "x86_64"))]
mod counts;
mod freshness;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guarded;
pub mod kernel;
pub mod mark;
pub mod monitor;
mod netlink;
pub mod nft;
pub mod peer;
mod quota;
pub mod registry;
pub mod route;
mod said;
pub mod server;
mod session;
pub mod snapshot;
mod spare;
pub mod state;
pub mod sys;
