//! First process of a guest that runs a job: counts by the time-stamp counter
//! from the kernel's first instruction, and becomes the script that `guest.rs`
//! put at `/vireo/job`, with the count as its argument.
//!
//! A guest's counter is 0 at that instruction. On a machine without Vireo it
//! runs from power-on, and what starts the kernel writes its value into
//! [`START`], in the archive in memory (xtask's `machine/bare.rs`).
//!
//! A program of its own, since no shell can read the counter, and the shell's
//! start would be counted.
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::ptr;
use core::sync::atomic::AtomicU64;

const JOB: &core::ffi::CStr = c"/vireo/job";
/// System calls of Linux on x86-64.
const EXECVE: usize = 59;
const EXIT: usize = 60;
/// The status of a shell that finds no program.
const NOT_FOUND: usize = 127;

/// The time-stamp counter at the kernel's first instruction, behind the words
/// by which it is found in the program's file.
#[repr(C, align(8))]
struct Start {
    marker: [u8; 24],
    ticks: AtomicU64,
}

#[used]
static START: Start = Start {
    marker: *b"vireo-stopwatch-start-->",
    ticks: AtomicU64::new(0),
};

/// Where the kernel starts the program: RSP points at the argument count.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!(
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "mov rdi, rsp",
        "mov rsi, rax",
        "and rsp, -16",
        "call {main}",
        "ud2",
        main = sym main,
    )
}

/// # Safety
/// `stack` is what the kernel made: the argument count, that many arguments, a
/// null pointer, and the environment.
unsafe extern "C" fn main(stack: *const usize, ticks: u64) -> ! {
    // SAFETY: the caller's promise.
    let environment = unsafe { stack.add(stack.read() + 2) };
    // SAFETY: a reference is valid. Volatile, as what changes the file before
    // it is loaded is nothing that the compiler knows.
    let start = unsafe { START.ticks.as_ptr().read_volatile() };
    let count = decimal(ticks.wrapping_sub(start));
    let arguments = [JOB.as_ptr().cast(), count.as_ptr(), ptr::null()];
    // SAFETY: strings and lists end as execve wants it; it returns only on
    // failure, and exit never.
    unsafe {
        asm!(
            "syscall",
            "mov rdi, {status}",
            "mov eax, {exit}",
            "syscall",
            "ud2",
            status = const NOT_FOUND,
            exit = const EXIT,
            in("rax") EXECVE,
            in("rdi") JOB.as_ptr(),
            in("rsi") arguments.as_ptr(),
            in("rdx") environment,
            options(noreturn),
        )
    }
}

/// The digits of `number`, with zeros in front and a null byte behind.
fn decimal(mut number: u64) -> [u8; 21] {
    let mut digits = [0; 21];
    for digit in digits.iter_mut().rev().skip(1) {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
    digits
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
