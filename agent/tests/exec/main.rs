//! cgtproxy-exec as a process, and the functions for shells around it, with a systemd and an agent
//! that only pretend. That the real ones agree is shown on a booted system by the crate
//! `cgtproxy-tests`.

// clippy.toml allows these in tests, which to clippy are the functions marked as such alone.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod pretender;
mod program;
mod shell;
