//! The machine's off switch.
//!
//! ACPI's S5 where the firmware's tables say how; where there are none, or that
//! does nothing, the firmware's ResetSystem. What is needed is prepared at
//! boot, because whoever turns the machine off may be dying: nothing here takes
//! a lock or allocates then, and each way is tried once, so that an exception
//! on one of them leads to the next.

use super::acpi::{self, SleepRegister};
use super::memory::paging::{self, FirmwareAccess, MapError};
use super::{console, framebuffer, serial, time};
use crate::addr::Hpa;
use crate::arch::cpu;
use crate::arch::port::{inw, outb, outw};
use core::fmt::{self, Write};
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vireo_handoff::{BootInfo, MemoryKind};

/// PM1 control: sleep enable.
const SLEEP_ENABLE: u16 = 1 << 13;
/// PM1 control: sleep type, at bit 10.
const SLEEP_TYPE: u16 = 7 << 10;
/// PM1 control: the chipset is in ACPI mode.
const SCI_ENABLE: u16 = 1 << 0;
/// EfiResetShutdown (UEFI 2.10, 8.5.1).
const RESET_SHUTDOWN: u32 = 2;

/// How long a failure is left on the screen.
const READING_SECONDS: u64 = 30;
/// The same before the frequency of the time-stamp counter is known, at 2 GHz.
const READING_TICKS: u64 = READING_SECONDS * 2_000_000_000;

/// ResetSystem: type, status, size of the data, data.
type ResetSystem = unsafe extern "efiapi" fn(u32, usize, usize, *const u8);

/// Where the firmware's ResetSystem is mapped, 0 when it is not. Stored behind the mapping, and so
/// released and acquired.
static RESET_SYSTEM: AtomicU64 = AtomicU64::new(0);
/// The ways that were tried: each once, whichever CPU or exception comes here. Nothing is read
/// because of it, but a way that died is seen to have been tried (acquire and release).
static TRIED: AtomicU32 = AtomicU32::new(0);

/// How the machine is turned off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffSwitch {
    /// ACPI's S5, by this port of PM1 control.
    Acpi(u16),
    /// The firmware's ResetSystem.
    Firmware,
    /// None is known.
    None,
}

impl fmt::Display for OffSwitch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acpi(port) => write!(f, "ACPI S5 (port {port:#x})"),
            Self::Firmware => f.write_str("the firmware's ResetSystem"),
            Self::None => f.write_str("none, the machine will halt"),
        }
    }
}

/// Prepares the ways off; the one that will be tried first. After `acpi::init`.
///
/// The runtime services are called as the firmware left them, so their memory
/// is mapped where it is, code not writable and everything else not executable
/// (UEFI 2.10, 2.3.4 and 8).
///
/// # Safety
/// Once; `info` is what the loader handed over.
pub unsafe fn init(info: &BootInfo) -> OffSwitch {
    if let Some(function) = info.efi_reset_system {
        // SAFETY: the caller's.
        match unsafe { map_runtime_services(info) } {
            Ok(()) => RESET_SYSTEM.store(function, Ordering::Release),
            Err(error) => {
                log::warn!("the firmware's runtime services cannot be mapped: {error:?}");
            }
        }
    }
    match acpi::sleep_register() {
        Some(register) => OffSwitch::Acpi(register.pm1a),
        None if RESET_SYSTEM.load(Ordering::Acquire) != 0 => OffSwitch::Firmware,
        None => OffSwitch::None,
    }
}

/// # Safety
/// As for [`init`].
unsafe fn map_runtime_services(info: &BootInfo) -> Result<(), MapError> {
    for region in &info.memory {
        let access = match region.kind {
            MemoryKind::RuntimeCode => FirmwareAccess::Code,
            MemoryKind::RuntimeData | MemoryKind::AcpiNvs => FirmwareAccess::Data,
            MemoryKind::Mmio => FirmwareAccess::Device,
            _ => continue,
        };
        // SAFETY: the firmware's own memory, which nothing of ours lies in.
        unsafe { paging::map_firmware(Hpa(region.start), region.len, access)? };
    }
    Ok(())
}

/// Turns the machine off; when nothing does, says so and halts.
pub fn off_or_halt() -> ! {
    cpu::disable_interrupts();
    console::flush_unless_locked();
    off_at_once()
}

/// [`off_or_halt`] after a failure: on a real machine with a screen, somebody
/// gets time to read what stands there before the power takes it away.
pub fn off_when_read() -> ! {
    cpu::disable_interrupts();
    console::flush_unless_locked();
    let hypervisor = cpu::cpuid()
        .get_feature_info()
        .is_some_and(|features| features.has_hypervisor());
    if framebuffer::is_on() && !hypervisor {
        let ticks = match time::tsc_hz() {
            0 => READING_TICKS,
            hz => hz.saturating_mul(READING_SECONDS),
        };
        let start = cpu::rdtsc();
        while cpu::rdtsc().wrapping_sub(start) < ticks {
            core::hint::spin_loop();
        }
    }
    off_at_once()
}

/// [`off_or_halt`] without what the console has queued. Called again by the
/// handler of an exception on the way, it goes on with the next way.
pub fn off_at_once() -> ! {
    cpu::disable_interrupts();
    serial::COM1.wait_until_sent();
    let ways: [fn(); 3] = [by_acpi, by_firmware, say_that_it_stays_on];
    while let Some(way) = ways.get(TRIED.fetch_add(1, Ordering::AcqRel) as usize) {
        way();
    }
    cpu::halt_forever()
}

fn say_that_it_stays_on() {
    // Writing to the port does not fail.
    let _ = writeln!(
        serial::Polled,
        "vireo: the machine has no off switch that works: halted"
    );
}

fn by_acpi() {
    let Some(SleepRegister {
        pm1a,
        pm1b,
        type_a,
        type_b,
        enable,
    }) = acpi::sleep_register()
    else {
        return;
    };
    if let Some((command, value)) = enable {
        enter_acpi_mode(pm1a, command, value);
    }
    if let Some(port) = pm1b {
        sleep(port, type_b);
    }
    sleep(pm1a, type_a);
    settle();
}

fn sleep(port: u16, kind: u16) {
    // SAFETY: PM1 control of the machine that shall go off.
    unsafe {
        let others = inw(port) & !(SLEEP_TYPE | SLEEP_ENABLE);
        outw(port, others | kind << 10 | SLEEP_ENABLE);
    }
}

fn by_firmware() {
    let function = RESET_SYSTEM.load(Ordering::Acquire);
    if function == 0 {
        return;
    }
    // SAFETY: the address of ResetSystem in the firmware's table, whose code and data `init` has
    // mapped where they are; interrupts are off, and this stack has more than the 4 KiB that
    // runtime services may use.
    unsafe {
        let reset_system: ResetSystem = mem::transmute::<u64, ResetSystem>(function);
        reset_system(RESET_SHUTDOWN, 0, 0, ptr::null());
    }
}

/// Asks the firmware for ACPI mode, without which some chipsets ignore a sleep type.
fn enter_acpi_mode(pm1a: u16, command: u16, value: u8) {
    // SAFETY: PM1 control and the SMI command port, as the FADT names them.
    unsafe {
        if inw(pm1a) & SCI_ENABLE == 0 {
            outb(command, value);
            for _ in 0..100_000 {
                if inw(pm1a) & SCI_ENABLE != 0 {
                    break;
                }
            }
        }
    }
}

/// Gives the chipset a moment before the next attempt.
fn settle() {
    for _ in 0..1_000_000 {
        core::hint::spin_loop();
    }
}
