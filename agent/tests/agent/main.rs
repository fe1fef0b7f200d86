//! The agent as a process, with a helper that only keeps books. That the real helper does with it what
//! it should is shown on real packets by the crate `cgtproxy-tests`.

// clippy.toml allows these in tests, which to clippy are the functions marked as such alone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod apps;
mod commands;
mod configuration;
mod control_groups;
mod documents;
mod fake;
mod otherwise;
mod relay;
mod session;
mod target;
mod world;

/// A configuration that drops `drop-…`, sends `app.slice` through a proxy and lets `free-…` go.
const CONFIG: &str = "version: 1
bypass: [10.0.0.0/8, 'fe80::/10']
tproxies:
  p: {port: 7893, no-udp: true}
  q: {port: 7894}
rules:
  - {match: '/free-[^/]*$', direct: true}
  - {match: '/drop-[^/]*$', drop: true}
  - {match: '/app\\.slice$', tproxy: p}
";
