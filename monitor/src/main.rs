//! Monitor.
fn main() {}
