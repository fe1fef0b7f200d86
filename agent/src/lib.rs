//! The agent, as a library that its programs and tests share.

#![forbid(unsafe_code)]

pub mod config;
pub mod exec;
pub mod policy;
pub mod text;
