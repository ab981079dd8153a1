//! First process of a guest that runs a job: reads the time-stamp counter,
//! which was 0 at the kernel's first instruction, and becomes the script that
//! `guest.rs` put at `/vireo/job`, with the count as its argument.
//!
//! A program of its own, since no shell can read the counter, and the shell's
//! start would be counted.
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::ptr;

const JOB: &core::ffi::CStr = c"/vireo/job";
/// System calls of Linux on x86-64.
const EXECVE: usize = 59;
const EXIT: usize = 60;
/// The status of a shell that finds no program.
const NOT_FOUND: usize = 127;

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
    let count = decimal(ticks);
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
