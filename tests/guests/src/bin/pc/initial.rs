//! What the registers hold that no boot protocol speaks of: their values at
//! reset, and nothing that firmware or an earlier guest has left.

use vireo_test_guests::cpu::{self, cr4, msr, rdmsr};
use vireo_test_guests::{check_detail, check_equal, execute};

/// IA32_STAR, IA32_CSTAR, IA32_FMASK.
const SYSTEM_CALLS: [u32; 3] = [0xc000_0081, 0xc000_0083, 0xc000_0084];

pub fn check_all() {
    for number in SYSTEM_CALLS
        .into_iter()
        .chain([msr::LSTAR, msr::KERNEL_GS_BASE])
    {
        let value = rdmsr(number);
        vireo_test_guests::report::check_named(
            format_args!("MSR {number:#x} starts as 0"),
            value == Ok(0),
            format_args!("{value:x?}"),
        );
    }
    debug_registers();
    vector_state();
}

fn debug_registers() {
    let (mut first, mut second, mut third, mut fourth) = (0u64, 0u64, 0u64, 0u64);
    execute!(
        "mov {}, dr0",
        "mov {}, dr1",
        "mov {}, dr2",
        "mov {}, dr3",
        out(reg) first,
        out(reg) second,
        out(reg) third,
        out(reg) fourth,
    );
    check_equal(
        "debug addresses start as 0",
        (first, second, third, fourth),
        (0, 0, 0, 0),
    );
    check_equal("DR6 has its reset value", cpu::dr6(), 0xffff_0ff0);
    let mut cr2 = 0u64;
    execute!("mov {}, cr2", out(reg) cr2);
    check_equal("CR2 starts as 0", cr2, 0);
}

/// What FXSAVE writes.
#[repr(C, align(16))]
struct Area([u8; 512]);

fn vector_state() {
    let old = cpu::cr4();
    cpu::set_cr4(old | cr4::OSFXSR);
    let mut area = Area([0xff; 512]);
    let fault = execute!("fxsave64 [{}]", in(reg) &raw mut area);
    cpu::set_cr4(old);
    check_equal("FXSAVE works", fault, None);
    let [low, high, ..] = area.0;
    check_equal(
        "x87 control word starts as FNINIT sets it",
        [low, high],
        [0x7f, 0x03],
    );
    check_equal(
        "MXCSR has its reset value",
        area.0.get(24..28),
        Some(&[0x80, 0x1f, 0, 0][..]),
    );
    for (name, range) in [
        ("x87 registers start as 0", 32..160),
        ("XMM registers start as 0", 160..416),
    ] {
        let left = area.0.get(range).unwrap_or_default();
        let first = left.iter().position(|byte| *byte != 0);
        check_detail(
            name,
            !left.is_empty() && first.is_none(),
            format_args!("byte {first:?} is not"),
        );
    }
}
