//! Control registers: reserved bits, paging switched, bits that work.

use vireo_test_guests::cpu::{self, cpuid, cr0, cr4, msr};
use vireo_test_guests::exceptions::{self, Exception, is_gp, is_ud, vector};
use vireo_test_guests::paging::{self, entry};
use vireo_test_guests::{check, check_equal, execute, memory};

pub fn check_all() {
    control_register_0();
    control_register_4();
    control_register_8();
    write_protection();
    task_switched();
    extended_states();
    cache_control();
    debug_registers();
    pages();
}

fn control_register_0() {
    let old = cpu::cr0();
    check(
        "CR0.NW without CD raises #GP",
        is_gp(cpu::set_cr0(old | cr0::NW)),
    );
    check(
        "CR0.PG without PE raises #GP",
        is_gp(cpu::set_cr0(old & !cr0::PE)),
    );
    check(
        "CR0 with a bit above 31 raises #GP",
        is_gp(cpu::set_cr0(old | 1 << 40)),
    );
    check(
        "CR0.PG cannot be cleared in 64-bit mode",
        is_gp(cpu::set_cr0(old & !cr0::PG)),
    );
    check_equal("CR0 is as before after that", cpu::cr0(), old);
    check_equal("CR0.CD can be set", cpu::set_cr0(old | cr0::CD), None);
    check_equal("CR0 shows CD", cpu::cr0(), old | cr0::CD);
    cpu::set_cr0(old);
    check_equal("CR0 shows CD cleared", cpu::cr0(), old);
}

fn control_register_4() {
    let old = cpu::cr4();
    check_equal("CR4 shows nothing that was not set", old, cr4::PAE);
    check(
        "CR4 with a reserved bit raises #GP",
        is_gp(cpu::set_cr4(old | 1 << 15)),
    );
    check(
        "CR4 with a bit above 31 raises #GP",
        is_gp(cpu::set_cr4(old | 1 << 32)),
    );
    check("CR4.VMXE raises #GP", is_gp(cpu::set_cr4(old | cr4::VMXE)));
    check(
        "CR4.PAE cannot be cleared in long mode",
        is_gp(cpu::set_cr4(old & !cr4::PAE)),
    );
    check_equal("CR4 is as before after that", cpu::cr4(), old);
    if cpuid(1, 0)[2] & 1 << 17 != 0 {
        check_equal("CR4.PCIDE can be set", cpu::set_cr4(old | cr4::PCIDE), None);
        let page = cpu::cr3();
        check_equal(
            "CR3 takes a process-context identifier",
            cpu::set_cr3(page | 5),
            None,
        );
        check_equal("CR3 shows it", cpu::cr3(), page | 5);
        check_equal(
            "CR3 bit 63 asks for no flush and is not kept",
            cpu::set_cr3(page | 5 | 1 << 63),
            None,
        );
        check_equal("CR3 shows no bit 63", cpu::cr3(), page | 5);
        cpu::set_cr4(old);
        cpu::set_cr3(page | 5);
        check(
            "CR4.PCIDE with an identifier in CR3 raises #GP",
            is_gp(cpu::set_cr4(old | cr4::PCIDE)),
        );
        cpu::set_cr3(page);
    }
    check(
        "CR3 beyond MAXPHYADDR raises #GP",
        is_gp(cpu::set_cr3(cpu::cr3() | 1 << 60)),
    );
}

fn control_register_8() {
    check_equal("CR8 takes 5", cpu::set_cr8(5), None);
    check_equal("CR8 shows 5", cpu::cr8(), 5);
    check("CR8 with 16 raises #GP", is_gp(cpu::set_cr8(16)));
    cpu::set_cr8(0);
}

fn write_protection() {
    let page = paging::map(0, paging::scratch(0), entry::PRESENT);
    let write = || execute!("mov byte ptr [{}], 1", in(reg) page);
    let fault = write();
    check_equal(
        "a write to a read-only page raises #PF",
        fault.map(|e| (e.vector, e.error, e.cr2)),
        Some((vector::PAGE_FAULT, 3, page)),
    );
    let old = cpu::cr0();
    check_equal("CR0.WP can be cleared", cpu::set_cr0(old & !cr0::WP), None);
    check_equal("without WP the write works", write(), None);
    cpu::set_cr0(old);
    check("with WP it faults again", write().is_some());
    paging::map(0, 0, 0);
}

fn task_switched() {
    let old = cpu::cr0();
    check_equal("CR0.TS can be set", cpu::set_cr0(old | cr0::TS), None);
    check_equal(
        "x87 with TS raises #NM",
        execute!("fninit").map(|e| e.vector),
        Some(vector::DEVICE_NOT_AVAILABLE),
    );
    check_equal("CLTS works", execute!("clts"), None);
    check_equal("CLTS clears TS", cpu::cr0(), old);
    check_equal("x87 works then", execute!("fninit"), None);
    let status = old as u16 | cr0::TS as u16;
    check_equal("LMSW works", execute!("lmsw {:x}", in(reg) status), None);
    check_equal("LMSW sets TS", cpu::cr0(), old | cr0::TS);
    check_equal(
        "LMSW without PE works",
        execute!("lmsw {:x}", in(reg) old as u16 & !1),
        None,
    );
    check_equal("LMSW clears TS and not PE", cpu::cr0(), old);
    let mut word = 0u64;
    check_equal("SMSW works", execute!("smsw {}", out(reg) word), None);
    check_equal("SMSW shows CR0", word & 0xffff, old & 0xffff);
}

fn extended_states() {
    let xsetbv = |index: u32, value: u64| execute!("xsetbv", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32);
    if cpuid(1, 0)[2] & 1 << 26 == 0 {
        return;
    }
    let old = cpu::cr4();
    check("XSETBV without CR4.OSXSAVE raises #UD", is_ud(xsetbv(0, 1)));
    cpu::set_cr4(old | cr4::OSXSAVE);
    check_equal("XSETBV of x87 state works", xsetbv(0, 1), None);
    check("XSETBV of no state raises #GP", is_gp(xsetbv(0, 0)));
    check("XSETBV of AVX without SSE raises #GP", is_gp(xsetbv(0, 5)));
    check(
        "XSETBV of an unknown state raises #GP",
        is_gp(xsetbv(0, 1 | 1 << 62)),
    );
    check("XSETBV of another register raises #GP", is_gp(xsetbv(1, 1)));
    let supported = cpuid(0xd, 0)[0];
    check_equal(
        "XSETBV of all that CPUID names works",
        xsetbv(0, supported.into()),
        None,
    );
    let (mut low, mut high) = (0u32, 0u32);
    execute!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high);
    check_equal("XGETBV shows it", (low, high), (supported, 0));
    let size = cpuid(0xd, 0);
    check_equal(
        "CPUID gives the area's size for all states",
        size[1],
        size[2],
    );
    xsetbv(0, 1);
    check_equal(
        "CPUID gives the area's size for x87 state",
        cpuid(0xd, 0)[1],
        576,
    );
    cpu::set_cr4(old);
}

fn cache_control() {
    check_equal("WBINVD works", execute!("wbinvd"), None);
    check_equal("INVD works", execute!("invd"), None);
    check(
        "RDPMC raises #GP",
        is_gp(execute!("rdpmc", in("ecx") 0, out("eax") _, out("edx") _)),
    );
    check(
        "MONITOR raises #UD",
        is_ud(execute!("monitor", in("rax") 0x20_0000u64, in("ecx") 0, in("edx") 0)),
    );
    check(
        "MWAIT raises #UD",
        is_ud(execute!("mwait", in("eax") 0, in("ecx") 0)),
    );
    check_equal("PAUSE works", execute!("pause"), None);
}

fn debug_registers() {
    let old = cpu::dr7();
    check_equal("DR7 has its reset value", old, 0x400);
    check_equal("MOV to DR0 works", cpu::set_dr0(0x1234_5678), None);
    core::hint::black_box(cpuid(0, 0));
    check_equal("DR0 survives an exit", cpu::dr0(), 0x1234_5678);
    check_equal("MOV to DR7 works", cpu::set_dr7(0x402), None);
    core::hint::black_box(cpuid(0, 0));
    check_equal("DR7 survives an exit", cpu::dr7(), 0x402);
    check(
        "MOV to DR7 with a high bit raises #GP",
        is_gp(cpu::set_dr7(1 << 32)),
    );
    cpu::set_dr7(old);
    let de = cpu::cr4() | cr4::DE;
    cpu::set_cr4(de);
    check(
        "with CR4.DE, DR4 raises #UD",
        is_ud(execute!("mov {}, dr4", out(reg) _)),
    );
    cpu::set_cr4(de & !cr4::DE);

    // A breakpoint on a write of memory.
    let at = paging::scratch(0);
    cpu::set_dr0(at);
    cpu::set_dr7(0x1_0402);
    exceptions::on(vector::DEBUG, |_| {});
    memory::write8(at, 1);
    check_equal(
        "a data breakpoint traps",
        exceptions::count(vector::DEBUG),
        1,
    );
    check("DR6 names it", cpu::dr6() & 0xf == 1);
    cpu::set_dr7(old);
    cpu::set_dr6(0xffff_0ff0);
    exceptions::off(vector::DEBUG);
}

fn pages() {
    let (a, b) = (paging::scratch(0), paging::scratch(1));
    memory::write64(a, 1);
    memory::write64(b, 2);
    let bits = entry::PRESENT | entry::WRITABLE;
    let page = paging::map(1, a, bits);
    check_equal("a page shows its frame", memory::read64(page), 1);
    paging::map(1, b, bits);
    check_equal("INVLPG forgets the old frame", memory::read64(page), 2);
    memory::write64(paging::table_entry(1), a | bits);
    cpu::set_cr3(cpu::cr3());
    check_equal("MOV to CR3 forgets the old frame", memory::read64(page), 1);
    paging::map(1, 0, 0);
    let read = execute!("mov {}, [{}]", out(reg) _, in(reg) page);
    check_equal(
        "a read of a missing page raises #PF",
        read.map(|e| (e.vector, e.error, e.cr2)),
        Some((vector::PAGE_FAULT, 0, page)),
    );
    paging::map(1, a, bits | entry::NO_EXECUTE);
    memory::write_code(a, &[0xc3]);
    let call = || execute!("call {}", in(reg) page, clobber_abi("C"));
    check_equal(
        "code in a no-execute page raises #PF",
        call().map(|e: Exception| (e.vector, e.error, e.cr2)),
        Some((vector::PAGE_FAULT, 0x11, page)),
    );
    paging::map(1, a, bits);
    check_equal("code in another page runs", call(), None);
    let reserved = 1 << 51;
    paging::map(1, a | reserved, bits);
    let width = cpuid(0x8000_0008, 0)[0] & 0xff;
    if width <= 51 {
        let read = execute!("mov {}, [{}]", out(reg) _, in(reg) page);
        check_equal(
            "an address beyond MAXPHYADDR raises #PF with the reserved bit",
            read.map(|e| (e.vector, e.error)),
            Some((vector::PAGE_FAULT, 9)),
        );
    }
    paging::map(1, 0, 0);
    check(
        "EFER is as before",
        cpu::rdmsr(msr::EFER).is_ok_and(|efer| efer == 0xd00),
    );
}
