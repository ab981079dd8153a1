//! This CPU's local APIC: acknowledging, sending and timing interrupts.
//!
//! x2APIC mode where the CPU has it (no mapping, no wait for delivery), else
//! the memory-mapped registers, which all CPUs see at the same address.
//! SDM volume 3, chapter 11.

use super::interrupts;
use super::memory::paging::{self, MapError};
use crate::addr::{Hpa, Hva};
use crate::arch::{cpu, msr};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use x86::msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE};

/// A register, by its offset in the memory-mapped page; its x2APIC MSR is
/// 0x800 plus a sixteenth of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Register {
    Id = 0x20,
    TaskPriority = 0x80,
    EndOfInterrupt = 0xb0,
    Spurious = 0xf0,
    InterruptCommand = 0x300,
    InterruptCommandHigh = 0x310,
    Timer = 0x320,
    InitialCount = 0x380,
    CurrentCount = 0x390,
    DivideConfiguration = 0x3e0,
}

impl Register {
    const fn msr(self) -> u32 {
        0x800 + (self as u32 >> 4)
    }
}

/// IA32_APIC_BASE: x2APIC mode.
const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: the APIC is on.
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Spurious-vector register: software enable.
const SOFTWARE_ENABLE: u32 = 1 << 8;
const TIMER_MASKED: u32 = 1 << 16;
const TIMER_TSC_DEADLINE: u32 = 0b10 << 17;
/// Divide configuration: by 1.
const DIVIDE_BY_1: u32 = 0b1011;
/// ICR, memory-mapped only: the last command has not been accepted yet.
const SEND_PENDING: u32 = 1 << 12;
/// Polls for a command to be accepted; a live bus takes a few.
const PATIENCE: u32 = 100_000;

/// How the registers are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Not initialized.
    Off = 0,
    /// Memory-mapped, 8-bit identifiers.
    XApic = 1,
    /// By MSR, 32-bit identifiers.
    X2Apic = 2,
}

// All three are written by the bootstrap processor before it starts the others, whose start is an
// interrupt behind that: they read relaxed.
/// The [`Mode`] of all CPUs.
static MODE: AtomicU8 = AtomicU8::new(Mode::Off as u8);
/// Where the registers are mapped in xAPIC mode.
static MAPPED: AtomicU64 = AtomicU64::new(0);
/// Ticks of the APIC timer per second, 0 when the TSC deadline is used.
static TIMER_HZ: AtomicU64 = AtomicU64::new(0);

/// The mode that [`init`] chose.
#[inline]
pub fn mode() -> Mode {
    match MODE.load(Ordering::Relaxed) {
        2 => Mode::X2Apic,
        1 => Mode::XApic,
        _ => Mode::Off,
    }
}

fn mapped(register: Register) -> *mut u32 {
    Hva(MAPPED.load(Ordering::Relaxed) + register as u64).0 as *mut u32
}

#[inline]
fn read(register: Register) -> u32 {
    match mode() {
        // SAFETY: the register exists, and the APIC is in x2APIC mode.
        Mode::X2Apic => unsafe { msr::read(register.msr()) as u32 },
        // SAFETY: mapped by `init`; an aligned 32-bit access as the APIC wants it.
        Mode::XApic => unsafe { mapped(register).read_volatile() },
        Mode::Off => 0,
    }
}

#[inline]
fn write(register: Register, value: u32) {
    match mode() {
        // SAFETY: the register exists, and the values written here set no reserved bit.
        Mode::X2Apic => unsafe { msr::write(register.msr(), value.into()) },
        // SAFETY: mapped by `init`; an aligned 32-bit access as the APIC wants it.
        Mode::XApic => unsafe { mapped(register).write_volatile(value) },
        Mode::Off => {}
    }
}

/// How an interrupt is delivered (SDM volume 3, 12.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Delivery {
    /// The vector of the command.
    Fixed = 0b000,
    /// Non-maskable; the vector is ignored.
    Nmi = 0b100,
    /// To the wait-for-SIPI state.
    Init = 0b101,
    /// Start at the page that the vector names.
    StartUp = 0b110,
}

/// Whom an interrupt is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The CPU with this local APIC identifier.
    Cpu(u32),
    /// The sender.
    Myself,
    /// All CPUs.
    All,
    /// All CPUs but the sender.
    Others,
}

/// A value for the interrupt-command register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    target: Target,
    delivery: Delivery,
    vector: u8,
}

impl Command {
    /// An ordinary interrupt.
    pub const fn fixed(target: Target, vector: u8) -> Self {
        Self {
            target,
            delivery: Delivery::Fixed,
            vector,
        }
    }

    /// A non-maskable interrupt.
    pub const fn nmi(target: Target) -> Self {
        Self {
            target,
            delivery: Delivery::Nmi,
            vector: 0,
        }
    }

    /// INIT.
    pub const fn init(target: Target) -> Self {
        Self {
            target,
            delivery: Delivery::Init,
            vector: 0,
        }
    }

    /// Start-up at physical address `page` times 4096.
    pub const fn start_up(target: Target, page: u8) -> Self {
        Self {
            target,
            delivery: Delivery::StartUp,
            vector: page,
        }
    }

    /// The lower half, the same in both modes: edge-triggered, asserted,
    /// physical destination.
    pub const fn low(self) -> u32 {
        let shorthand = match self.target {
            Target::Cpu(_) => 0b00,
            Target::Myself => 0b01,
            Target::All => 0b10,
            Target::Others => 0b11,
        };
        self.vector as u32 | (self.delivery as u32) << 8 | 1 << 14 | shorthand << 18
    }

    const fn destination(self) -> u32 {
        match self.target {
            Target::Cpu(id) => id,
            _ => 0,
        }
    }

    /// The 64-bit register of x2APIC mode.
    pub const fn x2apic(self) -> u64 {
        (self.destination() as u64) << 32 | self.low() as u64
    }

    /// The upper half in xAPIC mode; `None` for an identifier over 8 bits.
    pub const fn xapic_high(self) -> Option<u32> {
        match self.destination() {
            id @ 0..=0xff => Some(id << 24),
            _ => None,
        }
    }
}

/// Turns the local APIC on: first on the bootstrap processor, then on every
/// other CPU with [`init_this_cpu`].
///
/// # Errors
/// When the registers need a mapping and there is no memory for it.
///
/// # Safety
/// Once; interrupts off.
pub unsafe fn init() -> Result<Mode, MapError> {
    // SAFETY: every CPU with VMX has the MSR.
    let base = unsafe { msr::read(IA32_APIC_BASE) };
    let x2apic = cpu::cpuid()
        .get_feature_info()
        .is_some_and(|features| features.has_x2apic());
    let mode = if x2apic {
        Mode::X2Apic
    } else {
        let registers = paging::map_device(Hpa(base & BASE_ADDRESS), 4096)?;
        MAPPED.store(registers.0, Ordering::Relaxed);
        Mode::XApic
    };
    MODE.store(mode as u8, Ordering::Relaxed);
    // SAFETY: the mode is set.
    unsafe { init_this_cpu() };
    Ok(mode)
}

/// Turns on the calling CPU's local APIC in the mode that [`init`] chose.
///
/// # Safety
/// After [`init`]; interrupts off.
pub unsafe fn init_this_cpu() {
    // SAFETY: every CPU with VMX has the MSR. xAPIC before x2APIC is the only
    // legal order from off; neither moves the registers.
    unsafe {
        let base = msr::read(IA32_APIC_BASE);
        if base & BASE_ENABLE == 0 {
            msr::write(IA32_APIC_BASE, base | BASE_ENABLE);
        }
        if mode() == Mode::X2Apic && base & BASE_X2APIC == 0 {
            msr::write(IA32_APIC_BASE, base | BASE_ENABLE | BASE_X2APIC);
        }
    }
    write(Register::TaskPriority, 0);
    write(Register::Timer, TIMER_MASKED);
    write(
        Register::Spurious,
        SOFTWARE_ENABLE | u32::from(interrupts::SPURIOUS),
    );
}

/// The calling CPU's identifier.
pub fn id() -> u32 {
    match mode() {
        Mode::X2Apic => read(Register::Id),
        _ => read(Register::Id) >> 24,
    }
}

/// Acknowledges the interrupt in service.
#[inline]
pub fn end_of_interrupt() {
    write(Register::EndOfInterrupt, 0);
}

/// Sends an interrupt. Whether it went out: not when the APIC is off, or the
/// target's identifier does not fit its mode, or the bus is stuck.
pub fn send(command: Command) -> bool {
    match mode() {
        Mode::X2Apic => {
            // The write is not serializing: what the target shall find in
            // memory must be visible before (SDM volume 3, 12.12.3).
            // SAFETY: fences memory and loads, nothing else.
            unsafe { core::arch::asm!("mfence", "lfence", options(nostack, preserves_flags)) };
            // SAFETY: a well-formed command; what it does to its target is what the caller wants.
            unsafe { msr::write(Register::InterruptCommand.msr(), command.x2apic()) };
            true
        }
        Mode::XApic => command.xapic_high().is_some_and(|high| {
            cpu::without_interrupts(|| {
                write(Register::InterruptCommandHigh, high);
                write(Register::InterruptCommand, command.low());
                (0..PATIENCE).any(|_| read(Register::InterruptCommand) & SEND_PENDING == 0)
            })
        }),
        Mode::Off => false,
    }
}

/// Has the CPU with this identifier leave its guest, or wake up.
pub fn kick(cpu: u32) {
    send(Command::fixed(Target::Cpu(cpu), interrupts::KICK));
}

/// Has the CPU with this identifier deliver its guest's posted interrupts.
pub fn notify(cpu: u32) {
    send(Command::fixed(Target::Cpu(cpu), interrupts::NOTIFY));
}

/// Makes all other CPUs take an NMI, which a dying machine's handler answers by halting.
pub fn stop_others() {
    send(Command::nmi(Target::Others));
}

/// Prepares this CPU's timer on vector [`interrupts::TIMER`]: the TSC deadline
/// where the CPU has it, else the one-shot count down, whose rate `hz` (ticks a
/// second, undivided) the caller has measured.
pub fn init_timer(hz: u64) {
    let deadline = cpu::cpuid()
        .get_feature_info()
        .is_some_and(|features| features.has_tsc_deadline());
    TIMER_HZ.store(if deadline { 0 } else { hz.max(1) }, Ordering::Relaxed);
    write(Register::DivideConfiguration, DIVIDE_BY_1);
    let mode = if deadline { TIMER_TSC_DEADLINE } else { 0 };
    write(Register::Timer, mode | u32::from(interrupts::TIMER));
    // The mode must be in force before the first deadline is written (SDM volume 3, 12.5.4.1).
    // SAFETY: fences memory, nothing else.
    unsafe { core::arch::asm!("mfence", options(nostack, preserves_flags)) };
}

/// Whether the timer is the TSC deadline. After [`init_timer`].
pub fn uses_deadline() -> bool {
    TIMER_HZ.load(Ordering::Relaxed) == 0
}

/// Interrupts this CPU once, `ticks` of the time-stamp counter from now, whose
/// rate is `tsc_hz`. A later call replaces an earlier one.
pub fn arm(ticks: u64, tsc_hz: u64) {
    match TIMER_HZ.load(Ordering::Relaxed) {
        // SAFETY: the CPU has the MSR (`init_timer`). 0 would disarm, so a
        // deadline is never 0.
        0 => unsafe { msr::write(IA32_TSC_DEADLINE, cpu::rdtsc().saturating_add(ticks).max(1)) },
        hz => write(Register::InitialCount, count(ticks, tsc_hz, hz)),
    }
}

/// Stops the timer.
pub fn disarm() {
    match TIMER_HZ.load(Ordering::Relaxed) {
        // SAFETY: as for `arm`.
        0 => unsafe { msr::write(IA32_TSC_DEADLINE, 0) },
        _ => write(Register::InitialCount, 0),
    }
}

/// Timer ticks for TSC ticks, rounded up: never early, never 0 (which is off).
/// What the counter cannot hold interrupts earlier and is armed again then.
fn count(ticks: u64, tsc_hz: u64, timer_hz: u64) -> u32 {
    let count = (u128::from(ticks) * u128::from(timer_hz)).div_ceil(u128::from(tsc_hz.max(1)));
    u32::try_from(count).unwrap_or(u32::MAX).max(1)
}

/// Counts the timer down, masked, while `wait` runs; the ticks that it counted.
pub fn measure(wait: impl FnOnce()) -> u32 {
    write(Register::Timer, TIMER_MASKED);
    write(Register::DivideConfiguration, DIVIDE_BY_1);
    write(Register::InitialCount, u32::MAX);
    wait();
    let left = read(Register::CurrentCount);
    write(Register::InitialCount, 0);
    u32::MAX - left
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_have_the_bits_of_the_manual() {
        for (command, bits) in [
            (Command::fixed(Target::Cpu(3), 0xe1), 0x0000_0003_0000_40e1),
            (Command::nmi(Target::Others), 0x0000_0000_000c_4400),
            (Command::nmi(Target::Cpu(0x1_0002)), 0x0001_0002_0000_4400),
            (Command::init(Target::Cpu(1)), 0x0000_0001_0000_4500),
            (
                Command::start_up(Target::Cpu(1), 0x9f),
                0x0000_0001_0000_469f,
            ),
            (Command::fixed(Target::Myself, 0x30), 0x0000_0000_0004_4030),
            (Command::fixed(Target::All, 0x30), 0x0000_0000_0008_4030),
        ] {
            assert_eq!(command.x2apic(), bits, "{command:?}");
        }
    }

    #[test]
    fn an_xapic_destination_is_the_highest_byte() {
        assert_eq!(
            Command::nmi(Target::Cpu(0x7f)).xapic_high(),
            Some(0x7f00_0000)
        );
        assert_eq!(Command::nmi(Target::Cpu(0x100)).xapic_high(), None);
        assert_eq!(Command::nmi(Target::Others).xapic_high(), Some(0));
    }

    #[test]
    fn registers_have_their_msr() {
        assert_eq!(Register::EndOfInterrupt.msr(), 0x80b);
        assert_eq!(Register::InterruptCommand.msr(), 0x830);
        assert_eq!(Register::DivideConfiguration.msr(), 0x83e);
    }

    proptest! {
        #[test]
        fn a_count_is_never_early_and_never_zero(ticks in any::<u32>(), tsc in 1_000_000u64..6_000_000_000, timer in 1_000_000u64..1_000_000_000) {
            let ticks = u64::from(ticks);
            let count = u128::from(count(ticks, tsc, timer));
            prop_assert!(count > 0);
            prop_assert!(count == u128::from(u32::MAX) || count * u128::from(tsc) >= u128::from(ticks) * u128::from(timer));
        }
    }
}
