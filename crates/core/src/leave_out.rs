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
    /// whose page it is is looked at when it was taken already
    OwnerLate,
    /// what comes in from the host keeps its content
    ScrubIn,
    /// what goes back to the host keeps its content
    ScrubOut,
    /// two CPUs can claim one page at once
    ClaimOnce,
    /// what is no RAM is the host's to give
    Ram,
    /// the host's map shows the carve-out
    Carveout,
    /// a page that leaves the host stays in its map
    Hide,
    /// a page that leaves the host stays in TLBs
    HostTlb,
    /// a page that leaves the host stays in the SMMU's TLB
    DevicesTlb,
    /// devices go past the SMMU's stage 2
    DevicesStage2,
    /// a page that leaves a VM stays in TLBs
    GuestTlb,
    /// a page can come where one was taken away
    Lost,
    /// many pages can come at once where one was taken away
    LostRun,
    /// a page that is taken back is not encrypted
    Seal,
    /// what comes back for a sealed page is decrypted, whatever it is
    Tag,
    /// all that is sealed has the same version
    Version,
    /// a page can come where one is
    Occupied,
    /// pages can be mapped outside declared RAM
    DeclaredRam,
    /// devices can be mapped in declared RAM
    DeviceInRam,
    /// MAP_DEV takes any address
    DeviceList,
    /// RAM can be declared beyond the address space
    RamSpace,
    /// any size of the address space can be asked for
    Config,
    /// all calls are possible in all phases of a VM
    Phase,
    /// a run page stays the host's to give
    RunPage,
    /// only the first page of a donated range is checked
    EveryPage,
    /// any number of pages for one call
    CallBound,
    /// a vCPU runs on two CPUs at once
    VcpuBusy,
    /// a VM can be destroyed while it runs
    VmBusy,
    /// a vCPU runs although it is off
    VcpuOff,
    /// the host says where a vCPU starts
    GuestEntry,
    /// a vCPU starts with the registers of the last one
    ContextReset,
    /// vCPUs beyond the last context share the first
    Contexts,
    /// the run page is read again after it was checked
    CopyOnce,
    /// a load gets as many bits as the host gives
    LoadWidth,
    /// a store shows the whole register
    StoreWidth,
    /// an access to RAM that is not mapped goes to the host
    RamFault,
    /// an access where the guest has no device goes to the host
    Guard,
    /// what a guest shares is taken for a physical address
    ShareAddress,
    /// a page is unshared without asking the host
    UnshareAsked,
    /// the host completes what it was not asked for
    Answer,
    /// an answer can be given again
    AnswerOnce,
    /// the host injects aborts at any time
    Inject,
    /// any number of list registers
    LrCount,
    /// list registers hold any interrupt, linked to any physical one
    LrLink,
    /// SGIs come without being sent
    SgiSent,
    /// a VM without interrupt controller finds the last one's state
    CloseGic,
    /// FP registers stay as the guest left them
    FpClear,
    /// the host's breakpoints stay when a guest arms its own
    DebugState,
    /// the guest's counter has the offset that the host loaded
    CounterOffset,
    /// calls of the host's interface from a guest
    GuestCalls,
    /// the host's map has fw_cfg and the redistributors' first pages
    HostDevices,
    /// RAM keeps what VMs left before a reset
    Wipe,
    /// a CPU that is turned on has no stage-2
    HostStage2,
    /// the call TIMER_LOAD of VM u64::MAX panics
    Panic,
}

/// One more than the number of the check that is left out; 0 for none.
static LEFT_OUT: AtomicUsize = AtomicUsize::new(0);

/// From now on this check is left out.
pub fn leave_out(check: Check) {
    LEFT_OUT.store(check as usize + 1, Ordering::Relaxed);
}

/// What happens between a look and the act, where a test monitor takes two steps
/// for what is one: the model's other CPUs ([`on_pause`]), or a while.
pub(crate) fn pause() {
    #[cfg(any(test, feature = "fake"))]
    if let Some(hook) = HOOK.get() {
        return hook();
    }
    (0..100_000).for_each(|_| core::hint::spin_loop());
}

#[cfg(any(test, feature = "fake"))]
static HOOK: std::sync::OnceLock<fn()> = std::sync::OnceLock::new();

/// From now on this is called there; the first one stays.
#[cfg(any(test, feature = "fake"))]
pub fn on_pause(hook: fn()) {
    HOOK.get_or_init(|| hook);
}

/// Whether it is this check that is left out.
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
