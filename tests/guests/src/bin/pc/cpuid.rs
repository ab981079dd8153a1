//! CPUID: what is shown, and what follows the guest.

use vireo_test_guests::cpu::{self, cpuid, cr4};
use vireo_test_guests::{check, check_detail, check_equal, execute, time};

const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;

pub fn check_all() {
    let [highest, b, c, d] = cpuid(0, 0);
    check_detail(
        "CPUID has leaf 0xb and no unreasonable number of leaves",
        (0xb..=0x20).contains(&highest),
        format_args!("highest leaf {highest:#x}"),
    );
    check_equal(
        "CPUID vendor",
        [b, d, c],
        [0x756e_6547, 0x4965_6e69, 0x6c65_746e],
    );
    let [_, _, c, d] = cpuid(1, 0);
    check("CPUID hides VMX", c & 1 << 5 == 0);
    check("CPUID hides SMX", c & 1 << 6 == 0);
    check("CPUID hides MONITOR", c & 1 << 3 == 0);
    check("CPUID shows x2APIC", c & 1 << 21 != 0);
    check("CPUID shows the TSC-deadline timer", c & 1 << 24 != 0);
    check("CPUID shows a hypervisor", c & 1 << 31 != 0);
    check("CPUID shows the local APIC", d & 1 << 9 != 0);
    check(
        "CPUID shows MTRRs, PAT and MSRs",
        d & (1 << 5 | 1 << 12 | 1 << 16) == (1 << 5 | 1 << 12 | 1 << 16),
    );
    check("CPUID shows a single logical processor", d & 1 << 28 == 0);

    let [highest, b, c, d] = cpuid(HYPERVISOR, 0);
    check_detail(
        "CPUID hypervisor leaves reach the frequency leaf",
        (HYPERVISOR + 0x10..HYPERVISOR + 0x100).contains(&highest),
        format_args!("highest hypervisor leaf {highest:#x}"),
    );
    check_equal(
        "CPUID hypervisor signature is KVM's",
        [b, c, d],
        [0x4b4d_564b, 0x564b_4d56, 0x4d],
    );
    check("CPUID names a TSC frequency", time::tsc_hz() > 1_000_000);
    // The APIC's timer is no faster than the time-stamp counter.
    check(
        "CPUID names an APIC bus frequency",
        (1_000_001..=time::tsc_hz()).contains(&time::apic_hz()),
    );

    let [highest, ..] = cpuid(EXTENDED, 0);
    check(
        "CPUID extended leaves reach address sizes",
        highest >= EXTENDED + 8,
    );
    let [.., d] = cpuid(EXTENDED + 1, 0);
    check(
        "CPUID shows long mode, NX and SYSCALL",
        d & (1 << 29 | 1 << 20 | 1 << 11) == (1 << 29 | 1 << 20 | 1 << 11),
    );
    let bits = cpuid(EXTENDED + 8, 0)[0] & 0xff;
    check_detail(
        "CPUID physical address width",
        (36..=52).contains(&bits),
        format_args!("{bits} bits"),
    );

    let [_, ebx, ..] = cpuid(7, 0);
    check("CPUID hides SGX", ebx & 1 << 2 == 0);
    check_equal(
        "CPUID above the highest leaf gives the highest leaf's data",
        cpuid(0x0fff_ffff, 0),
        cpuid(cpuid(0, 0)[0], 0),
    );

    let (mut b, mut c, mut d) = (0, 0, 0);
    let fault = execute!(
        "mov {keep}, rbx",
        // REX.W, which means nothing here.
        ".byte 0x48, 0x0f, 0xa2",
        "mov {b:e}, ebx",
        "mov rbx, {keep}",
        keep = out(reg) _,
        b = out(reg) b,
        inout("eax") 0 => _,
        inout("ecx") 0 => c,
        out("edx") d,
    );
    check_equal(
        "CPUID with a prefix is CPUID",
        (fault, [b, d, c]),
        (None, [0x756e_6547, 0x4965_6e69, 0x6c65_746e]),
    );

    os_xsave();
}

fn os_xsave() {
    let shown = || cpuid(1, 0)[2] & 1 << 27 != 0;
    let old = cpu::cr4();
    check("CPUID OSXSAVE is clear while CR4.OSXSAVE is", !shown());
    if cpuid(1, 0)[2] & 1 << 26 == 0 {
        return;
    }
    check_equal(
        "CR4.OSXSAVE can be set",
        cpu::set_cr4(old | cr4::OSXSAVE),
        None,
    );
    check("CPUID OSXSAVE follows CR4.OSXSAVE", shown());
    cpu::set_cr4(old);
    check("CPUID OSXSAVE follows CR4.OSXSAVE back", !shown());
}
