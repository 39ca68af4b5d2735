// SPDX-License-Identifier: MIT OR Apache-2.0
//! Barriers and hints (Arm ARM B2.3, C5.6, D1.6).

use core::arch::asm;

macro_rules! barriers {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() {
            // SAFETY: a barrier or hint changes no register and no memory.
            unsafe { asm!($text, options(nostack, preserves_flags)) }
        }
    )* };
}

barriers! {
    /// Context synchronisation: later instructions see earlier register writes.
    isb = "isb";
    /// All earlier accesses and maintenance are complete, for all observers.
    dsb_sy = "dsb sy";
    /// As [`dsb_sy`] for the inner shareable domain.
    dsb_ish = "dsb ish";
    /// Earlier stores are complete, for the inner shareable domain.
    dsb_ishst = "dsb ishst";
    /// Waits for an interrupt, masked or not.
    wfi = "dsb sy\nwfi";
    /// Wakes all CPUs that wait for an event.
    sev = "dsb sy\nsev";
}
