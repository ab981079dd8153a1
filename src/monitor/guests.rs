//! The guests of the configuration: all are loaded, then their vCPUs run side by side, each on
//! the CPU that it was given. What follows an end is the guest's policy, or the operator's
//! command.

use super::placement::{self, NoPlace};
use super::processors::{self, Processor};
use super::registry::{Follows, Wanted};
use super::scheduler::{Scheduler, Task};
use super::statistics::Exits;
use super::{log, registry};
use crate::addr::{Gpa, Hpa, PAGE_SIZE};
use crate::arch::cpu;
use crate::devices::Clock;
use crate::devices::chipset::ChipsetConfig;
use crate::devices::fw_cfg::FwCfg;
use crate::host::console;
use crate::host::cpus;
use crate::host::memory;
use crate::host::memory::frames::{ALIGN_2M, ALIGN_4K, FrameRange};
use crate::host::time;
use crate::vcpu::{End, SetupError, Vcpu};
use crate::vm::acpi;
use crate::vm::boot::{self, BootError, EntryState, Images, Machine, Module, multiboot};
use crate::vm::fw_cfg::{self, Kernel};
use crate::vm::machine::{Host, Links, Vm};
use crate::vm::memory::{GuestMemory, OutOfSlot};
use crate::vm::memory_map::MemoryMap;
use crate::vm::mp;
use crate::vm::slots::SlotKind;
use crate::vmx::ept::EptError;
use crate::vmx::memory_type::Mtrrs;
use crate::vmx::vpid::{Vpid, VpidAllocator};
use ::log::{error, info, warn};
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};
use spin::{Mutex, Once};
use vireo_handoff::BootInfo;
use vireo_handoff::config::{self, Config, Policy, Serial};
use vireo_handoff::layout::DIRECT_MAP;

/// Why a guest could not start.
#[derive(Debug)]
enum StartError {
    NotEnoughMemory { needed: u64, largest_free: u64 },
    NoSuchFile,
    Place(NoPlace),
    NoSecondSerialPort,
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
            Self::Place(error) => error.fmt(f),
            Self::NoSecondSerialPort => f.write_str(
                "`serial` in vireo.toml is \"com2\", and the machine has no second serial port",
            ),
            Self::NoSuchFile => f.write_str("an image that the configuration names was not loaded"),
            Self::Tables(error) => write!(f, "its tables do not fit into its memory: {error:?}"),
            Self::Boot(error) => error.fmt(f),
            Self::Ept(error) => write!(f, "no extended page tables: {error:?}"),
            Self::Setup(error) => error.fmt(f),
        }
    }
}

/// Guests that run, or whose CPU is to do something for them. Whoever finds that there are none
/// needs to see nothing else of theirs: relaxed.
static LEFT: AtomicUsize = AtomicUsize::new(0);
static VPIDS: Mutex<VpidAllocator> = Mutex::new(VpidAllocator::new());

/// What the loader has left, as long as a guest may have to be loaded again.
static BOOT: Once<&'static BootInfo> = Once::new();

/// The shortest time from one start of a guest to the next by its policy, as a part of a second:
/// one that crashes at once does not keep its CPU busy.
const STARTS_A_SECOND: u64 = 1;
/// The same, in times of how long it takes to load, in which no vCPU has its CPU.
const LOADING_TIMES: u64 = 10;
/// Bytes of a guest's memory that are filled with interrupts off: the UART's FIFO holds what comes
/// in a millisecond.
const PIECE: u64 = 32 << 10;
/// How often it is looked whether the line has shown all of an ended guest's console.
const LOOKS_A_SECOND: u64 = 1000;

/// Runs every guest to its end, and says how each ended or why it did not start.
pub fn run_all(boot: &'static BootInfo, bootstrap: &'static Processor) {
    if boot.config.vm.iter().any(|vm| vm.serial == Serial::Com2) {
        console::start_second();
    }
    let places = placement::place(&boot.config.vm, &processors::numbers());
    for (config, place) in boot.config.vm.iter().zip(places) {
        let (place, refused) = match place {
            Ok(numbers) => {
                let place = numbers.into_iter().filter_map(processors::get);
                (place.collect(), None)
            }
            Err(reason) => (Vec::new(), Some(StartError::Place(reason))),
        };
        let registered = registry::add(config, place);
        match refused.map_or_else(|| Loaded::new(boot, &registered), Err) {
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
    let guests = registry::all();
    let is_there = |name: &str| {
        let mut named = guests.iter().filter(|guest| guest.config().name == name);
        named.any(|guest| guest.is_created())
    };
    // The last first: those that wait for another one are not started before it is known that
    // this one is.
    for guest in guests.iter().rev() {
        match &guest.config().after {
            Some(name) if is_there(name) => guest.set_follower(),
            _ if guest.want_to_start() => hand_over(guest),
            _ => {}
        }
    }
    // Whoever is the last to end tells this CPU; where none has started, nobody does.
    bootstrap.place.tell();
    Scheduler::new(bootstrap).run(|| LEFT.load(Ordering::Relaxed) == 0 && !registry::any_created());
}

/// The bootstrap processor is to look whether there is anything left to do.
pub fn tell_bootstrap() {
    if let Some(bootstrap) = processors::get(cpus::BOOTSTRAP) {
        bootstrap.place.tell();
    }
}

/// Whether the images of this configuration may be needed again: guests may be started again by
/// their policy, or by the operator while another one runs, and firmware loads a kernel later.
fn may_load_again(config: &Config) -> bool {
    let restarts = |vm: &config::Vm| [vm.on_reboot, vm.on_crash].contains(&Policy::Restart);
    let loads_later = |vm: &config::Vm| vm.firmware.is_some() && vm.kernel.is_some();
    let needs = |vm: &config::Vm| restarts(vm) || loads_later(vm);
    config.vm.len() > 1 || config.vm.iter().any(needs)
}

/// Why a guest cannot be loaded again.
pub const NOT_KEPT: &str =
    "its images are not kept; set on_reboot or on_crash to \"restart\" in vireo.toml";

/// Whether there is what it needs to load a guest again.
pub fn may_start_again() -> bool {
    BOOT.get().is_some()
}

/// Has the CPU of a guest that is wanted see to it. Waits for nothing, and says nothing: the
/// operator's line may be locked.
pub fn hand_over(guest: &Arc<registry::Guest>) {
    if let Some(&first) = guest.processors().first() {
        LEFT.fetch_add(1, Ordering::Relaxed);
        let guest = Arc::clone(guest);
        first.give(Box::new(|_| see_to(guest)));
    }
}

/// What a [`hand_over`] has led to is over.
fn is_over() {
    if LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
        tell_bootstrap();
    }
    super::console::attend();
}

/// Says why a guest does not start.
fn cannot_start(guest: &registry::Guest, reason: &StartError) {
    error!("vm {}: {reason}", guest.config().name);
    guest.ended(reason);
}

/// This guest has ended for good; those that wait for that are started.
fn is_gone(gone: &registry::Guest) {
    for guest in registry::all() {
        let follows = guest.config().after.as_ref() == Some(&gone.config().name);
        if follows && guest.take_follower() && guest.want_to_start() {
            hand_over(&guest);
        }
    }
    is_over();
}

/// Does what is wanted of a guest: loads it, and has its vCPUs start.
fn see_to(guest: Arc<registry::Guest>) {
    let Some(Wanted { loaded, start }) = guest.take_wanted() else {
        return is_over();
    };
    let began = cpu::rdtsc();
    let loaded = match (loaded, BOOT.get()) {
        (Some(loaded), _) => Ok(*loaded),
        (None, Some(boot)) => Loaded::new(boot, &guest),
        (None, None) => Err(StartError::NoSuchFile),
    };
    let living = match loaded {
        Ok(loaded) if !start => {
            guest.created(loaded);
            return is_over();
        }
        Ok(loaded) => Living::new(Arc::clone(&guest), loaded, began),
        Err(reason) => Err(reason),
    };
    match living {
        Ok(living) => {
            let living = Arc::new(living);
            for (id, processor) in (0..).zip(guest.processors()) {
                let living = Arc::clone(&living);
                processor.give(Box::new(move |scheduler| join(scheduler, living, id)));
            }
        }
        Err(reason) => {
            cannot_start(&guest, &reason);
            is_gone(&guest);
        }
    }
}

/// A guest that runs: what its vCPUs share, and what is left of it when they have ended. Fields
/// are dropped in their order.
pub struct Living {
    registered: Arc<registry::Guest>,
    entry: EntryState,
    /// How it has ended: what the first vCPU says that ends.
    end: Once<Result<End, StartError>>,
    /// When its policy may start it again, by the time-stamp counter.
    again_from: u64,
    _quiet: log::Quiet,
    vm: Arc<Vm>,
    /// The memory of `vm`.
    _block: Block,
}

impl Living {
    /// One whose loading `began` at that tick.
    fn new(
        registered: Arc<registry::Guest>,
        loaded: Loaded,
        began: u64,
    ) -> Result<Self, StartError> {
        let processors = registered.processors();
        let Some(first) = processors.first() else {
            return Err(StartError::Place(NoPlace::NoneShared));
        };
        let config = registered.config();
        let chipset = ChipsetConfig {
            wall_clock: time::rtc::unix_seconds().unwrap_or(0),
            ram_below_4g: loaded.map.ram_below_4g(),
            ram_above_4g: loaded.map.ram_above_4g(),
            io_apic_id: config.vcpus as u8,
            test_device: config.test_device,
            firmware: config.firmware.is_some(),
            as_by_bios: loaded.entry.as_by_bios,
            fw_cfg: loaded.told,
        };
        let width = address_width();
        let places: Vec<_> = processors.iter().map(|own| &own.place).collect();
        let vm = Arc::new(
            Vm::new(
                config,
                loaded.memory,
                Links {
                    console: registered.console(),
                    control: registered.control(),
                    places: &places,
                },
                &chipset,
                Clock::new(time::tsc_hz()),
                Host {
                    capabilities: &first.vmx.capabilities,
                    address_width: width,
                    mtrrs: host_mtrrs(width),
                    large_code: first.vmx.large_code,
                },
            )
            .map_err(StartError::Ept)?,
        );
        registered.started(&vm);
        let now = cpu::rdtsc();
        let pause = LOADING_TIMES.saturating_mul(now.saturating_sub(began));
        Ok(Self {
            registered,
            entry: loaded.entry,
            end: Once::new(),
            again_from: now.saturating_add(pause.max(time::tsc_hz() / STARTS_A_SECOND)),
            _quiet: log::Quiet::new(),
            vm,
            _block: loaded.block,
        })
    }

    /// What it was made from.
    pub fn config(&self) -> &'static config::Vm {
        self.registered.config()
    }

    /// It ends; and so do its other vCPUs.
    fn end(&self, end: Result<End, StartError>) {
        self.end.call_once(|| end);
        self.vm.end();
    }
}

/// Makes vCPU `id` of a guest on this CPU.
fn join(scheduler: &mut Scheduler, living: Arc<Living>, id: u32) {
    if let Err(error) = make_vcpu(scheduler, &living, id) {
        living.end(Err(StartError::Setup(error)));
    }
    release(scheduler, living);
}

fn make_vcpu(scheduler: &mut Scheduler, living: &Arc<Living>, id: u32) -> Result<(), SetupError> {
    if living.vm.is_ending() {
        living.end(Ok(End::Stopped));
        return Ok(());
    }
    let config = living.config();
    let processor = scheduler.processor();
    scheduler.make_room();
    let vpid = VPIDS.lock().allocate().unwrap_or(Vpid::HOST);
    let entry = (id == 0).then_some(&living.entry);
    let shares_cpu = config.cpus.is_empty();
    let made = Vcpu::new(
        Arc::clone(&living.vm),
        id,
        processor.vmx,
        vpid,
        entry,
        shares_cpu,
    );
    let (vcpu, stack) = made.inspect_err(|_| VPIDS.lock().free(vpid))?;
    let statistics = stack.statistics();
    if config.statistics == config::Statistics::Times && statistics.record_times(true).is_err() {
        warn!(
            "vm {}: no memory is left for the times of its exits",
            config.name
        );
    }
    let tier = vcpu.apic_tier();
    living.registered.joined(tier, statistics);
    if id == 0 {
        tell_memory();
        let memory = config.memory >> 20;
        let places = living.registered.places();
        info!(
            target: log::ALWAYS,
            "vm {}: started, {memory} MiB, APIC {tier}, {places}",
            config.name
        );
        #[cfg(feature = "count-vmcs")]
        crate::vmx::count::reset();
    }
    scheduler.add(Task::new(vcpu, stack, Arc::clone(living)));
    Ok(())
}

/// A vCPU of a guest has ended.
pub(super) fn vcpu_ended(scheduler: &mut Scheduler, vcpu: Vcpu, living: Arc<Living>, end: End) {
    living.end(Ok(end));
    let vpid = vcpu.vpid();
    drop(vcpu);
    VPIDS.lock().free(vpid);
    release(scheduler, living);
}

/// Gives up a guest; whoever is the last to do so is left with what is to be done behind it.
fn release(scheduler: &mut Scheduler, living: Arc<Living>) {
    if let Some(living) = Arc::into_inner(living) {
        conclude(scheduler, living);
    }
}

/// All vCPUs of a guest have ended. What it has sent is shown first, which may take the line
/// a while.
fn conclude(scheduler: &mut Scheduler, living: Living) {
    if !living.vm.drain_console() {
        let soon = cpu::rdtsc() + time::tsc_hz() / LOOKS_A_SECOND;
        scheduler.do_later(soon, Box::new(|scheduler| conclude(scheduler, living)));
        return;
    }
    let Living {
        registered,
        entry: _,
        end,
        again_from,
        _quiet: quiet,
        vm,
        _block: block,
    } = living;
    registered.keep_screen(vm.screen());
    // The memory is there again when the end is told.
    drop((vm, block, quiet));
    let name = &registered.config().name;
    let end = match end.try_into_inner() {
        Some(Ok(end)) => end,
        Some(Err(reason)) => {
            cannot_start(&registered, &reason);
            return is_gone(&registered);
        }
        // Not reached: a vCPU ends with a reason.
        None => End::Stopped,
    };
    tell_exits(name, &registered.exits());
    let (end, follows) = registered.follows(end);
    let again = follows != Follows::Nothing && may_start_again();
    let and = if again { ", and is started again" } else { "" };
    info!(target: log::ALWAYS, "vm {name}: {end}{and}");
    if again {
        registered.set_again();
    }
    registered.ended(&end);
    if !again {
        is_gone(&registered);
    } else if follows == Follows::StartLater {
        scheduler.do_later(again_from, Box::new(|_| start_again(registered)));
    } else {
        start_again(registered);
    }
}

/// Starts a guest again, unless the operator wants it otherwise.
fn start_again(guest: Arc<registry::Guest>) {
    if guest.want_again() {
        return see_to(guest);
    }
    let name = &guest.config().name;
    info!(target: log::ALWAYS, "vm {name}: {}", End::Stopped);
    is_gone(&guest);
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
struct Block(Vec<FrameRange>);

impl Block {
    /// Of its first run.
    fn start(&self) -> Hpa {
        self.0.first().map_or(Hpa(0), |range| range.start)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        for range in &self.0 {
            // SAFETY: allocated in `Loading`; the VM that used it is dropped before.
            let freed = unsafe { memory::free(*range) };
            debug_assert!(freed.is_ok());
        }
    }
}

/// A guest that is ready to start.
pub struct Loaded {
    memory: GuestMemory,
    map: MemoryMap,
    entry: EntryState,
    /// What it is told by `fw_cfg`.
    told: FwCfg,
    block: Block,
}

impl Loaded {
    /// Takes the guest's memory and fills it.
    fn new(boot_info: &'static BootInfo, registered: &registry::Guest) -> Result<Self, StartError> {
        let config = registered.config();
        if config.serial == Serial::Com2 && !console::has_second() {
            return Err(StartError::NoSecondSerialPort);
        }
        let block = Block(vec![allocate(config.memory, ALIGN_2M)?]);
        let loading = Loading {
            boot_info,
            config,
            map: MemoryMap::new(block.start(), config.memory),
            block,
        };
        match &config.firmware {
            Some(name) => loading.firmware(file(boot_info, name)?),
            None => loading.kernel(),
        }
    }
}

/// A guest on its way into memory.
struct Loading {
    boot_info: &'static BootInfo,
    config: &'static config::Vm,
    map: MemoryMap,
    block: Block,
}

impl Loading {
    /// The guest's memory, filled with what it holds at first.
    fn memory(&self) -> Result<GuestMemory, StartError> {
        let memory = GuestMemory::new(self.map.slots(), DIRECT_MAP);
        for slot in memory.slots().iter() {
            let contents = match slot.kind {
                SlotKind::Ram => 0,
                SlotKind::Rom => 0xff,
            };
            for done in (0..slot.len).step_by(PIECE as usize) {
                let piece = PIECE.min(slot.len - done);
                memory
                    .fill(Gpa(slot.start.0 + done), piece, contents)
                    .map_err(StartError::Tables)?;
                cpu::interrupt_window();
            }
        }
        Ok(memory)
    }

    fn file(&self, name: &str) -> Result<&'static [u8], StartError> {
        file(self.boot_info, name)
    }

    fn initrd(&self) -> Result<Option<&'static [u8]>, StartError> {
        let name = self.config.initrd.as_ref();
        name.map(|name| self.file(name)).transpose()
    }

    /// Loads firmware, which finds a kernel by `fw_cfg`.
    fn firmware(mut self, image: &[u8]) -> Result<Loaded, StartError> {
        let len = (image.len() as u64).next_multiple_of(PAGE_SIZE);
        let rom = allocate(len, ALIGN_4K)?;
        self.block.0.push(rom);
        self.map = self.map.with_firmware(rom.start, len);
        let memory = self.memory()?;
        let entry = boot::firmware::load(image, &memory).map_err(StartError::Boot)?;
        let kernel = match &self.config.kernel {
            Some(name) => Some(Kernel {
                image: self.file(name)?,
                initrd: self.initrd()?,
                cmdline: &self.config.cmdline,
            }),
            None => None,
        };
        Ok(self.loaded(memory, entry, kernel.as_ref()))
    }

    /// Loads a kernel and what belongs to it.
    fn kernel(self) -> Result<Loaded, StartError> {
        let config = self.config;
        let memory = self.memory()?;
        let rsdp = acpi::write(&memory, config.vcpus).map_err(StartError::Tables)?;
        let [signature, _, _, features] = cpu::leaf(1, 0);
        mp::write(&memory, config.vcpus, [signature, features]).map_err(StartError::Tables)?;
        let name = config.kernel.as_deref().unwrap_or_default();
        let modules: Result<Vec<Module>, StartError> = config
            .modules
            .iter()
            .map(|module| {
                Ok(Module {
                    bytes: self.file(&module.file)?,
                    cmdline: multiboot::with_name(&module.file, &module.cmdline),
                })
            })
            .collect();
        let images = Images {
            kernel: self.file(name)?,
            name,
            initrd: self.initrd()?,
            modules: modules?,
            cmdline: &config.cmdline,
            protocol: config.protocol,
        };
        let machine = Machine {
            memory: &memory,
            map: &self.map,
            rsdp,
        };
        let entry = boot::load(&images, &machine).map_err(StartError::Boot)?;
        Ok(self.loaded(memory, entry, None))
    }

    fn loaded(self, memory: GuestMemory, entry: EntryState, kernel: Option<&Kernel>) -> Loaded {
        Loaded {
            memory,
            told: fw_cfg::describe(&self.map, self.config.vcpus, kernel),
            map: self.map,
            entry,
            block: self.block,
        }
    }
}

/// Memory for a guest.
fn allocate(bytes: u64, align: u64) -> Result<FrameRange, StartError> {
    memory::allocate(bytes.div_ceil(PAGE_SIZE), align).ok_or_else(|| StartError::NotEnoughMemory {
        needed: bytes,
        largest_free: memory::largest_free(align),
    })
}

/// How many VPIDs guests have.
pub fn vpids_in_use() -> usize {
    VPIDS.lock().in_use()
}

/// Says how often a guest has exited, and what that took where it was recorded.
fn tell_exits(vm: &str, exits: &Exits) {
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
