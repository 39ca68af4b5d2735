// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtual CPU interface of GICv3 (IHI 0069, 12.4) and of GICv2 (IHI 0048B,
//! chapter 5): list registers, active priorities, VMCR.

use core::arch::asm;

use havmsi_abi::MAX_LRS;
use havmsi_core::addr::low32;

use crate::gic::Gic;
use crate::mmio::Registers;
use crate::sysreg::{ich_hcr_el2, ich_vmcr_el2, ich_vtr_el2};

/// What a vCPU keeps of the interface between its runs.
#[derive(Clone, Copy, Debug)]
pub struct VgicState {
    /// `ICH_VMCR_EL2` or `GICH_VMCR`.
    pub vmcr: u64,
    /// Active priorities: four of group 0, four of group 1. GICv2 has but one.
    apr: [u64; 8],
}

impl VgicState {
    /// What a CPU comes up with.
    pub const RESET: Self = Self { vmcr: 0, apr: [0; 8] };
}

macro_rules! numbered {
    ($read:ident, $write:ident; $($n:literal = $asm:literal)*) => {
        #[inline(always)]
        fn $read(n: usize) -> u64 {
            let value: u64;
            match n {
                $($n => {
                    // SAFETY: reading this register has no side effect.
                    unsafe {
                        asm!(concat!("mrs {}, ", $asm), out(reg) value, options(nomem, nostack, preserves_flags));
                    }
                })*
                _ => value = 0,
            }
            value
        }

        #[inline(always)]
        fn $write(n: usize, value: u64) {
            match n {
                $($n => {
                    // SAFETY: the register acts on the lower levels' virtual interrupts only.
                    unsafe {
                        asm!(concat!("msr ", $asm, ", {}"), in(reg) value, options(nomem, nostack, preserves_flags));
                    }
                })*
                _ => {}
            }
        }
    };
}

numbered! { read_lr, write_lr;
    0 = "ich_lr0_el2" 1 = "ich_lr1_el2" 2 = "ich_lr2_el2" 3 = "ich_lr3_el2"
    4 = "ich_lr4_el2" 5 = "ich_lr5_el2" 6 = "ich_lr6_el2" 7 = "ich_lr7_el2"
    8 = "ich_lr8_el2" 9 = "ich_lr9_el2" 10 = "ich_lr10_el2" 11 = "ich_lr11_el2"
    12 = "ich_lr12_el2" 13 = "ich_lr13_el2" 14 = "ich_lr14_el2" 15 = "ich_lr15_el2"
}
numbered! { read_apr, write_apr;
    0 = "ich_ap0r0_el2" 1 = "ich_ap0r1_el2" 2 = "ich_ap0r2_el2" 3 = "ich_ap0r3_el2"
    4 = "ich_ap1r0_el2" 5 = "ich_ap1r1_el2" 6 = "ich_ap1r2_el2" 7 = "ich_ap1r3_el2"
}

/// GICv2 (IHI 0048B, 5.3).
const GICH_HCR: usize = 0;
const GICH_VTR: usize = 4;
const GICH_VMCR: usize = 8;
const GICH_APR: usize = 0xf0;
const GICH_LR: usize = 0x100;

/// A list register as GICv2 has it: HW, group, state, five bits of priority;
/// physical INTID or EOI; virtual INTID and sender.
fn to_gich(lr: u64) -> u32 {
    let top = (lr >> 61 & 1) << 31 | (lr >> 60 & 1) << 30 | (lr >> 62) << 28;
    low32(top | (lr >> 51 & 0x1f) << 23 | (lr >> 32 & 0x3ff) << 10 | lr & 0x1fff)
}

/// And back, as far as it changes: state, and which it is.
fn from_gich(lr: u32) -> u64 {
    u64::from(lr >> 28 & 3) << 62 | u64::from(lr & 0x1fff)
}

/// `ICH_HCR_EL2`: the registers that both groups share (TC), those of group 0
/// and of group 1 (TALL0, TALL1) trap.
const HCR_TRAP_ALL: u64 = 0b111 << 10;

/// The virtual CPU interface of all CPUs. Between two runs its list registers are empty.
pub struct Vgic {
    gich: Option<Registers>,
    /// `ICH_VTR_EL2` or `GICH_VTR`.
    pub vtr: u64,
}

impl Vgic {
    /// The one that goes with `gic`.
    pub fn new(gic: &Gic) -> Self {
        let gich = gic.gich();
        let vtr = gich.map_or_else(ich_vtr_el2::read, |gich| gich.read32(GICH_VTR).into());
        Self { gich, vtr }
    }

    /// List registers that a CPU has (ListRegs + 1).
    pub fn list_registers(&self) -> usize {
        usize::from(self.vtr.to_le_bytes()[0] & 0x3f) + 1
    }

    /// Calls `f` with each active priority register that there is: of each group
    /// 2^(PREbits - 5) for PREbits of 5 to 7.
    #[inline(always)]
    fn active_priority_registers(&self, mut f: impl FnMut(usize)) {
        let prebits = (self.vtr >> 26 & 7) + 1;
        f(0);
        f(4);
        if prebits > 5 {
            f(1);
            f(5);
        }
        if prebits > 6 {
            [2, 6, 3, 7].into_iter().for_each(f);
        }
    }

    /// Empties this CPU's interface: its registers may hold anything after power-off.
    pub fn init_cpu(&self) {
        let lrs = [0; MAX_LRS];
        self.load(&VgicState::RESET, 0, &lrs[..self.list_registers().min(MAX_LRS)]);
    }

    /// Takes GICv3's interface away from a guest that has none: it would find what
    /// the last one left there. GICv2's is mapped into those that have one.
    pub fn close(&self) {
        if self.gich.is_none() {
            ich_hcr_el2::write(HCR_TRAP_ALL);
        }
    }

    /// Loads the interface for a run, with these checked list registers in use.
    pub fn load(&self, state: &VgicState, hcr: u64, lrs: &[u64]) {
        let lrs = lrs.iter().copied().enumerate();
        if let Some(gich) = self.gich {
            gich.write32(GICH_VMCR, low32(state.vmcr));
            gich.write32(GICH_APR, low32(state.apr[0]));
            lrs.for_each(|(n, lr)| gich.write32(GICH_LR + 4 * n, to_gich(lr)));
            gich.write32(GICH_HCR, low32(hcr));
        } else {
            ich_vmcr_el2::write(state.vmcr);
            self.active_priority_registers(|n| write_apr(n, state.apr[n]));
            lrs.for_each(|(n, lr)| write_lr(n, lr));
            ich_hcr_el2::write(hcr);
        }
    }

    /// Turns the interface off after a run, takes it out and empties the first
    /// `used` list registers; `take` gets what the host gets of each.
    pub fn save(&self, state: &mut VgicState, used: usize, mut take: impl FnMut(usize, u64)) {
        if let Some(gich) = self.gich {
            gich.write32(GICH_HCR, 0);
            state.vmcr = gich.read32(GICH_VMCR).into();
            state.apr[0] = gich.read32(GICH_APR).into();
            for n in 0..used {
                take(n, from_gich(gich.read32(GICH_LR + 4 * n)));
                gich.write32(GICH_LR + 4 * n, 0);
            }
        } else {
            ich_hcr_el2::write(0);
            state.vmcr = ich_vmcr_el2::read();
            self.active_priority_registers(|n| state.apr[n] = read_apr(n));
            for n in 0..used {
                take(n, read_lr(n));
                write_lr(n, 0);
            }
        }
    }
}
