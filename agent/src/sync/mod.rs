//! Keeps the helper in step with the control groups.

mod announce;
#[cfg(test)]
mod closed;
mod connect;
// The bounds are of such builds.
#[cfg(test)]
#[cfg(all(debug_assertions, target_arch = "x86_64"))]
mod counts;
mod ledger;
mod proxy;
mod room;
mod session;
mod text;
mod wire;

pub use connect::{Error, run};
pub use ledger::{Call, Handling, Ledger};
pub(crate) use room::{Maker, maker};
pub use text::too_many_control_groups;
pub use wire::length_of;
