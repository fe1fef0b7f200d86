//! Test beds for cgtproxy.
