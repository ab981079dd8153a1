//! Exceptions stay in the guest, and single-stepping sees every instruction.

use core::cell::Cell;
use vireo_test_guests::cpu::{self, rflags};
use vireo_test_guests::exceptions::{self, Frame, is_gp, is_ud, vector};
use vireo_test_guests::port::in8;
use vireo_test_guests::{Shared, check, check_equal, execute};

/// An instruction that the hypervisor completes leaves RF clear, so that a
/// breakpoint on the next one is met.
macro_rules! breakpoint_behind {
    ($name:literal, $instruction:literal) => {{
        exceptions::on(vector::DEBUG, |frame| {
            STEPS.put(0, frame.rip);
            frame.rflags |= RESUME;
        });
        let mut behind = 0u64;
        execute!(
            "mov r8, rbx",
            "lea {behind}, [rip + 2f]",
            "mov dr0, {behind}",
            "mov dr7, {on}",
            $instruction,
            "2: nop",
            "mov dr7, {off}",
            "mov rbx, r8",
            behind = out(reg) behind,
            on = in(reg) 0x402u64,
            off = in(reg) 0x400u64,
            inout("rax") 0u64 => _,
            inout("rcx") 0u64 => _,
            inout("rdx") 0x80u64 => _,
            out("r8") _,
        );
        let met = exceptions::count(vector::DEBUG);
        exceptions::off(vector::DEBUG);
        cpu::set_dr6(0xffff_0ff0);
        check_equal($name, (met, STEPS.at(0)), (1, behind));
    }};
}

pub fn check_all() {
    let zero = Cell::new(0u32);
    check_equal(
        "DIV by zero raises #DE",
        execute!("div {:e}", in(reg) zero.get(), inout("eax") 1 => _, inout("edx") 0 => _)
            .map(|e| e.vector),
        Some(vector::DIVIDE),
    );
    check("UD2 raises #UD", is_ud(execute!("ud2")));
    let noncanonical = 1u64 << 62;
    check(
        "a non-canonical address raises #GP",
        is_gp(execute!("mov {}, [{}]", out(reg) _, in(reg) noncanonical)),
    );
    exceptions::on(vector::BREAKPOINT, |_| {});
    execute!("int3");
    check_equal("INT3 raises #BP", exceptions::count(vector::BREAKPOINT), 1);
    exceptions::off(vector::BREAKPOINT);
    exceptions::on(0x80, |_| {});
    execute!("int 0x80");
    check_equal("INT 0x80 calls its gate", exceptions::count(0x80), 1);
    single_step();
    resume_flag();
    breakpoint_behind!("a breakpoint behind NOP is met", "nop");
    breakpoint_behind!("a breakpoint behind CPUID is met", "cpuid");
    breakpoint_behind!("a breakpoint behind IN is met", "in al, dx");
    breakpoint_behind!("a breakpoint behind MMIO is met", "mov eax, [0xfee00030]");
}

const RESUME: u64 = 1 << 16;
static FLAGS: Shared<u64> = Shared::new(0);

/// A fault pushes RF set. Both instructions have two bytes, which are skipped.
fn resume_flag() {
    exceptions::on(vector::INVALID_OPCODE, |frame| {
        FLAGS.set(frame.rflags);
        frame.rip += 2;
    });
    execute!("ud2");
    exceptions::off(vector::INVALID_OPCODE);
    check("#UD of UD2 pushes RF set", FLAGS.get() & RESUME != 0);
    exceptions::on(vector::GENERAL_PROTECTION, |frame| {
        FLAGS.set(frame.rflags);
        frame.rip += 2;
    });
    FLAGS.set(0);
    execute!("rdmsr", in("ecx") 0x1234_5678, out("eax") _, out("edx") _);
    exceptions::off(vector::GENERAL_PROTECTION);
    check("#GP of RDMSR pushes RF set", FLAGS.get() & RESUME != 0);
}

const MOST: usize = 16;
static STEPS: Shared<[u64; MOST]> = Shared::new([0; MOST]);
static COUNT: Shared<usize> = Shared::new(0);
static REASONS: Shared<u64> = Shared::new(u64::MAX);

fn step(frame: &mut Frame) {
    let count = COUNT.get();
    if count < MOST {
        STEPS.put(count, frame.rip);
        COUNT.set(count + 1);
    } else {
        frame.rflags &= !rflags::TRAP;
    }
    REASONS.set(REASONS.get() & cpu::dr6());
    cpu::set_dr6(0xffff_0ff0);
}

/// Executes the instructions with the trap flag set just before, and checks that
/// the first trap comes after the last of them.
macro_rules! trapped_after {
    ($name:literal, $first:literal $(, $rest:literal)*) => {{
        COUNT.set(0);
        REASONS.set(u64::MAX);
        exceptions::on(vector::DEBUG, step);
        let mut after = 0u64;
        execute!(
            "mov r8, rbx",
            "lea {after}, [rip + 2f]",
            "pushfq",
            "or qword ptr [rsp], 0x100",
            "popfq",
            $first,
            $($rest,)*
            "2: nop",
            "pushfq",
            "and qword ptr [rsp], ~0x100",
            "popfq",
            "mov rbx, r8",
            after = out(reg) after,
            inout("rax") 0u64 => _,
            inout("rcx") 0x1bu64 => _,
            inout("rdx") 0x80u64 => _,
            out("r8") _,
            inout("r9") u64::from(vireo_test_guests::descriptors::selector::DATA) => _,
        );
        exceptions::off(vector::DEBUG);
        check_equal($name, STEPS.at(0), after);
        check_equal(concat!($name, ": four more traps follow"), COUNT.get(), 5);
        check(concat!($name, ": DR6.BS is set"), REASONS.get() & 1 << 14 != 0);
    }};
}

fn single_step() {
    trapped_after!("a step over NOP", "nop");
    trapped_after!("a step over CPUID", "cpuid");
    trapped_after!("a step over IN", "in al, dx");
    trapped_after!("a step over OUT", "out dx, al");
    trapped_after!("a step over RDMSR", "rdmsr");
    trapped_after!("a step over WBINVD", "wbinvd");
    trapped_after!("MOV SS holds the step back over NOP", "mov ss, r9d", "nop");
    trapped_after!(
        "MOV SS holds the step back over CPUID",
        "mov ss, r9d",
        "cpuid"
    );
    trapped_after!("a step over MMIO", "mov eax, [0xfee00030]");
    trapped_after!("a step over MOV to CR8", "mov cr8, rax");
    trapped_after!("a step over HLT", "hlt");
    step_through_repetition();
}

/// A string instruction with a repeat prefix traps after each iteration.
fn step_through_repetition() {
    const SCRATCH: u16 = 0x3ff;
    COUNT.set(0);
    exceptions::on(vector::DEBUG, step);
    let bytes = [1u8, 2, 3];
    let (mut at, mut after) = (0u64, 0u64);
    execute!(
        "lea {at}, [rip + 2f]",
        "lea {after}, [rip + 3f]",
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "2: rep outsb",
        "3: pushfq",
        "and qword ptr [rsp], ~0x100",
        "popfq",
        at = out(reg) at,
        after = out(reg) after,
        inout("rcx") 3u64 => _,
        inout("rsi") bytes.as_ptr() => _,
        in("dx") SCRATCH,
    );
    exceptions::off(vector::DEBUG);
    check_equal(
        "a step through REP OUTS traps at each iteration",
        (STEPS.at(0), STEPS.at(1), STEPS.at(2)),
        (at, at, after),
    );
    check_equal("REP OUTS sends what is last", in8(SCRATCH), 3);
}
