//! x87 with operands in a device, and state that is saved there: what is in memory where the
//! same is done there.

use super::{DEVICE, PRESENT_WRITABLE, WRITE};
use vireo_test_guests::cpu::{self, cr4};
use vireo_test_guests::exceptions::{is_gp, vector};
use vireo_test_guests::memory::{read32, read64, write32, write64};
use vireo_test_guests::paging::{self, PAGE};
use vireo_test_guests::{check, check_equal, execute};

/// Bytes that are compared.
const AREA: u64 = 0x800;

pub fn run() {
    let old = cpu::cr4();
    cpu::set_cr4(old | cr4::OSFXSR);
    let memory = paging::scratch(0);
    arithmetic(memory);
    environment(memory);
    saved(memory);
    exceptions();
    const XSAVE: u32 = 1 << 26;
    let [_, _, features, _] = cpu::cpuid(1, 0);
    if features & XSAVE != 0 {
        cpu::set_cr4(cpu::cr4() | cr4::OSXSAVE);
        xsave(memory);
    }
    cpu::set_cr4(old);
}

fn clear(at: u64) {
    (0..AREA / 8).for_each(|index| write64(at + 8 * index, 0));
}

/// Where both differ, but for fields in `except` that point at their operand.
fn difference(a: u64, b: u64, except: &[u64]) -> Option<u64> {
    (0..AREA)
        .step_by(4)
        .filter(|at| !except.contains(at))
        .find(|at| read32(a + at) != read32(b + at))
}

fn arithmetic(memory: u64) {
    for at in [memory, DEVICE] {
        clear(at);
        write64(at, 0x4009_21fb_5444_2d18);
        write64(at + 8, (-7i64) as u64);
        write32(at + 16, 0x3f00_0000);
        execute!(
            "fninit",
            "fld qword ptr [{at}]",
            "fimul dword ptr [{at} + 8]",
            "fadd dword ptr [{at} + 16]",
            "fst dword ptr [{at} + 0x20]",
            "fist word ptr [{at} + 0x28]",
            "fst qword ptr [{at} + 0x30]",
            "fisttp qword ptr [{at} + 0x38]",
            "fild qword ptr [{at} + 8]",
            "fbstp [{at} + 0x48]",
            "fld qword ptr [{at}]",
            "fstp tbyte ptr [{at} + 0x5c]",
            "fld tbyte ptr [{at} + 0x5c]",
            "fcomp qword ptr [{at}]",
            "fnstsw word ptr [{at} + 0x70]",
            "fldcw word ptr [{at} + 0x74]",
            "fnstcw word ptr [{at} + 0x78]",
            "fninit",
            at = in(reg) at,
        );
    }
    check_equal("x87 computes", read32(DEVICE + 0x28) & 0xffff, 0xffeb);
    check_equal("as with memory", difference(memory, DEVICE, &[]), None);
}

/// The instruction and the operand that x87 remembers are the guest's.
fn environment(memory: u64) {
    const FDP: u64 = 0x54;
    let mut pointers = [(0, 0); 2];
    for (at, seen) in [memory, DEVICE].into_iter().zip(&mut pointers) {
        clear(at);
        execute!(
            "fninit",
            "fld1",
            "fiadd dword ptr [{at} + 8]",
            "fnstenv [{at} + 0x40]",
            "fldenv [{at} + 0x40]",
            "fnsave [{at} + 0x80]",
            "frstor [{at} + 0x80]",
            "data16 fnsave [{at} + 0x140]",
            "data16 frstor [{at} + 0x140]",
            "fst qword ptr [{at} + 0x200]",
            "fninit",
            at = in(reg) at,
        );
        *seen = (read32(at + FDP), at as u32 + 8);
    }
    let operand = [FDP, 0x94, 0x14a, 0x148, 0x14c];
    check_equal(
        "environments and states",
        (difference(memory, DEVICE, &operand), read64(DEVICE + 0x200)),
        (None, 0x3ff0_0000_0000_0000),
    );
    let [(kept, own), (emulated, device)] = pointers;
    check_equal(
        "the last operand",
        emulated,
        if kept == own { device } else { kept },
    );
}

fn saved(memory: u64) {
    for at in [memory, DEVICE] {
        clear(at);
        write64(at + 0x400, 0x1122_3344_5566_7788);
        execute!(
            "fninit",
            "fldpi",
            "movq xmm7, [{at} + 0x400]",
            "movq xmm14, [{at} + 0x400]",
            "stmxcsr [{at} + 0x410]",
            "ldmxcsr [{at} + 0x410]",
            "fxsave64 [{at}]",
            "fninit",
            "pxor xmm7, xmm7",
            "pxor xmm14, xmm14",
            "fxrstor64 [{at}]",
            "fstp qword ptr [{at} + 0x420]",
            "movq [{at} + 0x428], xmm7",
            "movq [{at} + 0x430], xmm14",
            "fxsave [{at} + 0x200]",
            "fxrstor [{at} + 0x200]",
            at = in(reg) at,
        );
    }
    check_equal(
        "FXSAVE and FXRSTOR",
        (
            read64(DEVICE + 0x420),
            read64(DEVICE + 0x428),
            read64(DEVICE + 0x430),
        ),
        (
            0x4009_21fb_5444_2d18,
            0x1122_3344_5566_7788,
            0x1122_3344_5566_7788,
        ),
    );
    check_equal(
        "the same as in memory",
        difference(memory, DEVICE, &[]),
        None,
    );
}

fn exceptions() {
    clear(DEVICE);
    write32(DEVICE, u32::MAX);
    check(
        "LDMXCSR with reserved bits raises #GP",
        is_gp(execute!("ldmxcsr [{}]", in(reg) DEVICE)),
    );
    write32(DEVICE + 24, u32::MAX);
    check(
        "so does FXRSTOR",
        is_gp(execute!("fxrstor [{}]", in(reg) DEVICE)),
    );
    check(
        "FXSAVE to an address that is not aligned",
        is_gp(execute!("fxsave [{}]", in(reg) DEVICE + 8)),
    );
    write32(DEVICE, 0x37b);
    check_equal(
        "an exception that waits raises #MF",
        execute!(
            "fninit",
            "fldcw word ptr [{at}]",
            "fldz",
            "fld1",
            "fdiv st(0), st(1)",
            "fst dword ptr [{at}]",
            at = in(reg) DEVICE,
        )
        .map(|fault| fault.vector),
        Some(vector::FLOATING_POINT),
    );
    execute!("fninit");
    let page = paging::map(0, DEVICE, PRESENT_WRITABLE);
    let fault = execute!("fld1", "fstp qword ptr [{}]", in(reg) page + PAGE - 4);
    let mut depth = 0u64;
    execute!("fnstsw ax", inout("rax") depth, options(nostack));
    check_equal(
        "FSTP into a page that is not there has not popped",
        (
            fault.map(|fault| (fault.vector, fault.error, fault.cr2)),
            depth >> 11 & 7,
        ),
        (Some((vector::PAGE_FAULT, WRITE, page + PAGE)), 7),
    );
    paging::map(0, 0, 0);
    // Invalid, and not masked: nothing is stored.
    write32(DEVICE, 0x37e);
    write64(DEVICE + 8, 0x7fee_eeee_eeee_eeee);
    execute!(
        "fninit",
        "fldcw word ptr [{at}]",
        "fld qword ptr [{at} + 8]",
        "fistp dword ptr [{at} + 8]",
        "fninit",
        at = in(reg) DEVICE,
    );
    check_equal(
        "FISTP of too much",
        read64(DEVICE + 8),
        0x7fee_eeee_eeee_eeee,
    );
}

fn xsave(memory: u64) {
    execute!("xsetbv", in("ecx") 0, in("eax") 3, in("edx") 0);
    for at in [memory, DEVICE] {
        clear(at);
        write64(at + 0x300, 0x1122_3344_5566_7788);
        execute!(
            "fninit",
            "movq xmm9, [{at} + 0x300]",
            "xsave64 [{at}]",
            "pxor xmm9, xmm9",
            "xrstor64 [{at}]",
            "movq [{at} + 0x308], xmm9",
            at = in(reg) at,
            in("eax") 3,
            in("edx") 0,
        );
    }
    check_equal(
        "XSAVE and XRSTOR",
        (difference(memory, DEVICE, &[]), read64(DEVICE + 0x308)),
        (None, 0x1122_3344_5566_7788),
    );
    write64(DEVICE + 512, 8);
    check(
        "XRSTOR of what is not there raises #GP",
        is_gp(execute!("xrstor64 [{}]", in(reg) DEVICE, in("eax") 3, in("edx") 0)),
    );
}
