//! The guests of the configuration: all are loaded, then each runs on the CPU that it has for
//! itself, and those that have none run one after the other on the bootstrap processor. What
//! follows an end is the guest's policy, or the operator's command. Each guest is loaded and run by
//! [`live`] on its CPU, as [`registry`] says that it is wanted.

use super::registry::{Follows, Wanted};
use super::statistics::Exits;
use super::{log, processors, registry};
use crate::arch::cpu;
use crate::devices::Clock;
use crate::devices::chipset::ChipsetConfig;
use crate::host::cpus::{self, Work};
use crate::host::memory;
use crate::host::memory::frames::{ALIGN_2M, FrameRange};
use crate::host::time;
use crate::vcpu::{End, SetupError, Vcpu};
use crate::vm::acpi;
use crate::vm::boot::{self, BootError, EntryState, Images, Machine, Module, multiboot};
use crate::vm::fw_cfg;
use crate::vm::machine::{Host, Vm};
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::MemoryMap;
use crate::vm::slots::SlotKind;
use crate::vmx::entry::Statistics;
use crate::vmx::ept::EptError;
use crate::vmx::memory_type::Mtrrs;
use crate::vmx::operation::Vmx;
use crate::vmx::vpid::{Vpid, VpidAllocator};
use ::log::{error, info, warn};
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use spin::{Mutex, Once};
use vireo_handoff::BootInfo;
use vireo_handoff::config::{self, Config, Policy};
use vireo_handoff::layout::DIRECT_MAP;

/// Why a guest could not start.
#[derive(Debug)]
enum StartError {
    NotEnoughMemory { needed: u64, largest_free: u64 },
    NoSuchFile,
    NoSuchCpu(u32),
    CpuWithoutVtx(usize),
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
            Self::NoSuchCpu(number) => {
                write!(
                    f,
                    "`cpus` in vireo.toml names CPU {number}, and the machine has these:"
                )?;
                cpus::all().try_for_each(|cpu| write!(f, " {}", cpu.number))
            }
            Self::CpuWithoutVtx(number) => write!(f, "CPU {number} has no VT-x"),
            Self::NoSuchFile => f.write_str("an image that the configuration names was not loaded"),
            Self::Tables(error) => write!(f, "its tables do not fit into its memory: {error:?}"),
            Self::Boot(error) => error.fmt(f),
            Self::Ept(error) => write!(f, "no extended page tables: {error:?}"),
            Self::Setup(error) => error.fmt(f),
        }
    }
}

/// Guests that run on CPUs of their own. Whoever finds that there are none needs to see
/// nothing else of theirs.
static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// The bootstrap processor loads or runs a guest. No other memory is read because of it.
static BOOTSTRAP_RUNS: AtomicBool = AtomicBool::new(false);
static VPIDS: Mutex<VpidAllocator> = Mutex::new(VpidAllocator::new());

/// What the loader has left, as long as a guest may have to be loaded again.
static BOOT: Once<&'static BootInfo> = Once::new();

/// The shortest time from one start of a guest to the next by its policy, as a part of a second:
/// one that crashes at once does not keep its CPU busy.
const STARTS_A_SECOND: u64 = 1;

/// Runs every guest to its end, and says how each ended or why it did not start.
pub fn run_all(boot: &'static BootInfo, vmx: Vmx) {
    for config in &boot.config.vm {
        let registered = registry::add(config);
        match Loaded::new(boot, &registered) {
            Ok(guest) => registered.created(guest),
            Err(reason) => cannot_start(&registered, &reason),
        }
    }
    if may_load_again(&boot.config) {
        BOOT.call_once(|| boot);
    } else {
        // SAFETY: here and only here; what was loaded was copied, and `BOOT` is never set.
        unsafe { memory::release_files(boot) };
    }

    for registered in registry::all() {
        if registered.want_to_start() {
            hand_over(&registered);
        }
    }
    loop {
        if let Some(registered) = registry::wanted_here() {
            BOOTSTRAP_RUNS.store(true, Ordering::Relaxed);
            live(&registered, vmx);
            BOOTSTRAP_RUNS.store(false, Ordering::Relaxed);
            super::console::attend();
        } else if RUNNING.load(Ordering::Relaxed) > 0 || registry::any_created() {
            // The end of a guest on another CPU is a kick, and a command is an interrupt of the UART.
            cpu::wait_for_interrupt();
        } else {
            return;
        }
    }
}

/// Whether guests of this configuration may be started again: by their policy, or by the
/// operator while another one runs.
fn may_load_again(config: &Config) -> bool {
    let restarts = |vm: &config::Vm| [vm.on_reboot, vm.on_crash].contains(&Policy::Restart);
    config.vm.len() > 1 || config.vm.iter().any(restarts)
}

/// Why a guest cannot be loaded again.
pub const NOT_KEPT: &str =
    "its images are not kept; set on_reboot or on_crash to \"restart\" in vireo.toml";

/// Whether there is what it needs to load a guest again.
pub fn may_start_again() -> bool {
    BOOT.get().is_some()
}

/// Whether a guest that is wanted on the bootstrap processor waits for another one's end.
pub fn bootstrap_is_busy() -> bool {
    BOOTSTRAP_RUNS.load(Ordering::Relaxed)
}

/// Has the CPU of a guest that is wanted see to it. Waits for nothing, and says nothing: the
/// operator's line may be locked.
pub fn hand_over(guest: &Arc<registry::Guest>) {
    // The bootstrap processor looks by itself, after the interrupt that this comes from.
    let Some(cpu) = guest.own_cpu() else {
        return;
    };
    RUNNING.fetch_add(1, Ordering::Relaxed);
    let guest = Arc::clone(guest);
    let work: Work = Box::new(move |cpu| {
        match processors::vmx(cpu) {
            Some(vmx) => live(&guest, vmx),
            None => cannot_start(&guest, &StartError::CpuWithoutVtx(cpu.number)),
        }
        RUNNING.fetch_sub(1, Ordering::Relaxed);
        if let Some(bootstrap) = cpus::get(cpus::BOOTSTRAP) {
            bootstrap.kick();
        }
    });
    if cpu.give(work).is_err() {
        // The same was asked of it before, and it has not come to it: the CPU is this guest's.
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Says why a guest does not start.
fn cannot_start(guest: &registry::Guest, reason: &StartError) {
    error!("vm {}: {reason}", guest.config().name);
    guest.ended(reason);
}

/// Does on this CPU what is wanted of a guest, until that is nothing more: loads it, and runs it
/// to its end.
fn live(registered: &Arc<registry::Guest>, vmx: Vmx) {
    while let Some(Wanted { loaded, start }) = registered.take_wanted() {
        let started = cpu::rdtsc();
        let loaded = match (loaded, BOOT.get()) {
            (Some(loaded), _) => Ok(*loaded),
            (None, Some(boot)) => Loaded::new(boot, registered),
            (None, None) => Err(StartError::NoSuchFile),
        };
        let end = match loaded {
            Ok(loaded) if !start => {
                registered.created(loaded);
                continue;
            }
            Ok(loaded) => loaded.run(registered, vmx),
            Err(reason) => Err(reason),
        };
        let end = match end {
            Ok(end) => end,
            Err(reason) => {
                cannot_start(registered, &reason);
                continue;
            }
        };
        let (end, follows) = registered.follows(end);
        let again = follows != Follows::Nothing && may_start_again();
        let and = if again { ", and is started again" } else { "" };
        info!(target: log::ALWAYS, "vm {}: {end}{and}", registered.config().name);
        if again {
            registered.set_again();
        }
        registered.ended(&end);
        while again
            && follows == Follows::StartLater
            && cpu::rdtsc().wrapping_sub(started) < time::tsc_hz() / STARTS_A_SECOND
        {
            time::arm(time::tsc_hz() / 100);
            cpu::wait_for_interrupt();
        }
        if again && !registered.want_again() {
            let name = &registered.config().name;
            info!(target: log::ALWAYS, "vm {name}: {}", End::Stopped);
        }
    }
}

/// Says what memory is in use, once.
fn tell_memory() {
    static TOLD: Once = Once::new();
    TOLD.call_once(|| {
        let guests = registry::memory();
        let own = memory::usage().saturating_sub(guests);
        info!(
            target: log::ALWAYS,
            "memory: {} KiB hypervisor, {} KiB guests",
            own.div_ceil(1024),
            guests / 1024
        );
    });
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
pub struct Loaded {
    config: &'static config::Vm,
    memory: GuestMemory,
    map: MemoryMap,
    entry: EntryState,
    block: Block,
}

impl Loaded {
    /// Takes the guest's memory and fills it.
    fn new(boot_info: &BootInfo, registered: &registry::Guest) -> Result<Self, StartError> {
        let config = registered.config();
        if let Some(&number) = config.cpus.first()
            && cpus::get(number as usize).is_none()
        {
            return Err(StartError::NoSuchCpu(number));
        }
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
        let modules: Result<Vec<Module>, StartError> = config
            .modules
            .iter()
            .map(|module| {
                Ok(Module {
                    bytes: file(boot_info, &module.file)?,
                    cmdline: multiboot::with_name(&module.file, &module.cmdline),
                })
            })
            .collect();
        let images = Images {
            kernel,
            name: &config.kernel,
            initrd,
            modules: modules?,
            cmdline: &config.cmdline,
            protocol: config.protocol,
        };
        let machine = Machine {
            memory: &memory,
            map: &map,
            rsdp,
        };
        let entry = boot::load(&images, &machine).map_err(StartError::Boot)?;
        Ok(Self {
            config,
            memory,
            map,
            entry,
            block,
        })
    }

    /// Runs the guest to its end on this CPU.
    fn run(self, registered: &registry::Guest, vmx: Vmx) -> Result<End, StartError> {
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
            test_device: config.test_device,
            fw_cfg: fw_cfg::describe(&map, config.vcpus, None),
        };
        let width = address_width();
        let vm = Vm::new(
            config,
            memory,
            registered.console(),
            registered.control(),
            &chipset,
            Clock::new(time::tsc_hz()),
            Host {
                capabilities: &vmx.capabilities,
                address_width: width,
                mtrrs: host_mtrrs(width),
            },
        )
        .map_err(StartError::Ept)?;
        let vpid = VPIDS.lock().allocate().unwrap_or(Vpid::HOST);
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
                tell_memory();
                let (memory, tier) = (config.memory >> 20, vcpu.apic_tier());
                let number = registered
                    .own_cpu()
                    .map_or(cpus::BOOTSTRAP, |cpu| cpu.number);
                info!(
                    target: log::ALWAYS,
                    "vm {}: started, {memory} MiB, APIC {tier}, CPU {number}",
                    config.name
                );
                registered.started(tier, stack.statistics());
                log::quiet(true);
                #[cfg(feature = "count-vmcs")]
                crate::vmx::count::reset();
                let end = vcpu.run(&mut stack, &entry);
                log::quiet(false);
                tell_exits(&config.name, &statistics);
                end
            })
            .map_err(StartError::Setup);
        VPIDS.lock().free(vpid);
        result
    }
}

/// How many VPIDs guests have.
pub fn vpids_in_use() -> usize {
    VPIDS.lock().in_use()
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
