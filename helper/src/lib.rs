//! The privileged helper of cgtproxy.
//!
//! A call travels one way: [`server`] accepts the connection and learns from the kernel whose it is
//! ([`peer`]), `session` takes a message apart, [`cgroup`] opens what it names, [`registry`] turns it into a
//! [`nft::Plan`], and [`nft`] commits that, whole or not at all. [`state`] holds these together, and [`kernel`] is
//! where it ends. [`snapshot`] is what a helper tells the next one.
//! [`route`] brings marked packets back in, and [`monitor`] notices when somebody takes any of it away.
//! `access` says who may connect, `quota` how much of the helper a user may use, and [`config`] what the administrator
//! wants.
//!
//! What the words mean:
//!
//! - *Policy*: all that an agent has asked for. *Layout*: the policy without the verdicts of single control groups.
//!   *Stamp*: a random number that identifies a layout in the kernel and in the snapshot.
//! - *Plan*: what the kernel has of a user before a change and after it. *Step*: one of up to four transactions that
//!   carry it out.
//! - *Element*: what is said of one control group; in nftables, what a map or set has for one key. *Number*: the value
//!   of a control group in the map `cgroups`. *Choice*: what a number means, in the map `choices`.
//! - *Hold*: a control group holds what is below it until that has an element of its own. What is *held* sends nothing.
//! - *Enforced*: what users' own policies can't change, as the system's policy says.
//! - *Confirmed*: in conntrack, a connection whose first packet has passed all hooks. *Open*: a confirmed connection
//!   that the packet in question does not begin anew. It goes on as it began, unless its packets are dropped.
//! - *Replies*: packets on connections that others have opened; they leave as they are. *Answers*: packets to somebody
//!   for whom a TPROXY server has spoken first; they go by the verdict of their sender.
//! - *First rules*: those of the output hook that come before any user's own chains.
//! - *Inherited*: what an earlier helper has left of a user's. It is *known* if a snapshot describes it, and *left
//!   behind* if there is no more than can be read back from the table.

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
