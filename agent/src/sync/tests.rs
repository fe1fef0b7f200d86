//! What is said to the helper, in every order of events, and what it costs.

mod closed;
// The bounds are of such builds.
#[cfg(all(debug_assertions, target_arch = "x86_64"))]
mod counts;
