//! The boot of the hypervisor, as a table of contents.
#![no_std]
#![no_main]

extern crate alloc;

// Its functions are called by compiled code only.
use vireo_freestanding as _;

use alloc::boxed::Box;
use core::arch::naked_asm;
use core::panic::PanicInfo;
use log::{LevelFilter, error, info, warn};
use vireo::host::{
    acpi, console, cpus, descriptors, framebuffer, io_apic, local_apic, memory, panic, power,
    serial, time,
};
use vireo::monitor::{self, processors};
use vireo_handoff::{BootInfo, Handoff, MAGIC};

/// Bytes of the stack that the hypervisor boots and runs its loop on.
const BOOT_STACK: usize = 64 * 1024;

#[repr(C, align(4096))]
struct BootStack(core::cell::UnsafeCell<[u8; BOOT_STACK]>);

// SAFETY: only the boot processor uses it, as its stack.
unsafe impl Sync for BootStack {}

// `linker.ld` leaves an unmapped page below.
#[unsafe(link_section = ".boot_stack")]
static STACK: BootStack = BootStack(core::cell::UnsafeCell::new([0; BOOT_STACK]));

/// Where the loader jumps to, with the handoff in RDI and interrupts off.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start(handoff: *const Handoff) -> ! {
    naked_asm!(
        "lea rsp, [rip + {stack} + {size}]",
        "xor ebp, ebp",
        "call {main}",
        "ud2",
        stack = sym STACK,
        size = const BOOT_STACK,
        main = sym main,
    )
}

extern "C" fn main(handoff: *const Handoff) -> ! {
    serial::init();
    monitor::log::init(LevelFilter::Info);
    // SAFETY: the first thing at boot, on the boot processor, with interrupts off.
    unsafe {
        descriptors::init();
        memory::heap::init();
    }
    // SAFETY: the loader's promise (`vireo_handoff`): RDI points at a handoff in the direct map.
    let boot = match unsafe { boot_info(handoff) } {
        Ok(boot) => &*Box::leak(Box::new(boot)),
        Err(reason) => fail(format_args!(
            "the hypervisor was not started by its loader: {reason}"
        )),
    };
    // SAFETY: `boot` is what the loader handed over, and each of these runs once, in this order.
    unsafe {
        memory::init(boot);
        if let Some(screen) = &boot.framebuffer
            && let Err(error) = framebuffer::init(screen)
        {
            warn!("the screen cannot be used: {error:?}");
        }
        if let Err(error) = descriptors::guard_stacks() {
            warn!("interrupt stacks without guard pages: {error:?}");
        }
    }
    let platform = acpi::init(boot.rsdp);
    // SAFETY: as above.
    let off_switch = unsafe { power::init(boot) };
    // SAFETY: as above; interrupts stay off until `console::start`.
    unsafe {
        if let Err(error) = local_apic::init() {
            fail(format_args!("no local APIC: {error:?}"));
        }
        io_apic::init(platform);
    }
    let Some(frequency) = time::init(platform.pm_timer) else {
        fail(format_args!(
            "no clock to measure the time-stamp counter with (PIT, ACPI PM timer, CPUID)"
        ));
    };
    time::init_timer();
    console::start();
    monitor::console::start(boot);

    let (total, free) = memory::counts();
    info!(
        "{} CPU(s), {} MiB of memory, {} MiB free; TSC {} kHz ({:?}); power-off: {off_switch}",
        boot.cpus.len(),
        total / 256,
        free / 256,
        frequency.hz / 1000,
        frequency.source
    );
    #[cfg(feature = "selftest")]
    vireo::host::selftest::run(boot);
    // SAFETY: once, here, and all of the host is there.
    unsafe {
        cpus::start(
            boot,
            processors::prepare,
            processors::serve,
            |cpu, reason| {
                warn!("a CPU is left out, that with APIC identifier {cpu}: {reason}");
            },
        );
    }
    // SAFETY: the bootstrap processor, once, with interrupts off.
    let processor = match cpus::get(cpus::BOOTSTRAP).map(|cpu| unsafe { processors::start(cpu) }) {
        Some(Ok(processor)) => processor,
        Some(Err(reason)) => fail(format_args!("{reason}")),
        None => fail(format_args!("the firmware lists no CPU")),
    };
    monitor::features::tell(&processor.vmx);

    monitor::guests::run_all(boot, processor);
    monitor::console::flush();
    power::off_or_halt()
}

/// # Safety
/// `handoff` is null or what the loader passed.
unsafe fn boot_info(handoff: *const Handoff) -> Result<BootInfo, &'static str> {
    // SAFETY: the caller's promise.
    let handoff = unsafe { handoff.as_ref() }.ok_or("no handoff")?;
    if handoff.magic != MAGIC {
        return Err("the handoff has another version");
    }
    // SAFETY: the loader left `info_len` bytes there and uses them no more.
    let bytes = unsafe {
        core::slice::from_raw_parts(handoff.info as *const u8, handoff.info_len as usize)
    };
    BootInfo::from_bytes(bytes).map_err(|_| "the boot information cannot be read")
}

/// One clear sentence, and the end.
fn fail(reason: core::fmt::Arguments<'_>) -> ! {
    error!("{reason}");
    power::off_when_read()
}

#[panic_handler]
fn on_panic(info: &PanicInfo<'_>) -> ! {
    panic::panic(info)
}
