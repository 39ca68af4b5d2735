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

/// Prints an event.
pub fn event(object: Object) {
    let n = NUMBER.fetch_add(1, Ordering::Relaxed);
    line(&format!("{AGENT_PREFIX}{}", object.value("n", n).finish()));
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
