#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cgtproxy_relay::fuzz::socks(bytes));
