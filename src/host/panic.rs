//! Last words: what went wrong, the registers, where, and then the end.
//!
//! Whoever comes here may have been interrupted anywhere, so nothing here takes
//! a lock for granted, allocates, or reads memory that the page tables do not
//! map. A panic or an exception while the first is reported is reported in one
//! line without what may be broken, and then the machine ends all the same.

use super::descriptors::InterruptFrame;
use super::memory::paging;
use super::{console, framebuffer, local_apic, power, serial};
use crate::addr::Hva;
use crate::arch::cpu;
use core::arch::asm;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Frames in a backtrace.
const DEPTH: usize = 32;

/// The local APIC identifier of the CPU that dies, plus 1; 0 while none does. One wins, and who
/// finds it won also finds what it did before (acquire and release).
static DYING: AtomicU64 = AtomicU64::new(0);
/// How often that CPU has come here. It alone counts, through exceptions that interrupt it.
static DEPTHS: AtomicU32 = AtomicU32::new(0);

/// The serial port and the screen.
struct LastWords;

impl Write for LastWords {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        serial::Polled.write_str(text)?;
        framebuffer::write(text);
        Ok(())
    }
}

/// How far a dying CPU has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// To be reported with all there is.
    First,
    /// The report itself went wrong.
    Report,
    /// Even its short form did, or the way off: the next way off is taken.
    End,
}

/// Whether another CPU is dying, so that this one shall stop.
pub fn elsewhere() -> bool {
    let dying = DYING.load(Ordering::Acquire);
    dying != 0 && dying != own_mark()
}

/// Whether this CPU is dying.
pub fn here() -> bool {
    DYING.load(Ordering::Acquire) == own_mark()
}

fn own_mark() -> u64 {
    u64::from(local_apic::id()) + 1
}

/// The end of a Rust panic: for the binary's `#[panic_handler]`.
pub fn panic(info: &core::panic::PanicInfo) -> ! {
    let mut out = LastWords;
    let stage = begin();
    if let Some(place) = info.location() {
        match stage {
            // Writing to the port does not fail.
            Stage::First => {
                let (message, file, line) = (info.message(), place.file(), place.line());
                let _ = writeln!(out, "vireo: panic: {message} at {file}:{line}");
            }
            Stage::Report => {
                let (file, line) = (place.file(), place.line());
                let _ = writeln!(
                    out,
                    "\nvireo: panic: a panic within the report, at {file}:{line}"
                );
            }
            Stage::End => {}
        }
    }
    if stage == Stage::First {
        let (rsp, rbp): (u64, u64);
        // SAFETY: copies two registers.
        unsafe {
            asm!("mov {}, rsp", "mov {}, rbp", out(reg) rsp, out(reg) rbp, options(nomem, nostack, preserves_flags));
        }
        let _ = writeln!(out, "vireo:   rsp {rsp:016x} rbp {rbp:016x}");
        backtrace(&mut out, rbp);
        power::off_when_read()
    }
    power::off_at_once()
}

/// The end of an exception in the hypervisor itself.
pub fn exception(frame: &InterruptFrame, cr2: u64) -> ! {
    let mut out = LastWords;
    match begin() {
        Stage::First => {
            report(&mut out, frame, cr2);
            let _ = writeln!(out, "vireo:   at {:#x}", frame.rip);
            backtrace(&mut out, frame.rbp);
            power::off_when_read()
        }
        Stage::Report => {
            let (name, rip) = (name(frame.vector), frame.rip);
            let _ = writeln!(out, "\nvireo: panic: {name} within the report, at {rip:#x}");
        }
        Stage::End => {}
    }
    power::off_at_once()
}

fn begin() -> Stage {
    cpu::disable_interrupts();
    let dying = DYING.compare_exchange(0, own_mark(), Ordering::AcqRel, Ordering::Acquire);
    if dying.is_err() && elsewhere() {
        // That CPU ends the machine.
        cpu::halt_forever();
    }
    match DEPTHS.fetch_add(1, Ordering::AcqRel) {
        0 => {
            local_apic::stop_others();
            console::flush_unless_locked();
            Stage::First
        }
        1 => Stage::Report,
        _ => Stage::End,
    }
}

/// The name that the SDM gives an exception.
fn name(vector: u64) -> &'static str {
    const NAMES: [&str; 22] = [
        "divide error",
        "debug exception",
        "NMI",
        "breakpoint",
        "overflow",
        "BOUND range exceeded",
        "invalid opcode",
        "device not available",
        "double fault",
        "coprocessor segment overrun",
        "invalid TSS",
        "segment not present",
        "stack-segment fault",
        "general protection",
        "page fault",
        "reserved exception",
        "x87 floating-point error",
        "alignment check",
        "machine check",
        "SIMD floating-point exception",
        "virtualization exception",
        "control protection exception",
    ];
    usize::try_from(vector)
        .ok()
        .and_then(|vector| NAMES.get(vector))
        .copied()
        .unwrap_or("exception")
}

fn report(out: &mut impl Write, frame: &InterruptFrame, cr2: u64) {
    let f = frame;
    let _ = writeln!(
        out,
        "vireo: panic: {} (vector {}, error code {:#x}) in the hypervisor at {:#x}",
        name(f.vector),
        f.vector,
        f.error_code,
        f.rip
    );
    let _ = writeln!(
        out,
        "vireo:   rip {:016x} cs {:04x} rflags {:08x} cr2 {cr2:016x}",
        f.rip, f.cs, f.rflags
    );
    let _ = writeln!(
        out,
        "vireo:   rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
        f.rax, f.rbx, f.rcx, f.rdx
    );
    let _ = writeln!(
        out,
        "vireo:   rsi {:016x} rdi {:016x} rbp {:016x} rsp {:016x}",
        f.rsi, f.rdi, f.rbp, f.rsp
    );
    let _ = writeln!(
        out,
        "vireo:   r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}",
        f.r8, f.r9, f.r10, f.r11
    );
    let _ = writeln!(
        out,
        "vireo:   r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}",
        f.r12, f.r13, f.r14, f.r15
    );
}

fn backtrace(out: &mut impl Write, frame_pointer: u64) {
    for address in Frames::new(frame_pointer, read_mapped, kernel_text()) {
        let _ = writeln!(out, "vireo:   at {address:#x}");
    }
}

/// The word at `address`, when the page tables map it.
fn read_mapped(address: u64) -> Option<u64> {
    let mapped = paging::translate(Hva(address)).is_some();
    // SAFETY: aligned (`Frames` checks), so within one page, which is mapped;
    // what it holds is a number to us.
    mapped.then(|| unsafe { (address as *const u64).read_volatile() })
}

#[cfg(feature = "bare")]
fn kernel_text() -> core::ops::Range<u64> {
    unsafe extern "C" {
        static __text_start: u8;
        static __text_end: u8;
    }
    (&raw const __text_start) as u64..(&raw const __text_end) as u64
}

#[cfg(not(feature = "bare"))]
fn kernel_text() -> core::ops::Range<u64> {
    0..0
}

/// Return addresses along the chain of frame pointers. Ends at the first link
/// that is unaligned, unreadable, not above the one before, or whose return
/// address is no kernel code.
struct Frames<R> {
    frame_pointer: u64,
    left: usize,
    read: R,
    text: core::ops::Range<u64>,
}

impl<R: Fn(u64) -> Option<u64>> Frames<R> {
    fn new(frame_pointer: u64, read: R, text: core::ops::Range<u64>) -> Self {
        Self {
            frame_pointer,
            left: DEPTH,
            read,
            text,
        }
    }
}

impl<R: Fn(u64) -> Option<u64>> Iterator for Frames<R> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        let frame = self.frame_pointer;
        if frame == 0 || !frame.is_multiple_of(8) {
            return None;
        }
        let caller = (self.read)(frame)?;
        let address = (self.read)(frame.checked_add(8)?)?;
        if !self.text.contains(&address) {
            return None;
        }
        if caller > frame {
            self.frame_pointer = caller;
        } else {
            self.left = 0;
        }
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn walk(memory: &[(u64, u64)], start: u64) -> Vec<u64> {
        let memory: HashMap<_, _> = memory.iter().copied().collect();
        Frames::new(
            start,
            |address| memory.get(&address).copied(),
            0x1000..0x2000,
        )
        .collect()
    }

    #[test]
    fn follows_the_chain_and_stops_at_its_end() {
        let memory = [(0x100, 0x200), (0x108, 0x1111), (0x200, 0), (0x208, 0x1222)];
        assert_eq!(walk(&memory, 0x100), [0x1111, 0x1222]);
    }

    #[test]
    fn stops_at_what_is_not_code_not_mapped_or_not_a_frame() {
        assert!(walk(&[(0x100, 0x200), (0x108, 0x2000)], 0x100).is_empty());
        assert!(walk(&[], 0x100).is_empty());
        assert!(walk(&[(0x101, 0x200), (0x109, 0x1111)], 0x101).is_empty());
        assert!(walk(&[], u64::MAX - 7).is_empty());
    }

    #[test]
    fn a_loop_of_frames_ends() {
        let memory = [
            (0x100, 0x200),
            (0x108, 0x1111),
            (0x200, 0x100),
            (0x208, 0x1222),
        ];
        assert_eq!(walk(&memory, 0x100), [0x1111, 0x1222]);
    }

    proptest! {
        #[test]
        fn never_longer_than_its_bound(words in prop::collection::vec(0u64..0x2000, 64), start in 0u64..512) {
            let read = |address: u64| words.get(usize::try_from(address / 8).ok()?).copied();
            prop_assert!(Frames::new(start, read, 0..0x2000).count() <= DEPTH);
        }
    }

    #[test]
    fn an_exception_is_named_with_its_registers() {
        let frame = InterruptFrame {
            vector: 14,
            error_code: 2,
            rip: 0xffff_ffff_8000_1234,
            r15: 0xf00,
            ..Default::default()
        };
        let mut text = String::new();
        report(&mut text, &frame, 0xdead_b000);
        assert!(text.starts_with("vireo: panic: page fault (vector 14, error code 0x2) in the hypervisor at 0xffffffff80001234\n"));
        assert!(text.contains("cr2 00000000deadb000"));
        assert!(text.ends_with("r15 0000000000000f00\n"));
        assert_eq!(name(13), "general protection");
        assert_eq!(name(18), "machine check");
        assert_eq!(name(99), "exception");
    }
}
