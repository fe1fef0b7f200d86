//! Keeps the helper in step with the control groups.

mod announce;
mod connect;
mod ledger;
mod proxy;
mod room;
mod session;
#[cfg(test)]
mod tests;
mod text;
mod turns;
mod wire;

pub use announce::Readiness;
pub use connect::{Error, run};
pub use ledger::{Call, Handling, Ledger};
pub use text::too_many_control_groups;
pub use wire::length_of;
