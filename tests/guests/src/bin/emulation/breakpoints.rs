//! Data breakpoints in a device, and of instructions that exit.

use super::{DEVICE, ECHO};
use vireo_test_guests::exceptions::{self, vector};
use vireo_test_guests::memory::write64;
use vireo_test_guests::{Shared, check_equal, cpu, execute, io_apic, paging};

const DR6: u64 = 0xffff_0ff0;
/// Breakpoint 0: on writes, or on reads too, of four bytes.
const WRITE: u64 = 0xd_0403;
const BOTH: u64 = 0xf_0403;
const OFF: u64 = 0x400;

static BEHIND: Shared<u64> = Shared::new(0);

/// Stores, and says where it ends.
#[inline(never)]
fn store(at: u64) -> u64 {
    let mut end = 0u64;
    execute!("lea {end}, [rip + 2f]", "mov [{at}], {value:e}", "2:", at = in(reg) at, value = in(reg) 0u64, end = inout(reg) end);
    end
}

#[inline(never)]
fn load(at: u64) {
    execute!("mov {value:e}, [{at}]", at = in(reg) at, value = out(reg) _);
}

#[inline(never)]
fn or(at: u64) {
    execute!("or dword ptr [{at}], 0", at = in(reg) at);
}

/// How often it traps while there is a breakpoint at `at`, and which ones DR6 names.
fn traps(at: u64, dr7: u64, access: impl FnOnce()) -> (u64, u64) {
    exceptions::on(vector::DEBUG, |frame| BEHIND.set(frame.rip));
    cpu::set_dr6(DR6);
    cpu::set_dr0(at);
    cpu::set_dr7(dr7);
    access();
    cpu::set_dr7(OFF);
    let met = cpu::dr6();
    cpu::set_dr6(DR6);
    exceptions::off(vector::DEBUG);
    (exceptions::count(vector::DEBUG), met & 0x600f)
}

pub fn run() {
    for at in [DEVICE + 0x100, io_apic::BASE] {
        let (mut end, before) = (0, at.wrapping_sub(8));
        let written = traps(at, WRITE, || end = store(at));
        check_equal("a write to a device traps", written, (1, 1));
        check_equal("behind the instruction", BEHIND.get(), end);
        let read = traps(at, WRITE, || load(at));
        check_equal("a read does not", read, (0, 0));
        check_equal(
            "where it is to, it does",
            traps(at, BOTH, || load(at)),
            (1, 1),
        );
        let elsewhere = traps(before, BOTH, || load(at));
        check_equal("not elsewhere", elsewhere, (0, 0));
        // So that it is known, and again while it is.
        let all = || {
            store(at);
            load(at);
            or(at);
        };
        (0..4).for_each(|_| all());
        check_equal("a known access traps", traps(at, BOTH, all), (3, 1));
        all();
        check_equal("and not behind that", exceptions::count(vector::DEBUG), 3);
    }
    let at = DEVICE + 0x200;
    let strings = traps(at + 4, WRITE, || {
        execute!("rep stosb", inout("rdi") at => _, inout("rcx") 20u64 => _, in("al") 1u8);
    });
    check_equal("each iteration that writes there", strings, (4, 1));
    let memory = paging::scratch(0);
    write64(memory, 0);
    let output = traps(memory + 4, BOTH, || {
        execute!("rep outsb", inout("rsi") memory => _, inout("rcx") 20u64 => _, in("dx") ECHO);
    });
    let input = traps(memory + 4, WRITE, || {
        execute!("rep insb", inout("rdi") memory => _, inout("rcx") 20u64 => _, in("dx") ECHO);
    });
    check_equal("REP OUTSB and REP INSB", (output, input), ((4, 1), (4, 1)));
    let float = traps(at, WRITE, || {
        execute!("fninit", "fld1", "fstp qword ptr [{}]", "fninit", in(reg) at - 4);
    });
    check_equal("FSTP", float, (1, 1));
}
