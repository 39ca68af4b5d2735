// SPDX-License-Identifier: MIT OR Apache-2.0
//! A hostile host's calls and its guests' exits, compared with the model.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    havmsi_fuzz::run(data);
});
