//! RDMSR and WRMSR.

use vireo_test_guests::cpu::{self, cpuid, msr, rdmsr, wrmsr};
use vireo_test_guests::exceptions::is_gp;
use vireo_test_guests::{check, check_detail, check_equal};

const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// An MSR number that means nothing.
const UNKNOWN: u32 = 0x1234_5678;

pub fn check_all() {
    check(
        "RDMSR of an unknown MSR raises #GP",
        is_gp(rdmsr(UNKNOWN).err()),
    );
    check(
        "WRMSR of an unknown MSR raises #GP",
        is_gp(wrmsr(UNKNOWN, 0)),
    );
    efer();
    pat();
    apic_base();
    time_stamp_counter();
    mtrrs();

    check_equal(
        "FEATURE_CONTROL is locked without VMX",
        rdmsr(msr::FEATURE_CONTROL),
        Ok(1),
    );
    check(
        "WRMSR of FEATURE_CONTROL raises #GP",
        is_gp(wrmsr(msr::FEATURE_CONTROL, 5)),
    );
    check(
        "RDMSR of VMX_BASIC raises #GP",
        is_gp(rdmsr(msr::VMX_BASIC).err()),
    );
    const FAST_STRINGS: u64 = 1;
    let enhanced = cpuid(7, 0)[1] & 1 << 9 != 0;
    check(
        "MISC_ENABLE has fast strings if CPUID has enhanced ones",
        rdmsr(msr::MISC_ENABLE).is_ok_and(|value| value & FAST_STRINGS != 0 || !enhanced),
    );

    for (name, number) in [
        ("LSTAR keeps what is written", msr::LSTAR),
        ("FS_BASE keeps what is written", msr::FS_BASE),
        ("KERNEL_GS_BASE keeps what is written", msr::KERNEL_GS_BASE),
    ] {
        let old = rdmsr(number).unwrap_or(0);
        wrmsr(number, 0xffff_8000_1234_5000);
        check_equal(name, rdmsr(number), Ok(0xffff_8000_1234_5000));
        wrmsr(number, old);
    }
    check(
        "WRMSR of a non-canonical FS_BASE raises #GP",
        is_gp(wrmsr(msr::FS_BASE, 1 << 62)),
    );
    check(
        "WRMSR of a non-canonical LSTAR raises #GP",
        is_gp(wrmsr(msr::LSTAR, 1 << 62)),
    );
}

fn efer() {
    let efer = rdmsr(msr::EFER).unwrap_or(0);
    check_equal(
        "EFER is in long mode",
        efer & (EFER_LME | EFER_LMA),
        EFER_LME | EFER_LMA,
    );
    check(
        "WRMSR of EFER with a reserved bit raises #GP",
        is_gp(wrmsr(msr::EFER, efer | 1 << 63)),
    );
    check(
        "WRMSR of EFER.LME with paging on raises #GP",
        is_gp(wrmsr(msr::EFER, efer & !EFER_LME)),
    );
    check_equal(
        "WRMSR of EFER.SCE is taken",
        wrmsr(msr::EFER, efer | 1),
        None,
    );
    check_equal("EFER keeps SCE", rdmsr(msr::EFER), Ok(efer | 1));
    wrmsr(msr::EFER, efer & !EFER_LMA);
    check_equal("EFER.LMA cannot be written", rdmsr(msr::EFER), Ok(efer));
}

fn pat() {
    let pat = rdmsr(msr::PAT);
    check_equal("PAT has its power-on value", pat, Ok(0x0007_0406_0007_0406));
    check(
        "WRMSR of PAT with type 2 raises #GP",
        is_gp(wrmsr(msr::PAT, 0x0007_0406_0007_0402)),
    );
    wrmsr(msr::PAT, 0x0107_0406_0007_0406);
    check_equal(
        "PAT keeps what is written",
        rdmsr(msr::PAT),
        Ok(0x0107_0406_0007_0406),
    );
    wrmsr(msr::PAT, pat.unwrap_or(0));
}

fn apic_base() {
    let base = rdmsr(msr::APIC_BASE).unwrap_or(0);
    check_equal(
        "APIC_BASE says bootstrap processor, xAPIC, at 0xfee00000",
        base,
        0xfee0_0900,
    );
    check(
        "WRMSR of APIC_BASE with a reserved bit raises #GP",
        is_gp(wrmsr(msr::APIC_BASE, base | 1)),
    );
    check(
        "WRMSR of APIC_BASE beyond MAXPHYADDR raises #GP",
        is_gp(wrmsr(msr::APIC_BASE, base | 1 << 52)),
    );
    check(
        "WRMSR of APIC_BASE with x2APIC but disabled raises #GP",
        is_gp(wrmsr(msr::APIC_BASE, base & !(1 << 11) | 1 << 10)),
    );
}

fn time_stamp_counter() {
    let first = cpu::rdtsc();
    let by_msr = rdmsr(msr::TSC).unwrap_or(0);
    let last = cpu::rdtsc();
    check_detail(
        "IA32_TIME_STAMP_COUNTER is RDTSC's counter",
        first < by_msr && by_msr < last,
        format_args!("{first} {by_msr} {last}"),
    );
    let adjust = rdmsr(msr::TSC_ADJUST).unwrap_or(1 << 63);
    let jump = 1 << 40;
    let before = cpu::rdtsc();
    wrmsr(msr::TSC_ADJUST, adjust.wrapping_add(jump));
    let passed = cpu::rdtsc().wrapping_sub(before);
    check_detail(
        "TSC_ADJUST moves the counter",
        passed >= jump && passed < jump + 100_000,
        format_args!("by {passed}"),
    );
    wrmsr(msr::TSC, cpu::rdtsc().wrapping_sub(jump));
    let back = rdmsr(msr::TSC_ADJUST).unwrap_or(0);
    check_detail(
        "a write to the counter moves TSC_ADJUST",
        (back.wrapping_sub(adjust) as i64).abs() < 100_000,
        format_args!("{adjust:#x} {back:#x}"),
    );
    wrmsr(msr::TSC_ADJUST, adjust);
}

fn mtrrs() {
    let cap = rdmsr(msr::MTRR_CAP).unwrap_or(0);
    check_detail(
        "MTRRCAP shows variable and fixed ranges",
        cap & 0xff > 0 && cap & 1 << 8 != 0,
        format_args!("{cap:#x}"),
    );
    let default = rdmsr(msr::MTRR_DEF_TYPE).unwrap_or(0);
    check("MTRRs are on", default & 1 << 11 != 0);
    check(
        "WRMSR of MTRRCAP raises #GP",
        is_gp(wrmsr(msr::MTRR_CAP, cap)),
    );
    check(
        "WRMSR of MTRR_DEF_TYPE with type 2 raises #GP",
        is_gp(wrmsr(msr::MTRR_DEF_TYPE, default & !7 | 2)),
    );
    let last = 0x200 + 2 * (cap as u32 & 0xff) - 1;
    check("the last variable MTRR is there", rdmsr(last).is_ok());
    check("the one beyond it is not", is_gp(rdmsr(last + 1).err()));
}
