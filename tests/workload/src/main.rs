//! What a Linux guest does for the benchmark: the same work on any machine,
//! with what each operation took, in ticks of the time-stamp counter. One line
//! for each:
//!
//! ```text
//! workload: NAME: NUMBER
//! ```
//!
//! The number is per operation, with one decimal, but for the last two lines: the
//! seconds in which the CPU was idle, since the kernel started, and the counter itself.

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::time::TimeSpec;
use nix::sys::wait::waitpid;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};
use nix::unistd::{ForkResult, fork, pipe, read, write};
use std::arch::x86_64::_rdtsc;
use std::ffi::CString;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The argument with which the program is started to end at once.
const NOTHING: &str = "nothing";
const PAGE: usize = 4096;
/// Bytes of the memory whose pages are touched, and of what is hashed.
const MEMORY: usize = 16 << 20;
/// Bytes that go through a pipe at once.
const BLOCK: usize = 64 << 10;
/// The period of the timer.
const PERIOD: Duration = Duration::from_millis(1);

fn main() -> Result<(), Errno> {
    let program = std::env::args().next().unwrap_or_default();
    if std::env::args().nth(1).as_deref() == Some(NOTHING) {
        return Ok(());
    }
    hash();
    system_calls();
    page_faults()?;
    context_switches()?;
    throughput()?;
    fork_and_exec(&program)?;
    timer()?;
    println!("workload: idle: {}", idle().ok_or(Errno::EIO)?);
    println!("workload: end: {}", ticks());
    Ok(())
}

/// Seconds of idleness, as Linux counts them.
fn idle() -> Option<String> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    text.split_whitespace().nth(1).map(str::to_owned)
}

fn ticks() -> u64 {
    // SAFETY: every CPU with 64 bits has the counter, and Linux lets programs read it.
    unsafe { _rdtsc() }
}

/// Says what `count` operations took since `start`.
fn say(name: &str, start: u64, count: usize) {
    let total = ticks() - start;
    println!("workload: {name}: {:.1}", total as f64 / count as f64);
}

/// Nothing but the CPU and the memory: FNV-1a, per KiB.
fn hash() {
    let data = vec![1u8; MEMORY / 4];
    let start = ticks();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for _ in 0..4 {
        for byte in black_box(&data) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    black_box(hash);
    say("hash of 1 KiB", start, 4 * data.len() / 1024);
}

fn system_calls() {
    const COUNT: usize = 50_000;
    let start = ticks();
    for _ in 0..COUNT {
        // SAFETY: it takes nothing and changes nothing.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
    say("system call", start, COUNT);
}

fn page_faults() -> Result<(), Errno> {
    const ROUNDS: usize = 4;
    let length = NonZeroUsize::new(MEMORY).ok_or(Errno::EINVAL)?;
    let start = ticks();
    for _ in 0..ROUNDS {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: new memory anywhere; its pages are touched while it is there, and nothing
        // refers to it when it is unmapped.
        unsafe {
            let memory = mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                flags,
            )?;
            for at in (0..MEMORY).step_by(PAGE) {
                memory.cast::<u8>().add(at).write_volatile(1);
            }
            munmap(memory, MEMORY)?;
        }
    }
    say("page fault", start, ROUNDS * MEMORY / PAGE);
    Ok(())
}

/// Runs `child` in a process of its own, and waits for its end after `parent`.
fn two_processes(
    child: impl FnOnce() -> Result<(), Errno>,
    parent: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), Errno> {
    // SAFETY: there is one thread.
    match unsafe { fork() }? {
        ForkResult::Child => std::process::exit(child().is_err().into()),
        ForkResult::Parent { child } => {
            parent()?;
            waitpid(child, None)?;
            Ok(())
        }
    }
}

/// Two processes that wake each other, through a pair of pipes.
fn context_switches() -> Result<(), Errno> {
    const ROUNDS: usize = 5000;
    let (ping, pong) = (pipe()?, pipe()?);
    let pass = |from: &OwnedFd, to: &OwnedFd, first: bool| {
        let mut byte = [0];
        for _ in 0..ROUNDS {
            if first {
                write(to, &byte)?;
            }
            read(from, &mut byte)?;
            if !first {
                write(to, &byte)?;
            }
        }
        Ok(())
    };
    let start = ticks();
    two_processes(
        || pass(&ping.0, &pong.1, false),
        || pass(&pong.0, &ping.1, true),
    )?;
    say("context switch", start, 2 * ROUNDS);
    Ok(())
}

fn throughput() -> Result<(), Errno> {
    const BLOCKS: usize = 500;
    let (out, into) = pipe()?;
    let start = ticks();
    two_processes(
        || {
            let block = vec![1; BLOCK];
            let mut left = BLOCKS * BLOCK;
            while left > 0 {
                left -= write(&into, &block[..BLOCK.min(left)])?;
            }
            Ok(())
        },
        || {
            let mut block = vec![0; BLOCK];
            let mut left = BLOCKS * BLOCK;
            while left > 0 {
                left -= read(&out, &mut block)?;
            }
            Ok(())
        },
    )?;
    say("64 KiB through a pipe", start, BLOCKS);
    Ok(())
}

fn fork_and_exec(program: &str) -> Result<(), Errno> {
    const COUNT: usize = 200;
    let start = ticks();
    for _ in 0..COUNT {
        two_processes(
            || {
                let arguments =
                    [program, NOTHING].map(|word| CString::new(word).unwrap_or_default());
                nix::unistd::execv(&arguments[0], &arguments).map(|never| match never {})
            },
            || Ok(()),
        )?;
    }
    say("fork, exec, exit, wait", start, COUNT);
    Ok(())
}

/// How late a real-time task wakes up by a timer, in nanoseconds.
fn timer() -> Result<(), Errno> {
    const COUNT: u32 = 300;
    let priority = libc::sched_param { sched_priority: 80 };
    // SAFETY: the parameter is there for the time of the call.
    Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) })?;
    let clock = ClockId::CLOCK_MONOTONIC;
    let (mut sum, mut most) = (Duration::ZERO, Duration::ZERO);
    let mut next = Duration::from(clock_gettime(clock)?);
    for _ in 0..COUNT {
        next += PERIOD;
        clock_nanosleep(
            clock,
            ClockNanosleepFlags::TIMER_ABSTIME,
            &TimeSpec::from_duration(next),
        )?;
        let late = Duration::from(clock_gettime(clock)?).saturating_sub(next);
        sum += late;
        most = most.max(late);
    }
    let mean = sum.as_nanos() as f64 / f64::from(COUNT);
    println!("workload: timer's lateness, ns: {mean:.1}");
    println!(
        "workload: timer's greatest lateness, ns: {}",
        most.as_nanos()
    );
    Ok(())
}
