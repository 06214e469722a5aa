#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| (uft_tests::fuzz::plugin_file::TARGET.run)(input));
