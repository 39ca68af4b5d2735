// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM's life: created, filled and measured, run, reset, destroyed. One lock
//! of the caller's protects each [`Vm`]; the order of locks is VM, then host
//! map.
//!
//! ```text
//! Free ──create──► Open ──activate──► Active
//!  ▲                ▲ ▲                 │ (Stopped: a sealed page came back changed)
//!  │                │ └──── reset ──────┤ (Resetting: a few pages a call)
//!  └── destroy (Destroying) ◄───────────┘
//! ```

use havmsi_abi::{
    Error, MAX_PAGES_PER_CALL, MAX_PAGES_PER_MAP, MAX_RAM_RANGES, MAX_VCPUS_PER_VM, PAGE_SIZE,
};

use crate::addr::{Ipa, Pa, index, words};
use crate::guest_map::GuestMap;
use crate::host_map::HostMap;
use crate::hw::Hardware;
use crate::launch::{self, Boot, Config, Digest, Launch};
use crate::page::{Claimed, Clean, Isolated, Owner, Page, Pages, VmSlot};
use crate::psci::{self, Power};
use crate::ram::Range;
use crate::seal::{Seal, Tag};
use crate::stage2::{Attributes, Entry};
use crate::vgic::{SentSgis, Sgi, bits};

/// What a VM's transitions work on.
pub trait Machine {
    /// The hardware.
    type Hw: Hardware;
    /// The hardware.
    fn hw(&self) -> &Self::Hw;
    /// The ownership records.
    fn pages(&self) -> &Pages<'_>;
    /// What the keys of VMs are made from.
    fn secret(&self) -> Option<&[u8; 32]>;
    /// The host's map, locked for the length of `f`.
    fn with_host_map<R>(&self, f: impl FnOnce(&mut HostMap) -> R) -> R;
}

/// Wipes a page and gives it to the host.
fn wipe_to_host(m: &impl Machine, page: Page<Isolated>) {
    give_to_host(m, page.scrub(m.hw()));
}

pub(crate) fn give_to_host(m: &impl Machine, page: Page<Clean>) {
    m.with_host_map(|map| map.show(m.hw(), m.pages(), page, Owner::Host));
}

/// Takes a claimed page out of the host's hands.
fn hide(m: &impl Machine, page: Page<Claimed>) -> Result<Page<Isolated>, Error> {
    m.with_host_map(|map| map.hide(m.hw(), m.pages(), page))
}

/// Runs of pages that a VM can guard: what Linux maps of a board with some
/// twenty devices.
const MAX_GUARDS: usize = 64;

/// What a VM can do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Free,
    Open,
    Active,
    /// What the host gave back for a page was not what was sealed.
    Stopped,
    Resetting,
    Destroying,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Vcpu {
    /// No `Option` around it: `None` would not be all zeros, and the table of
    /// VMs so large a part of the image.
    pub(crate) exists: bool,
    pub(crate) context: u16,
    pub(crate) run_page: Pa,
    power: Power,
    pub(crate) running: bool,
    boot: Option<Boot>,
    /// The vCPU whose CPU_ON the host is carrying out for this one.
    starting: Option<u8>,
    sgis: SentSgis,
}

impl Vcpu {
    const NONE: Self = Self {
        exists: false,
        context: 0,
        run_page: Pa(0),
        power: Power::Off,
        running: false,
        boot: None,
        starting: None,
        sgis: SentSgis::NONE,
    };
}

/// What a CPU needs to run a vCPU that [`Vm::enter`] gave to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The vCPU's context.
    pub context: u16,
    /// The run page.
    pub run_page: Pa,
    /// Start from here with all else reset; `None` to go on.
    pub start: Option<Boot>,
    /// `VTTBR_EL2`.
    pub vttbr: u64,
    /// `CNTVOFF_EL2`.
    pub cntvoff: u64,
    /// The VM's configuration.
    pub config: Config,
}

/// One VM.
#[cfg_attr(any(test, feature = "fake"), derive(Clone, PartialEq, Eq, Hash, Debug))]
pub struct Vm {
    phase: Phase,
    pub(crate) slot: VmSlot,
    generation: u32,
    pub(crate) config: Config,
    pub(crate) ram: [Range; MAX_RAM_RANGES],
    /// Around all device pages: no RAM can be declared there any more.
    devices: Range,
    /// Where the guest wants the host to emulate devices; anywhere, if nowhere.
    guards: [Range; MAX_GUARDS],
    pub(crate) map: GuestMap,
    launch: Launch,
    /// Of the launch, once it is closed.
    digest: Digest,
    pub(crate) vcpus: [Vcpu; MAX_VCPUS_PER_VM],
    cntvoff: u64,
    pub(crate) seal: Seal,
}

/// A VM's handle: generation and slot. Slots are used again, handles are not.
pub fn handle_slot(handle: u64) -> Option<VmSlot> {
    let slot = (handle & 0xffff).checked_sub(1)?;
    u8::try_from(slot).ok().filter(|s| usize::from(*s) < havmsi_abi::MAX_VMS).map(VmSlot)
}

/// The affinity fields of a vCPU's `MPIDR_EL1`: 16 vCPUs a cluster, as KVM
/// numbers them.
pub const fn mpidr_affinity(idx: u64) -> u64 {
    idx & 0xf | (idx >> 4 & 0xff) << 8
}

fn check_page(pa: u64) -> Result<Pa, Error> {
    if Pa(pa).is_page() { Ok(Pa(pa)) } else { Err(Error::Invalid) }
}

impl Vm {
    /// A slot without a VM.
    pub const FREE: Self = Self {
        phase: Phase::Free,
        slot: VmSlot(0),
        generation: 0,
        config: Config { ipa_bits: 0, gic: 0, max_vcpus: 0 },
        ram: [Range { base: 0, size: 0 }; MAX_RAM_RANGES],
        devices: Range { base: 0, size: 0 },
        guards: [Range { base: 0, size: 0 }; MAX_GUARDS],
        map: GuestMap::new(VmSlot(0), Pa(0)),
        launch: Launch::NEW,
        digest: [0; 32],
        vcpus: [Vcpu::NONE; MAX_VCPUS_PER_VM],
        cntvoff: 0,
        seal: Seal::new([0; 32]),
    };

    /// The handle of the VM in this slot.
    pub fn handle(&self) -> u64 {
        (u64::from(self.generation) << 16) | (u64::from(self.slot.0) + 1)
    }

    /// Whether the slot holds a VM.
    pub fn exists(&self) -> bool {
        self.phase != Phase::Free
    }

    /// Whether `handle` names the VM in this slot.
    ///
    /// # Errors
    /// [`Error::Invalid`] if not.
    pub fn check_handle(&self, handle: u64) -> Result<(), Error> {
        if self.exists() && self.handle() == handle { Ok(()) } else { Err(Error::Invalid) }
    }

    /// Makes a VM in this slot, which is number `slot`; gives its handle. `root`
    /// is two zeroed pages at an 8 KiB boundary, kept for this slot; `key` is to seal
    /// its pages and has never been used.
    ///
    /// # Errors
    /// [`Error::Busy`] if the slot is taken, [`Error::Invalid`] for a bad configuration.
    pub fn create(
        &mut self,
        slot: VmSlot,
        root: Pa,
        config: Config,
        cntvoff: u64,
        key: [u8; 32],
    ) -> Result<u64, Error> {
        if self.phase != Phase::Free {
            return Err(Error::Busy);
        }
        let vcpus = 1..=MAX_VCPUS_PER_VM as u64;
        let bits = havmsi_abi::MIN_IPA_BITS..=havmsi_abi::MAX_IPA_BITS;
        #[cfg(feature = "leave-out")]
        let bits = if left_out!(Config) { 0..=u64::MAX } else { bits };
        if !vcpus.contains(&config.max_vcpus)
            || !bits.contains(&config.ipa_bits)
            || !matches!(config.gic, 0 | 2 | 3)
        {
            return Err(Error::Invalid);
        }
        // After 2^32 VMs in one slot a stale handle could name a new VM.
        self.generation = self.generation.wrapping_add(1);
        self.phase = Phase::Open;
        self.slot = slot;
        self.map = GuestMap::new(slot, root);
        self.config = config;
        self.cntvoff = cntvoff;
        self.seal = Seal::new(key);
        Ok(self.handle())
    }

    fn in_phase(&self, phase: Phase) -> Result<(), Error> {
        left_out!(Phase => return Ok(()));
        match self.phase {
            this if this == phase => Ok(()),
            Phase::Stopped => Err(Error::Integrity),
            _ => Err(Error::State),
        }
    }

    /// Open or active.
    fn in_use(&self) -> Result<(), Error> {
        self.in_phase(Phase::Open).or(self.in_phase(Phase::Active))
    }

    /// Declares RAM. The same range twice is no error.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is malformed or overlaps, [`Error::State`] after
    /// activation, [`Error::NoMemory`] if there are too many.
    pub fn add_ram(&mut self, ipa: u64, size: u64) -> Result<(), Error> {
        self.in_phase(Phase::Open)?;
        let range = Range { base: ipa, size };
        let space = Range { base: 0, size: 1 << self.config.ipa_bits };
        #[cfg(feature = "leave-out")]
        let space = if left_out!(RamSpace) { Range { base: 0, size: u64::MAX } } else { space };
        if size == 0 || !Ipa(ipa).is_page() || !Ipa(size).is_page() || !space.contains(ipa, size) {
            return Err(Error::Invalid);
        }
        if self.ram.contains(&range) {
            return Ok(());
        }
        let taken = |r: &Range| r.size != 0 && r.overlaps(&range);
        if self.ram.iter().any(taken) || taken(&self.devices) {
            return Err(Error::Invalid);
        }
        let free = self.ram.iter_mut().find(|r| r.size == 0).ok_or(Error::NoMemory)?;
        *free = range;
        Ok(())
    }

    /// Whether the page at `ipa` is declared RAM.
    pub fn is_ram(&self, ipa: Ipa) -> bool {
        self.in_ram(ipa, PAGE_SIZE)
    }

    pub(crate) fn in_ram(&self, ipa: Ipa, size: u64) -> bool {
        self.ram.iter().take_while(|r| r.size != 0).any(|r| r.contains(ipa.0, size))
    }

    /// Whether the page at `ipa` is RAM, or a device's that the host may emulate; `None`
    /// if the guest has said where its devices are, and not there.
    pub fn ram_or_device(&self, ipa: Ipa) -> Option<bool> {
        let (ram, any) = (self.is_ram(ipa), self.guards[0].size == 0 || left_out!(Guard));
        let guards = self.guards.iter().take_while(|r| r.size != 0);
        let guarded = || guards.clone().any(|r| r.contains(ipa.0, PAGE_SIZE));
        (ram || any || guarded()).then_some(ram)
    }

    /// The guest says that the host may emulate what is at the page `ipa`; from the
    /// first time on, nothing elsewhere.
    ///
    /// # Errors
    /// [`Error::Invalid`] if that is no page outside RAM, [`Error::NoMemory`] if there
    /// are too many places.
    pub fn guard(&mut self, ipa: Ipa) -> Result<(), Error> {
        if !ipa.is_page() || ipa.0 >> self.config.ipa_bits != 0 || self.is_ram(ipa) {
            return Err(Error::Invalid);
        }
        // One that it lies in or follows, or a free one: those come last.
        let near = |r: &&mut Range| r.size == 0 || r.base <= ipa.0 && ipa.0 - r.base <= r.size;
        let range = self.guards.iter_mut().find(near).ok_or(Error::NoMemory)?;
        if range.size == 0 {
            range.base = ipa.0;
        }
        range.size = range.size.max(ipa.0 - range.base + PAGE_SIZE);
        Ok(())
    }

    /// `CNTVOFF_EL2` of all its vCPUs.
    pub const fn cntvoff(&self) -> u64 {
        self.cntvoff
    }

    /// Makes vCPU `idx` with the free `context`; borrows its run page.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad index or address, [`Error::State`] if it
    /// exists or the VM was activated, [`Error::Denied`] or [`Error::Again`] if
    /// the page is not to be had.
    pub fn create_vcpu(
        &mut self,
        m: &impl Machine,
        idx: u64,
        run_page: u64,
        context: u16,
    ) -> Result<(), Error> {
        let run_page = check_page(run_page)?;
        if idx >= self.config.max_vcpus {
            return Err(Error::Invalid);
        }
        self.in_phase(Phase::Open)?;
        let slot = self.slot;
        let vcpu = self.vcpus.get_mut(index(idx)).ok_or(Error::Invalid)?;
        if vcpu.exists {
            return Err(Error::State);
        }
        let page = m.pages().claim(run_page, Owner::Host)?;
        m.pages().relabel(page, Owner::RunPage(slot));
        left_out!(RunPage => m.pages().give_to_host(run_page));
        *vcpu = Vcpu { exists: true, context, run_page, ..Vcpu::NONE };
        Ok(())
    }

    fn vcpu(&mut self, idx: u64) -> Result<&mut Vcpu, Error> {
        self.vcpus.get_mut(index(idx)).filter(|vcpu| vcpu.exists).ok_or(Error::Invalid)
    }

    fn existing(&mut self) -> impl Iterator<Item = &mut Vcpu> {
        self.vcpus.iter_mut().filter(|vcpu| vcpu.exists)
    }

    /// Says where a vCPU starts that is on at launch.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it does not exist, [`Error::State`] after activation.
    pub fn set_boot(&mut self, idx: u64, boot: Boot) -> Result<(), Error> {
        self.in_phase(Phase::Open)?;
        self.vcpu(idx)?.boot = Some(boot);
        Ok(())
    }

    /// What a sealed page is bound to beside its version.
    fn place(&self, ipa: Ipa) -> u128 {
        u128::from(self.handle()) << 64 | u128::from(ipa.0)
    }

    /// Claims pages of the host's, if they can go to `ipa`. Whose they are comes first,
    /// before a lack of tables is told.
    fn claim_for(&self, m: &impl Machine, ipa: Ipa, run: Range) -> Result<Page<Claimed>, Error> {
        let (pa, size) = (Pa(run.base), run.size);
        if !ipa.is_page() {
            return Err(Error::Invalid);
        }
        if !self.in_ram(ipa, size) && !left_out!(DeclaredRam) {
            return Err(Error::Denied);
        }
        left_out!(OwnerLate => return Ok(Pages::not_claimed(pa)));
        let page = m.pages().claim_run(pa, size / PAGE_SIZE, Owner::Host)?;
        if let Err(error) = self.map.check(m.hw(), ipa, size) {
            m.pages().unclaim(page);
            return Err(error);
        }
        Ok(page)
    }

    /// Takes the claimed pages, now nobody's, out of the host's hands.
    fn take(m: &impl Machine, page: Page<Claimed>) -> Result<Page<Isolated>, Error> {
        let page = hide(m, page)?;
        left_out!(OwnerLate => return Ok(m.pages().claim(page.pa(), Owner::Host)?.isolated()));
        Ok(page)
    }

    /// Donates a page of the launch image and measures it. `buffer` is scratch.
    ///
    /// # Errors
    /// [`Error::State`] after activation, [`Error::Invalid`] out of order,
    /// otherwise as [`Self::map_pages`].
    pub fn populate(
        &mut self,
        m: &impl Machine,
        ipa: u64,
        pa: u64,
        buffer: &mut [u8; 4096],
    ) -> Result<(), Error> {
        self.in_phase(Phase::Open)?;
        let (ipa, pa) = (Ipa(ipa), check_page(pa)?);
        self.launch.check(ipa)?;
        let page = self.claim_for(m, ipa, Range { base: pa.0, size: PAGE_SIZE })?;
        let page = Self::take(m, page)?.measure(m.hw(), buffer);
        self.launch.add_page(ipa, buffer);
        self.map.map(m, ipa, page, Owner::Private(self.slot))
    }

    /// Closes the launch; the VM can run.
    ///
    /// # Errors
    /// [`Error::State`] if it is not open or no vCPU is on.
    pub fn activate(&mut self, m: &impl Machine) -> Result<Digest, Error> {
        self.in_phase(Phase::Open)?;
        let boots = self.vcpus.map(|vcpu| vcpu.boot);
        if boots.iter().all(Option::is_none) {
            return Err(Error::State);
        }
        self.ram.sort_unstable_by_key(|r| (r.size == 0, r.base));
        self.digest = self.launch.digest(
            &self.config,
            self.ram.iter().filter(|r| r.size != 0),
            &self.devices,
            (0..).zip(boots).filter_map(|(i, b)| Some((i, b?))),
        );
        for vcpu in self.existing() {
            vcpu.power = vcpu.boot.map_or(Power::Off, Power::Pending);
        }
        m.hw().invalidate_icache();
        self.phase = Phase::Active;
        Ok(self.digest)
    }

    /// Half `half` of the VM's key; it is final, for a vCPU asks.
    pub fn key(&self, m: &impl Machine, half: u64) -> Option<[u64; 2]> {
        let key = words::<4>(&launch::key(m.secret()?, &self.digest));
        key.as_chunks().0.get(index(half)).copied()
    }

    /// Donates `size` bytes, all or none; the guest sees zeros (I7). Where the host took
    /// a page away that page comes back alone, with what the guest had in it: it must hold
    /// what was sealed, and `tag` be what came with it. What the VM shared is the host's
    /// to change.
    ///
    /// # Errors
    /// [`Error::State`] before activation, [`Error::Invalid`] for a malformed
    /// address or size, [`Error::Denied`] if at `ipa` is no RAM or something mapped, or a
    /// page is not the host's; [`Error::NoMemory`] if the pool is short;
    /// [`Error::Integrity`] if the page is not what was sealed: the host keeps it, the VM
    /// has stopped.
    pub fn map_pages(
        &mut self,
        m: &impl Machine,
        ipa: u64,
        pa: u64,
        size: u64,
        tag: Tag,
    ) -> Result<(), Error> {
        self.in_phase(Phase::Active)?;
        let (ipa, pa) = (Ipa(ipa), check_page(pa)?);
        let most = MAX_PAGES_PER_MAP * PAGE_SIZE;
        if size == 0 || size > most || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Invalid);
        }
        let page = self.claim_for(m, ipa, Range { base: pa.0, size })?;
        let private = Owner::Private(self.slot);
        match self.map.entry(m.hw(), ipa).and_then(Entry::gone_version) {
            Some(0) => self.map.map(m, ipa, page.share(), Owner::Shared(self.slot)),
            Some(version) => {
                let place = self.place(ipa);
                let open = |content: &mut _| self.seal.open(version, place, content, tag);
                let (page, opened) = Self::take(m, page)?.change(m.hw(), open);
                if opened {
                    return self.map.map(m, ipa, page, private);
                }
                give_to_host(m, page);
                self.phase = Phase::Stopped;
                Err(Error::Integrity)
            }
            None => self.map.map(m, ipa, Self::take(m, page)?.scrub(m.hw()), private),
        }
    }

    /// The same with one page.
    #[cfg(any(test, feature = "fake"))]
    #[expect(clippy::missing_errors_doc, reason = "those of `map_pages`")]
    pub fn map_page(&mut self, m: &impl Machine, ipa: u64, pa: u64, tag: Tag) -> Result<(), Error> {
        self.map_pages(m, ipa, pa, PAGE_SIZE, tag)
    }

    /// The page at `ipa`, if the record says `owner`.
    fn claim_at(&self, m: &impl Machine, ipa: Ipa, owner: Owner) -> Result<Page<Claimed>, Error> {
        left_out!(ShareAddress => return m.pages().claim_from_anyone(Pa(ipa.0), owner).ok_or(Error::Denied));
        if !ipa.is_page() || !self.is_ram(ipa) {
            return Err(Error::Invalid);
        }
        m.pages().claim(self.map.page(m.hw(), ipa).ok_or(Error::Again)?, owner)
    }

    /// The guest shares its page at `ipa` with the host, content and all.
    ///
    /// # Errors
    /// [`Error::Invalid`] if that is no page of RAM, [`Error::Again`] if the host has
    /// to map one first, [`Error::Denied`] if it is shared.
    pub fn share(&self, m: &impl Machine, ipa: Ipa) -> Result<(), Error> {
        let page = self.claim_at(m, ipa, Owner::Private(self.slot))?.share();
        m.with_host_map(|map| map.show(m.hw(), m.pages(), page, Owner::Shared(self.slot)));
        Ok(())
    }

    /// The guest has back for itself what it shared; its content stays.
    ///
    /// # Errors
    /// As [`Self::share`]; [`Error::Denied`] if it is not shared.
    pub fn unshare(&self, m: &impl Machine, ipa: Ipa) -> Result<(), Error> {
        let page = self.claim_at(m, ipa, Owner::Shared(self.slot))?;
        let page = hide(m, page)?;
        m.pages().settle(page.keep(m.hw()), Owner::Private(self.slot));
        Ok(())
    }

    /// Maps a page of the GICv2 virtual CPU interface; `pa` is checked by the caller.
    ///
    /// # Errors
    /// [`Error::Denied`] if `ipa` is RAM or taken.
    pub fn map_device(&mut self, m: &impl Machine, ipa: u64, pa: Pa) -> Result<(), Error> {
        self.in_use()?;
        let ipa = Ipa(ipa);
        if !ipa.is_page() || ipa.0 >> self.config.ipa_bits != 0 {
            return Err(Error::Invalid);
        }
        if self.is_ram(ipa) && !left_out!(DeviceInRam) || self.config.gic != 2 {
            return Err(Error::Denied);
        }
        self.map.insert(m.hw(), ipa, (pa, PAGE_SIZE), Attributes::Device)?;
        let Range { base, size } = self.devices;
        let (first, end) = if size == 0 { (ipa.0, ipa.0) } else { (base, base + size) };
        let first = first.min(ipa.0);
        self.devices = Range { base: first, size: end.max(ipa.0 + PAGE_SIZE) - first };
        Ok(())
    }

    /// Gives the first page among `n` from `ipa` on back to the host, sealed, or as it
    /// is if the VM shares it. Tells how many places it has looked at, and the tag. In
    /// whatever state the VM is: the host may be unable to wait.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad range.
    pub fn unmap_pages(&mut self, m: &impl Machine, ipa: u64, n: u64) -> Result<(u64, Tag), Error> {
        let space = Range { base: 0, size: 1 << self.config.ipa_bits };
        if (n > MAX_PAGES_PER_CALL || !Ipa(ipa).is_page() || !space.contains(ipa, n * PAGE_SIZE))
            && !left_out!(CallBound)
        {
            return Err(Error::Invalid);
        }
        for i in 0..n {
            let ipa = Ipa(ipa + i * PAGE_SIZE);
            if !self.is_ram(ipa) {
                continue;
            }
            let Some(page) = self.map.unmap(m, ipa, self.seal.version + 1) else { continue };
            let place = self.place(ipa);
            let (page, tag) = if page.is_shared() {
                (page.give_back(), [0; 2])
            } else {
                page.change(m.hw(), |content| self.seal.seal(place, content))
            };
            give_to_host(m, page);
            return Ok((i + 1, tag));
        }
        Ok((n, [0; 2]))
    }

    /// Donates `n` pages as table memory; all or none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad range, [`Error::State`] while the VM is torn
    /// down, [`Error::Denied`] or [`Error::Again`] if a page is not to be had.
    pub fn donate_pool(&mut self, m: &impl Machine, pa: u64, n: u64) -> Result<(), Error> {
        let first = check_page(pa)?;
        if n == 0 || n > MAX_PAGES_PER_CALL {
            return Err(Error::Invalid);
        }
        self.in_use()?;
        let page = m.pages().claim_run(first, n, Owner::Host)?;
        let page = hide(m, page)?;
        self.map.add_to_pool(m, page.scrub(m.hw()));
        Ok(())
    }

    /// Whether vCPU `idx` can run, and what a CPU needs for that.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it does not exist, [`Error::State`] if the VM is
    /// not active or the vCPU off, [`Error::Busy`] if it runs.
    #[inline(always)]
    pub fn runnable(&self, idx: u64) -> Result<Run, Error> {
        let vcpu = self.vcpus.get(index(idx)).filter(|vcpu| vcpu.exists).ok_or(Error::Invalid)?;
        self.in_phase(Phase::Active)?;
        if vcpu.running && !left_out!(VcpuBusy) {
            return Err(Error::Busy);
        }
        let start = match vcpu.power {
            #[cfg(feature = "leave-out")]
            Power::Off if left_out!(VcpuOff) => None,
            Power::Off => return Err(Error::State),
            Power::Pending(boot) => Some(boot),
            Power::On => None,
        };
        Ok(Run {
            context: vcpu.context,
            run_page: vcpu.run_page,
            start,
            vttbr: self.map.vttbr(),
            cntvoff: self.cntvoff,
            config: self.config,
        })
    }

    /// A vCPU sends an SGI.
    pub fn send_sgi(&mut self, sgi: Sgi) {
        for i in bits(sgi.targets) {
            self.vcpus[i].sgis.add(sgi.id);
        }
    }

    /// vCPU `idx` may find these SGIs pending in this run.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one was not sent to it.
    #[inline]
    pub fn take_sgis(&mut self, idx: u64, set: u16) -> Result<(), Error> {
        left_out!(SgiSent => return Ok(()));
        self.vcpu(idx)?.sgis.take(set)
    }

    /// Gives vCPU `idx` to the calling CPU, to run it; if it had yet to start, it
    /// is on.
    ///
    /// # Errors
    /// Those of [`Self::runnable`].
    #[inline(always)]
    pub fn enter(&mut self, idx: u64) -> Result<Run, Error> {
        let run = self.runnable(idx)?;
        let vcpu = self.vcpu(idx)?;
        vcpu.running = true;
        vcpu.power = Power::On;
        Ok(run)
    }

    /// The calling CPU stops running vCPU `idx`; these SGIs it took are still
    /// pending.
    pub fn leave(&mut self, idx: u64, sgis: u16) {
        if let Ok(vcpu) = self.vcpu(idx)
            && vcpu.running
        {
            vcpu.running = false;
            vcpu.sgis.add(sgis);
        }
    }

    /// The host answers the CPU_ON that vCPU `idx` made: unless it was carried
    /// out the target is off again.
    pub fn cpu_on_answered(&mut self, idx: u64, result: u64) {
        let Ok(vcpu) = self.vcpu(idx) else { return };
        let Some(target) = vcpu.starting.take() else { return };
        if result != 0
            && let Ok(target) = self.vcpu(u64::from(target))
            && matches!(target.power, Power::Pending(_))
        {
            target.power = Power::Off;
        }
    }

    /// PSCI power state of the vCPU with this affinity.
    pub fn power(&self, affinity: u64) -> Option<Power> {
        self.vcpus.get(self.by_affinity(affinity)?).map(|vcpu| vcpu.power)
    }

    fn by_affinity(&self, affinity: u64) -> Option<usize> {
        (0..self.config.max_vcpus)
            .find(|i| mpidr_affinity(*i) == affinity)
            .map(index)
            .filter(|i| self.vcpus.get(*i).is_some_and(|vcpu| vcpu.exists))
    }

    /// PSCI CPU_ON by vCPU `caller`: the target starts at `boot` at its next
    /// run, whatever the host says (T17).
    ///
    /// # Errors
    /// As PSCI has it, for a target that is not off or not there.
    pub fn cpu_on(&mut self, caller: u64, affinity: u64, boot: Boot) -> Result<(), psci::Error> {
        let target = self.by_affinity(affinity).ok_or(psci::Error::InvalidParameters)?;
        let vcpu = self.vcpus.get_mut(target).ok_or(psci::Error::InvalidParameters)?;
        vcpu.power.turn_on(boot)?;
        if let Ok(caller) = self.vcpu(caller) {
            caller.starting = u8::try_from(target).ok();
        }
        Ok(())
    }

    /// PSCI CPU_OFF by vCPU `idx`.
    pub fn cpu_off(&mut self, idx: u64) {
        if let Ok(vcpu) = self.vcpu(idx) {
            vcpu.power = Power::Off;
        }
    }

    /// One step of a reset: scrubs private pages and gives them back, then
    /// opens the launch again.
    ///
    /// # Errors
    /// [`Error::Busy`] while a vCPU runs, [`Error::Again`] while there is more,
    /// [`Error::State`] if there is no VM or it is being destroyed.
    pub fn reset(&mut self, m: &impl Machine) -> Result<(), Error> {
        if matches!(self.phase, Phase::Free | Phase::Destroying) {
            return Err(Error::State);
        }
        self.scrub(m, Phase::Resetting)?;
        for vcpu in self.existing() {
            let Vcpu { context, run_page, .. } = *vcpu;
            *vcpu = Vcpu { exists: true, context, run_page, ..Vcpu::NONE };
        }
        self.phase = Phase::Open;
        Ok(())
    }

    fn scrub(&mut self, m: &impl Machine, phase: Phase) -> Result<(), Error> {
        if self.vcpus.iter().any(|vcpu| vcpu.running) && !left_out!(VmBusy) {
            return Err(Error::Busy);
        }
        if self.phase != phase {
            self.phase = phase;
            self.devices = Range::default();
            self.guards = [Range::default(); MAX_GUARDS];
            (self.launch, self.digest) = (Launch::NEW, [0; 32]);
            self.map.begin_teardown(m.hw());
        }
        self.map.teardown(m, MAX_PAGES_PER_CALL, |page| wipe_to_host(m, page))
    }

    /// One step of a destruction. `free_context` gets the contexts of the vCPUs.
    ///
    /// # Errors
    /// [`Error::State`] if there is no VM, [`Error::Busy`] while a vCPU runs,
    /// [`Error::Again`] while there is more.
    pub fn destroy(
        &mut self,
        m: &impl Machine,
        mut free_context: impl FnMut(u16),
    ) -> Result<(), Error> {
        if self.phase == Phase::Free {
            return Err(Error::State);
        }
        self.scrub(m, Phase::Destroying)?;
        for _ in 0..MAX_PAGES_PER_CALL {
            let Some(page) = self.map.take_from_pool(m) else { break };
            wipe_to_host(m, page);
        }
        if self.map.pool_len() != 0 {
            return Err(Error::Again);
        }
        let owner = Owner::RunPage(self.slot);
        for vcpu in self.existing() {
            free_context(vcpu.context);
            if let Ok(page) = m.pages().claim(vcpu.run_page, owner) {
                m.pages().relabel(page, Owner::Host);
            }
            *vcpu = Vcpu::NONE;
        }
        self.ram = [Range::default(); MAX_RAM_RANGES];
        self.seal = Seal::new([0; 32]);
        self.phase = Phase::Free;
        Ok(())
    }

    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.iter().filter(|vcpu| vcpu.exists).count()
    }
}

#[cfg(test)]
pub(crate) mod tests;
