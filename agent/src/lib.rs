//! The agent, as a library that its programs and tests share.

pub mod exec;
