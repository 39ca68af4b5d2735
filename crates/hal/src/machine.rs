// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the pure part asks of the hardware.

use havmsi_core::addr::{Ipa, Pa};
use havmsi_core::hw::Hardware;

use crate::smmu::Smmu;
use crate::{barrier, cache, phys, tlb};

/// This machine.
#[derive(Clone, Copy)]
pub struct Machine {
    /// `VTTBR_EL2` of the host's stage-2.
    pub host_vttbr: u64,
    /// The SMMU; without one the host has no device that masters the bus.
    pub smmu: Option<Smmu>,
}

impl Hardware for Machine {
    fn read_entry(&self, table: Pa, index: usize) -> u64 {
        phys::read(table.offset(index as u64 * 8))
    }

    fn write_entry(&self, table: Pa, index: usize, value: u64) {
        phys::write(table.offset(index as u64 * 8), value);
        barrier::dsb_ishst();
    }

    fn zero_page(&self, page: Pa) {
        phys::zero_page(page);
    }

    fn flush_page(&self, page: Pa) {
        phys::flush_page(page);
    }

    fn invalidate_icache(&self) {
        cache::invalidate_icache_all();
    }

    fn invalidate_host(&self, _ipa: Ipa, _size: u64) {
        tlb::invalidate_vmid(self.host_vttbr);
    }

    /// The lock of the host's map keeps other CPUs from the SMMU.
    fn invalidate_devices(&self, ipa: Ipa, size: u64) {
        if let Some(smmu) = &self.smmu {
            smmu.invalidate(ipa, size);
        }
    }

    fn invalidate_guest(&self, vttbr: u64, _ipa: Ipa, _size: u64) {
        tlb::invalidate_vmid(vttbr);
    }

    fn invalidate_guest_all(&self, vttbr: u64) {
        tlb::invalidate_vmid(vttbr);
    }
}
