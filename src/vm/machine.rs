//! A guest as a whole: what all its vCPUs share.

use super::console::ConsolePort;
use super::control::{Control, Request};
use super::mailbox::{Events, Mailbox, Place};
use super::memory::GuestMemory;
use super::memory_map::TEXT_MEMORY;
use super::screen;
use super::slots::{SlotKind, Slots};
use super::stillness::Stillness;
use crate::addr::{Gpa, Hpa, Hva, PAGE_SIZE};
use crate::devices::chipset::{Chipset, ChipsetConfig};
use crate::devices::vga::CELLS;
use crate::devices::{Clock, Ticks, pc};
use crate::host::memory::paging;
use crate::vmx::capability::Capabilities;
use crate::vmx::ept::{Ept, EptError, EptPointer, Invalidation, PageSize, Permissions};
use crate::vmx::ept_frames::HostFrames;
use crate::vmx::memory_type::{MemoryType, Mtrrs};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use spin::Mutex;
use vireo_handoff::config::{self, ApicMode};

/// One guest.
pub struct Vm {
    pub name: String,
    mailboxes: Arc<[Arc<Mailbox>]>,
    pub stillness: Stillness,
    /// Who is to be the vCPUs' local APIC.
    pub apic: ApicMode,
    /// Those have the x2APIC mode, and each the identifier that is the vCPU's number for good.
    pub x2apic: bool,
    pub memory: GuestMemory,
    pub chipset: Mutex<Chipset>,
    pub signals: Signals,
    /// Held by a vCPU whose locked instruction on a device is emulated.
    pub bus_lock: Mutex<()>,
    pub console: Arc<ConsolePort>,
    pub control: Arc<Control>,
    /// Ticks a second of the guest's time-stamp counter.
    pub clock: Clock,
    /// Nanoseconds since 1970 when the VM was switched on.
    pub wall_clock: u64,
    /// The host's time-stamp counter when the VM was switched on: its tick 0.
    pub started: u64,
    ept: Mutex<Ept<HostFrames>>,
    apic_access: Box<ApicAccessPage>,
    /// How many vCPUs have that page mapped.
    apic_access_users: Mutex<u32>,
    mtrrs: Mtrrs,
    /// The memory type of everything behind the slots, where that is one: mostly.
    memory_type: Option<MemoryType>,
    large_code: bool,
}

/// What the chipset wants, as it was when somebody last let go of it: a vCPU looks
/// here, without the lock, before it takes that.
///
/// Written with the chipset locked, so no value is older than the state that the
/// next owner of the lock finds; no other memory is read because of one, so that
/// relaxed accesses are enough.
#[derive(Debug, Default)]
pub struct Signals {
    intr: AtomicBool,
    deadline: AtomicU64,
}

impl Signals {
    /// Shows what `chipset` wants: what [`Signals::intr`] and [`Signals::deadline`] are now.
    #[inline(always)]
    pub fn publish(&self, chipset: &Chipset) -> (bool, Ticks) {
        let (intr, due) = (chipset.intr(), chipset.due());
        self.intr.store(intr, Ordering::Relaxed);
        self.deadline.store(due.0, Ordering::Relaxed);
        (intr, due)
    }

    /// INTR, the 8259s' output.
    #[inline]
    pub fn intr(&self) -> bool {
        self.intr.load(Ordering::Relaxed)
    }

    /// When the chipset has to be brought up to date: at tick 0 when it has messages
    /// for the local APICs, at the end of time when it waits for nothing.
    #[inline]
    pub fn deadline(&self) -> Ticks {
        Ticks(self.deadline.load(Ordering::Relaxed))
    }
}

/// What is mapped where the guest has its local APIC's registers. The CPU tells accesses
/// by its address, and leaves it alone.
#[repr(align(4096))]
struct ApicAccessPage {
    _unread: [u8; 4096],
}

/// What ties a guest to the rest of the machine.
pub struct Links<'a> {
    pub console: Arc<ConsolePort>,
    pub control: Arc<Control>,
    /// Where its vCPUs run.
    pub places: &'a [&'static Place],
}

/// What a guest's memory depends on in the host.
pub struct Host<'a> {
    pub capabilities: &'a Capabilities,
    /// Bits of a physical address.
    pub address_width: u32,
    /// As the firmware set them up.
    pub mtrrs: Mtrrs,
    /// Large pages may hold code: see [`errata`](crate::arch::errata).
    pub large_code: bool,
}

/// Why a page could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapped {
    /// No slot has this address, or it is ROM and written: a device, or nothing.
    NoSlot,
    Ept(EptError),
}

impl Vm {
    /// A guest with this memory, an empty EPT, and a vCPU at each place.
    ///
    /// # Errors
    /// When no frame is left for the EPT.
    pub fn new(
        config: &config::Vm,
        guest_memory: GuestMemory,
        links: Links<'_>,
        chipset: &ChipsetConfig,
        clock: Clock,
        host: Host<'_>,
    ) -> Result<Self, EptError> {
        let memory_type = memory_type_of_all(guest_memory.slots(), &host.mtrrs);
        Ok(Self {
            name: config.name.clone(),
            mailboxes: links
                .places
                .iter()
                .zip(0..)
                .map(|(place, id)| Arc::new(Mailbox::new(place, id)))
                .collect(),
            stillness: Stillness::default(),
            apic: config.apic,
            x2apic: config.x2apic,
            memory: guest_memory,
            chipset: Mutex::new(Chipset::new(clock, Ticks(0), chipset)),
            signals: Signals::default(),
            bus_lock: Mutex::new(()),
            console: links.console,
            control: links.control,
            clock,
            wall_clock: chipset
                .wall_clock
                .saturating_mul(crate::devices::clock::NANOS),
            started: crate::arch::cpu::rdtsc(),
            ept: Mutex::new(Ept::new(
                HostFrames,
                host.capabilities.ept_vpid,
                host.address_width,
            )?),
            apic_access: Box::new(ApicAccessPage { _unread: [0; 4096] }),
            apic_access_users: Mutex::default(),
            mtrrs: host.mtrrs,
            memory_type,
            large_code: host.large_code,
        })
    }

    /// How many vCPUs it has.
    #[inline]
    pub fn vcpus(&self) -> u32 {
        self.mailboxes.len() as u32
    }

    /// The mailboxes of the vCPUs, by their numbers.
    pub fn mailboxes(&self) -> Arc<[Arc<Mailbox>]> {
        Arc::clone(&self.mailboxes)
    }

    /// The mailbox of the vCPU `id`.
    #[inline]
    pub fn mailbox(&self, id: u32) -> &Arc<Mailbox> {
        &self.mailboxes[id as usize]
    }

    /// Has all vCPUs end.
    pub fn end(&self) {
        self.control.ask(Request::STOP);
        Mailbox::post_to_all(&self.mailboxes, Events::REQUEST);
    }

    /// Whether it ends.
    pub fn is_ending(&self) -> bool {
        self.control.asked().contains(Request::STOP)
    }

    /// A vCPU has become deaf: whether none of them will ever go on.
    pub fn is_still(&self) -> bool {
        let has_mail = || self.mailboxes.iter().any(|mailbox| mailbox.has_mail());
        self.stillness.add(self.vcpus(), has_mail) && !self.chipset.lock().sends_unmaskable()
    }

    /// Moves what COM1 still holds to the console of a guest that has ended. False where that
    /// has not shown everything yet.
    pub fn drain_console(&self) -> bool {
        let unknown = self
            .chipset
            .lock()
            .serial_output(|output| self.console.send(output));
        if unknown {
            crate::host::console::attend();
        }
        self.console.unsent() == 0
    }

    /// What its screen shows.
    pub fn screen(&self) -> String {
        let Some(mode) = self.chipset.lock().text_mode() else {
            return "the screen shows graphics, not text\n".into();
        };
        let mut shown = vec![0; usize::from(CELLS) * 2];
        // There is always memory.
        let _ = self.memory.read(Gpa(TEXT_MEMORY), &mut shown);
        screen::text(mode, &shown)
    }

    /// Whether there is firmware at the reset vector.
    pub fn has_firmware(&self) -> bool {
        self.memory.slots().find(Gpa(0xffff_fff0)).is_some()
    }

    /// The EPT pointer for the VMCS.
    ///
    /// # Errors
    /// When the CPU's capabilities allow none.
    pub fn ept_pointer(&self) -> Result<EptPointer, EptError> {
        self.ept.lock().pointer()
    }

    /// The APIC-access page: its contents never matter.
    pub fn apic_access_page(&self) -> Hva {
        Hva((&raw const *self.apic_access) as u64)
    }

    /// Maps the APIC-access page for a vCPU that has its local APIC at [`pc::LOCAL_APIC_BASE`];
    /// false where that is not possible. Elsewhere it is never mapped: tables for wherever guests
    /// move their APICs to would have no end.
    pub fn map_apic_access(&self) -> bool {
        let Some(page) = paging::to_phys(self.apic_access_page()) else {
            return false;
        };
        let gpa = Gpa(pc::LOCAL_APIC_BASE);
        // A fetch is an EPT violation: Bochs panics where it is an APIC-access exit.
        let data = Permissions::READ | Permissions::WRITE;
        let mut users = self.apic_access_users.lock();
        let mapped = *users != 0
            || self.memory.slots().find(gpa).is_none()
                && self
                    .ept
                    .lock()
                    .map(gpa, page, PageSize::Size4K, data, MemoryType::WriteBack)
                    .is_ok();
        *users += u32::from(mapped);
        mapped
    }

    /// A vCPU no longer has its local APIC there. The last that had has the page taken away,
    /// and the others told to drop what their CPUs have cached of it; the caller does so itself.
    pub fn unmap_apic_access(&self) {
        let mut users = self.apic_access_users.lock();
        *users = users.saturating_sub(1);
        if *users != 0 {
            return;
        }
        let unmapped = self.ept.lock().unmap(Gpa(pc::LOCAL_APIC_BASE), PAGE_SIZE);
        debug_assert!(unmapped.is_ok());
        drop(users);
        for mailbox in self.mailboxes.iter().filter(|_| self.vcpus() > 1) {
            mailbox.post(Events::MEMORY);
        }
    }

    /// Maps all memory, for reading and execution.
    ///
    /// # Errors
    /// When no frame is left for a table.
    pub fn map_all(&self) -> Result<(), EptError> {
        for slot in self.memory.slots().iter() {
            let mut at = slot.start;
            while at.0 - slot.start.0 < slot.len {
                match self.map_page(at, false, true) {
                    Ok(()) | Err(Unmapped::NoSlot) => {}
                    Err(Unmapped::Ept(error)) => return Err(error),
                }
                let page = self.ept.lock().translate(at);
                let size = page.map_or(PAGE_SIZE, |page| page.size.bytes());
                at = Gpa(at.align_down(size).0 + size);
            }
        }
        Ok(())
    }

    /// Maps the page of `gpa`, as large as its slot, the alignment and the
    /// host's memory types allow, for a read, a `write` or to `execute`.
    ///
    /// # Errors
    /// When there is no slot that allows the access, or no frame for a table.
    pub fn map_page(&self, gpa: Gpa, write: bool, execute: bool) -> Result<(), Unmapped> {
        let mut ept = self.ept.lock();
        // What has been divided stays so: to replace its table all CPUs would have to forget it.
        let page = self
            .page(&ept, gpa, write, |size| !ept.is_divided(gpa, size))
            .ok_or(Unmapped::NoSlot)?;
        let mapped = ept.translate(gpa).map(|found| found.permissions);
        // Another vCPU may have done it meanwhile.
        let wanted = if execute {
            Permissions::EXECUTE
        } else {
            page.permissions
        };
        if mapped.is_some_and(|mapped| mapped.contains(wanted)) {
            return Ok(());
        }
        // Nothing is invalidated: nothing is taken away, and what a CPU knows of a page that it may
        // not use so it forgets by itself (SDM 3, 29.4.3.1).
        let mut done = Ok(Invalidation::NotNeeded);
        if mapped.is_none() {
            done = ept.map(
                page.gpa,
                page.hpa,
                page.size,
                page.permissions,
                page.memory_type,
            );
        }
        let now = mapped.unwrap_or(page.permissions);
        if done.is_ok() && execute && !now.contains(Permissions::EXECUTE) {
            done = ept.protect_small(gpa, page.permissions | Permissions::EXECUTE);
        }
        done.map(|_| ()).map_err(Unmapped::Ept)
    }

    /// Takes away the mapping of the page of `gpa` where there is memory, as if nobody had
    /// touched it. The caller drops what its CPU has cached; what others have is still true.
    ///
    /// # Errors
    /// When no frame is left for a table.
    pub fn unmap_page(&self, gpa: Gpa) -> Result<(), EptError> {
        if self.memory.slots().find(gpa).is_none() {
            return Ok(());
        }
        let mut ept = self.ept.lock();
        ept.unmap(gpa.align_down(PAGE_SIZE), PAGE_SIZE).map(|_| ())
    }

    /// Does the same where no table is missing: what most EPT violations need. False, and
    /// nothing done, where more is to be done or it is an error.
    #[inline(never)]
    pub fn fill_page(&self, gpa: Gpa, write: bool) -> bool {
        let mut ept = self.ept.lock();
        self.page(&ept, gpa, write, |_| true).is_some_and(|page| {
            ept.fill(
                page.gpa,
                page.hpa,
                page.size,
                page.permissions,
                page.memory_type,
            )
        })
    }

    /// The largest page around `gpa` that `fits`; `None` where no slot allows the access.
    #[inline(always)]
    fn page(
        &self,
        ept: &Ept<HostFrames>,
        gpa: Gpa,
        write: bool,
        fits: impl Fn(PageSize) -> bool,
    ) -> Option<Page> {
        let slot = self.memory.slots().find(gpa)?;
        let permissions = match slot.kind {
            SlotKind::Ram => Permissions::all(),
            SlotKind::Rom if write => return None,
            SlotKind::Rom => Permissions::READ | Permissions::EXECUTE,
        };
        PageSize::LARGEST_FIRST.into_iter().find_map(|size| {
            let (gpa, hpa) = slot.page(gpa, size.bytes())?;
            if !ept.has_pages_of(size) || !fits(size) {
                return None;
            }
            let memory_type = self
                .memory_type_of(hpa, size)
                .or_else(|| (size == PageSize::Size4K).then_some(MemoryType::Uncacheable))?;
            let denied = if size == PageSize::Size4K || self.large_code {
                Permissions::empty()
            } else {
                Permissions::EXECUTE
            };
            Some(Page {
                gpa,
                hpa,
                size,
                permissions: permissions.difference(denied),
                memory_type,
            })
        })
    }

    /// The memory type of a whole page, if it has one.
    #[inline]
    fn memory_type_of(&self, page: Hpa, size: PageSize) -> Option<MemoryType> {
        self.memory_type
            .or_else(|| self.mtrrs.uniform(page, size.bytes()))
    }
}

/// A page as an entry of the EPT maps it.
struct Page {
    gpa: Gpa,
    hpa: Hpa,
    size: PageSize,
    permissions: Permissions,
    memory_type: MemoryType,
}

/// The memory type of everything behind `slots`, if that is one.
fn memory_type_of_all(slots: &Slots, mtrrs: &Mtrrs) -> Option<MemoryType> {
    let mut types = slots
        .iter()
        .map(|slot| mtrrs.uniform(slot.backing, slot.len));
    let first = types.next().flatten();
    first.filter(|_| types.all(|other| other == first))
}
