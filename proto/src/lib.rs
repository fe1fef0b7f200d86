//! Placeholder until the interface lands.
