//! The guests of the configuration: all are loaded, then they run one after
//! the other on the boot processor.

use super::statistics::Exits;
use crate::devices::Clock;
use crate::devices::chipset::ChipsetConfig;
use crate::host::memory;
use crate::host::memory::frames::{ALIGN_2M, FrameRange};
use crate::host::time;
use crate::vcpu::{End, SetupError, Vcpu};
use crate::vm::acpi;
use crate::vm::boot::{self, BootError, EntryState};
use crate::vm::machine::{Host, Vm};
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::MemoryMap;
use crate::vm::slots::SlotKind;
use crate::vmx::entry::Statistics;
use crate::vmx::ept::EptError;
use crate::vmx::memory_type::Mtrrs;
use crate::vmx::operation::Vmx;
use crate::vmx::vpid::{Vpid, VpidAllocator};
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use log::{error, info, warn};
use vireo_handoff::layout::DIRECT_MAP;
use vireo_handoff::{BootInfo, config};

/// Why a guest could not start.
#[derive(Debug)]
enum StartError {
    NotEnoughMemory { needed: u64, largest_free: u64 },
    NoSuchFile,
    Tables(OutOfSlot),
    Boot(BootError),
    Ept(EptError),
    Setup(SetupError),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEnoughMemory {
                needed,
                largest_free,
            } => write!(
                f,
                "needs {} MiB of contiguous memory, and only {} MiB are free; lower `memory` in vireo.toml or add memory to the machine",
                needed >> 20,
                largest_free >> 20
            ),
            Self::NoSuchFile => f.write_str("an image that the configuration names was not loaded"),
            Self::Tables(error) => write!(f, "its tables do not fit into its memory: {error:?}"),
            Self::Boot(error) => error.fmt(f),
            Self::Ept(error) => write!(f, "no extended page tables: {error:?}"),
            Self::Setup(error) => error.fmt(f),
        }
    }
}

/// Runs every guest to its end, and says how each ended or why it did not start.
pub fn run_all(boot: &BootInfo, vmx: Vmx) {
    let mut guests = Vec::new();
    for config in &boot.config.vm {
        match Loaded::new(boot, config) {
            Ok(guest) => guests.push(guest),
            Err(reason) => error!("vm {}: {reason}", config.name),
        }
    }
    // SAFETY: here and only here; what was loaded was copied.
    unsafe { memory::release_files(boot) };

    let mut loaded: u64 = guests.iter().map(|guest| guest.config.memory).sum();
    let mut told = false;
    let mut vpids = VpidAllocator::new();
    for guest in guests {
        let config = guest.config;
        let result = guest.run(vmx, &mut vpids, || {
            if !told {
                tell_memory(loaded);
                told = true;
            }
        });
        loaded -= config.memory;
        match result {
            Ok(end) => info!("vm {}: {end}", config.name),
            Err(reason) => error!("vm {}: {reason}", config.name),
        }
    }
}

/// Says what memory is in use, of which `guests` bytes are guests'.
fn tell_memory(guests: u64) {
    let own = memory::usage().saturating_sub(guests);
    info!(
        "memory: {} KiB hypervisor, {} KiB guests",
        own.div_ceil(1024),
        guests / 1024
    );
}

/// A guest's memory, given back when it is gone.
struct Block(FrameRange);

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `Loaded::new`; the VM that used it is dropped before.
        let freed = unsafe { memory::free(self.0) };
        debug_assert!(freed.is_ok());
    }
}

/// A guest that is ready to start. Fields are dropped in their order.
struct Loaded<'a> {
    config: &'a config::Vm,
    memory: GuestMemory,
    map: MemoryMap,
    entry: EntryState,
    block: Block,
}

impl<'a> Loaded<'a> {
    /// Takes the guest's memory and fills it.
    fn new(boot_info: &BootInfo, config: &'a config::Vm) -> Result<Self, StartError> {
        let frames =
            memory::allocate(config.memory >> 12, ALIGN_2M).ok_or(StartError::NotEnoughMemory {
                needed: config.memory,
                largest_free: memory::largest_free(ALIGN_2M),
            })?;
        let block = Block(frames);
        let map = MemoryMap::new(block.0.start, config.memory);
        let memory = GuestMemory::new(map.slots(), DIRECT_MAP);
        for slot in memory.slots().iter() {
            let contents = match slot.kind {
                SlotKind::Ram => 0,
                SlotKind::Rom => 0xff,
            };
            memory
                .fill(slot.start, slot.len, contents)
                .map_err(StartError::Tables)?;
        }
        let rsdp = acpi::write(&memory, config.vcpus).map_err(StartError::Tables)?;
        let kernel = file(boot_info, &config.kernel)?;
        let initrd = match &config.initrd {
            Some(name) => Some(file(boot_info, name)?),
            None => None,
        };
        let entry = boot::load(kernel, initrd, &config.cmdline, &memory, &map, rsdp)
            .map_err(StartError::Boot)?;
        Ok(Self {
            config,
            memory,
            map,
            entry,
            block,
        })
    }

    /// Runs the guest to its end; `ready` is called when all is there that it needs.
    fn run(
        self,
        vmx: Vmx,
        vpids: &mut VpidAllocator,
        ready: impl FnOnce(),
    ) -> Result<End, StartError> {
        let Self {
            config,
            memory,
            map,
            entry,
            block: _block,
        } = self;
        let chipset = ChipsetConfig {
            wall_clock: time::rtc::unix_seconds().unwrap_or(0),
            ram_below_4g: map.ram_below_4g(),
            ram_above_4g: map.ram_above_4g(),
            io_apic_id: config.vcpus as u8,
        };
        let width = address_width();
        let vm = Vm::new(
            config,
            memory,
            &chipset,
            Clock::new(time::tsc_hz()),
            Host {
                capabilities: &vmx.capabilities,
                address_width: width,
                mtrrs: host_mtrrs(width),
            },
        )
        .map_err(StartError::Ept)?;
        let vpid = vpids.allocate().unwrap_or(Vpid::HOST);
        let result = Vcpu::new(Arc::new(vm), 0, vmx, vpid, &entry)
            .map(|(mut vcpu, mut stack)| {
                let statistics = stack.statistics();
                if config.statistics == config::Statistics::Times
                    && statistics.record_times(true).is_err()
                {
                    warn!(
                        "vm {}: no memory is left for the times of its exits",
                        config.name
                    );
                }
                ready();
                let (memory, tier) = (config.memory >> 20, vcpu.apic_tier());
                info!("vm {}: started, {memory} MiB, APIC {tier}", config.name);
                super::log::quiet(true);
                #[cfg(feature = "count-vmcs")]
                crate::vmx::count::reset();
                let end = vcpu.run(&mut stack, &entry);
                super::log::quiet(false);
                tell_exits(&config.name, &statistics);
                end
            })
            .map_err(StartError::Setup);
        vpids.free(vpid);
        result
    }
}

/// Says how often a guest has exited, and what that took where it was recorded.
fn tell_exits(vm: &str, statistics: &Statistics<Vcpu>) {
    let exits = Exits::new(&statistics.counts(), statistics.times());
    info!("vm {vm}: {}", exits.line());
    if exits.timed() {
        let (ticks, hz) = (exits.ticks(), time::tsc_hz());
        info!("vm {vm}: {ticks} ticks in root mode, of {hz} a second");
        for line in exits.table().to_string().lines() {
            info!("{line}");
        }
    }
}

fn file<'a>(boot: &'a BootInfo, name: &str) -> Result<&'a [u8], StartError> {
    memory::file(boot, name).ok_or(StartError::NoSuchFile)
}

/// The CPU's physical-address width, in bits.
fn address_width() -> u32 {
    crate::arch::cpu::cpuid()
        .get_processor_capacity_feature_info()
        .map_or(36, |info| info.physical_address_bits().into())
}

/// The memory types that the firmware set up; without MTRRs everything is uncacheable.
fn host_mtrrs(width: u32) -> Mtrrs {
    let has_mtrrs = crate::arch::cpu::cpuid()
        .get_feature_info()
        .is_some_and(|info| info.has_mtrr());
    Mtrrs::read(width, |number| {
        if has_mtrrs {
            crate::arch::msr::try_read(number).unwrap_or(0)
        } else {
            0
        }
    })
}
