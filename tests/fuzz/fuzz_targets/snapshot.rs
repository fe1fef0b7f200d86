#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cgtproxy_helper::fuzz::snapshot(bytes));
