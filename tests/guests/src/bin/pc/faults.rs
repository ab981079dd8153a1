//! Exceptions stay in the guest, and single-stepping sees every instruction.

use core::cell::Cell;
use vireo_test_guests::cpu::{self, cr0, rflags};
use vireo_test_guests::descriptors::{self, SPARE_STACK_INDEX, selector};
use vireo_test_guests::exceptions::{self, Frame, is_gp, is_ud, vector};
use vireo_test_guests::port::in8;
use vireo_test_guests::{Shared, check, check_equal, execute, paging};

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
    debug_exceptions();
    alignment();
}

/// What a debug exception does to the registers beside DR6.BS.
fn debug_exceptions() {
    const GENERAL_DETECT: u64 = 1 << 13;
    exceptions::on(vector::DEBUG, |frame| FLAGS.set(frame.rip));
    let mut after = 0u64;
    execute!("lea {}, [rip + 2f]", ".byte 0xf1", "2:", out(reg) after);
    check_equal(
        "INT1 raises #DB behind itself",
        (exceptions::count(vector::DEBUG), FLAGS.get()),
        (1, after),
    );

    exceptions::on(vector::DEBUG, |frame| {
        REASONS.set(cpu::dr6());
        FLAGS.set(cpu::dr7());
        FAULT.set(frame.rip);
    });
    let mut at = 0u64;
    execute!(
        "lea {at}, [rip + 2f]",
        "mov dr7, {on}",
        "2: mov {on}, dr0",
        at = out(reg) at,
        on = inout(reg) 0x400 | GENERAL_DETECT => _,
    );
    check_equal(
        "general detect raises #DB at a MOV of a debug register",
        (exceptions::count(vector::DEBUG), FAULT.get()),
        (1, at),
    );
    check("DR6.BD is set", REASONS.get() & GENERAL_DETECT != 0);
    check(
        "DR7.GD is clear in the handler",
        FLAGS.get() & GENERAL_DETECT == 0,
    );

    // What no condition has set is left alone.
    cpu::set_dr6(0xffff_0ff0 | GENERAL_DETECT);
    execute!(
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "nop",
        "pushfq",
        "and qword ptr [rsp], ~0x100",
        "popfq"
    );
    check_equal(
        "DR6 keeps what only software clears",
        cpu::dr6() & (1 << 14 | GENERAL_DETECT),
        1 << 14 | GENERAL_DETECT,
    );
    exceptions::off(vector::DEBUG);
    cpu::set_dr6(0xffff_0ff0);
    cpu::set_dr7(0x400);
}

static FAULT: Shared<u64> = Shared::new(0);
static ERROR: Shared<u64> = Shared::new(0);

/// An access that is not aligned, by code that asked for #AC at level 3.
fn alignment() {
    const ALIGNMENT_CHECK: u8 = 17;
    const FLAG: u64 = 1 << 18;
    let old = cpu::cr0();
    cpu::set_cr0(old | cr0::AM);
    descriptors::set_interrupt_stack(SPARE_STACK_INDEX, STACK.address() + STACK_SIZE as u64);
    for vector in [ALIGNMENT_CHECK, LEAVE_LEVEL_3] {
        exceptions::set_interrupt_stack(vector, SPARE_STACK_INDEX);
    }
    exceptions::on(ALIGNMENT_CHECK, |frame| {
        FAULT.set(frame.rip);
        ERROR.set(frame.error);
        frame.rflags &= !FLAG;
    });
    exceptions::on(LEAVE_LEVEL_3, |frame| {
        frame.cs = selector::CODE.into();
        frame.ss = selector::DATA.into();
    });
    paging::open_to_level_3(true);
    let mut at = 0u64;
    let words = [0u64; 2];
    let fault = execute!(
        "lea {at}, [rip + 3f]",
        "mov {stack}, rsp",
        "push {ss}",
        "push {stack}",
        "pushfq",
        "push {cs}",
        "lea {cs}, [rip + 2f]",
        "push {cs}",
        "iretq",
        "2: pushfq",
        "or qword ptr [rsp], 0x40000",
        "popfq",
        "3: mov {ss}, [{words} + 1]",
        "int 0xf0",
        at = out(reg) at,
        stack = out(reg) _,
        ss = inout(reg) u64::from(selector::USER_DATA) => _,
        cs = inout(reg) u64::from(selector::USER_CODE) => _,
        words = in(reg) words.as_ptr(),
    );
    paging::open_to_level_3(false);
    exceptions::off(LEAVE_LEVEL_3);
    exceptions::off(ALIGNMENT_CHECK);
    for vector in [ALIGNMENT_CHECK, LEAVE_LEVEL_3] {
        exceptions::set_interrupt_stack(vector, 0);
    }
    cpu::set_cr0(old);
    check_equal(
        "an access that is not aligned raises #AC where that is on",
        (
            fault,
            exceptions::count(ALIGNMENT_CHECK),
            FAULT.get(),
            ERROR.get(),
        ),
        (None, 1, at, 0),
    );
}

/// The stack on which level 3 is left.
const STACK_SIZE: usize = 4096;
static STACK: Shared<[u8; STACK_SIZE]> = Shared::new([0; STACK_SIZE]);

/// The gate by which level 3 comes back.
const LEAVE_LEVEL_3: u8 = 0xf0;

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
