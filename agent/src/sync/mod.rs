//! Keeps the helper in step with the control groups.

mod ledger;
mod session;

pub use ledger::{Call, Ledger};
pub use session::{Error, run};
