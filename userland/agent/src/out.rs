// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lines on the host's console.

use havmsi_proto::AGENT_PREFIX;
use havmsi_proto::json::Object;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Prints a line in one write, so that no other line falls into it.
pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    // A console that doesn't take our line leaves nobody to tell.
    let _ = out.write_all(format!("{text}\n").as_bytes());
    let _ = out.flush();
}

/// Seconds since the host's kernel started, as it prints them.
fn uptime() -> String {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("0").to_owned()
}

/// Prints an event.
pub fn event(object: Object) {
    let n = NUMBER.fetch_add(1, Ordering::Relaxed);
    let object = object.value("n", n).value("t", uptime());
    line(&format!("{AGENT_PREFIX}{}", object.finish()));
}

/// Prints how far a step is.
pub fn progress(step: &str, done: usize, total: usize, text: &str) {
    event(
        Object::event("progress")
            .text("step", step)
            .value("done", done)
            .value("total", total)
            .text("text", text),
    );
}
