#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cgtproxy_agent::fuzz::migration(bytes));
