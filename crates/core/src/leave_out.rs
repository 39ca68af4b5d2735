// SPDX-License-Identifier: MIT OR Apache-2.0
//! Test monitors with one check left out: the controls in which an attack has
//! to succeed. Where the check is made stands `left_out!(Name)`, which is
//! `false` in every other build, or `left_out!(Name => instead);`, which is
//! nothing there. Which check it is the monitor asks at boot.
//!
//! A new check: a line in the list below, `left_out!` where it is made, and an
//! attack that notices (`payload/README.md`).

#[cfg(not(debug_assertions))]
compile_error!("a release has all its checks; `--profile leave-out` builds a test monitor");

use core::sync::atomic::{AtomicUsize, Ordering};

macro_rules! checks {
    ($(#[doc = $what:literal] $name:ident,)*) => {
        /// A check that a test monitor can leave out.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        pub enum Check {
            $(#[doc = $what] $name,)*
        }

        impl Check {
            /// All of them, with their names and what is left out.
            pub const ALL: &[(Self, &str, &str)] =
                &[$((Self::$name, stringify!($name), $what.trim_ascii())),*];
        }
    };
}

checks! {
    /// a page is claimed whoever owns it
    Owner,
    /// what comes in from the host keeps its content
    ScrubIn,
    /// what goes back to the host keeps its content
    ScrubOut,
    /// the call TIMER_LOAD of VM u64::MAX panics
    Panic,
}

/// One more than the number of the check that is left out; 0 for none.
static LEFT_OUT: AtomicUsize = AtomicUsize::new(0);

/// From now on this check is left out.
pub fn leave_out(check: Check) {
    LEFT_OUT.store(check as usize + 1, Ordering::Relaxed);
}

/// Whether it is this check that is left out.
#[must_use]
pub fn is_left_out(check: Check) -> bool {
    LEFT_OUT.load(Ordering::Relaxed) == check as usize + 1
}

/// Whether this check is left out; with `=>`, what happens then.
#[macro_export]
macro_rules! left_out {
    ($check:ident) => {
        $crate::leave_out::is_left_out($crate::leave_out::Check::$check)
    };
    ($check:ident => $($instead:tt)*) => {
        if $crate::left_out!($check) {
            $($instead)*
        }
    };
}
