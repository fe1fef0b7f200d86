//! Keeps the helper in step with the control groups.

mod announce;
mod connect;
mod proxy;
mod session;
#[cfg(test)]
mod tests;
mod text;
mod wire;

pub(crate) use connect::{Error, run};
