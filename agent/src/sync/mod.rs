//! Keeps the helper in step with the control groups.

#[cfg(test)]
mod closed;
mod ledger;
mod proxy;
mod session;
mod wire;

pub use ledger::{Call, Ledger};
pub use session::{Error, run};
