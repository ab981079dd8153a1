//! Instructions on a device in memory, where the CPU leaves them to the hypervisor: the
//! test device's memory, all of which exits.
#![no_std]
#![no_main]

mod breakpoints;
mod fpu;
mod returns;

use vireo_test_guests::cpu::{self, cr4};
use vireo_test_guests::descriptors::FAULT_STACK_INDEX;
use vireo_test_guests::exceptions::{self, Exception, is_gp, vector};
use vireo_test_guests::memory::{read8, read32, read64, write8, write32, write64};
use vireo_test_guests::paging::{self, PAGE, entry};
use vireo_test_guests::{Shared, check, check_equal, execute, io_apic, port};

vireo_test_guests::guest!(run);

/// The device: 64 KiB that behave as memory.
const DEVICE: u64 = 0xff00_0000;
/// A port that reads as it was last written.
const ECHO: u16 = 0xe0;
const PRESENT_WRITABLE: u64 = entry::PRESENT | entry::WRITABLE;
const WRITE: u64 = 2;
const PRESENT: u64 = 1;

fn run() {
    straddling();
    strings();
    string_ports();
    locked();
    known();
    stack();
    faults();
    accessed_and_dirty();
    vectors();
    fpu::run();
    system();
    steps();
    compatibility();
    upper_half_of_a_control_register();
    returns::run();
    breakpoints::run();
}

/// A page of the device, and behind it one of memory, and the other way round.
fn straddling() {
    let memory = paging::scratch(0);
    let low = paging::map(0, DEVICE, PRESENT_WRITABLE);
    let at = low + PAGE - 3;
    paging::map(1, memory, PRESENT_WRITABLE);
    paging::map(2, DEVICE + PAGE, PRESENT_WRITABLE);
    write64(at, 0x8877_6655_4433_2211);
    check_equal(
        "a write to a device and memory",
        (read32(DEVICE + PAGE - 4) >> 8, read64(memory) << 24 >> 24),
        (0x33_2211, 0x88_7766_5544),
    );
    check_equal("a read of both", read64(at), 0x8877_6655_4433_2211);
    let at = low + 2 * PAGE - 6;
    write64(at, 0x0102_0304_0506_0708);
    check_equal(
        "a write to memory and a device",
        (
            read64(memory + PAGE - 8) >> 16,
            read64(DEVICE + PAGE) & 0xffff,
        ),
        (0x0304_0506_0708, 0x0102),
    );
    let mut sum = 0x1000u64;
    execute!("lock xadd [{}], {}", in(reg) at, inout(reg) sum);
    check_equal(
        "LOCK XADD of both",
        (sum, read64(at)),
        (0x0102_0304_0506_0708, 0x0102_0304_0506_1708),
    );
    // A register of the I/O APIC behind a page of memory, again and again.
    paging::map(3, memory, PRESENT_WRITABLE);
    let io_apic = paging::map(4, 0xfec0_0000, PRESENT_WRITABLE | entry::UNCACHEABLE);
    write32(io_apic, 1);
    for _ in 0..4 {
        write32(io_apic - 2, 0x0005_abcd);
    }
    check_equal(
        "a write to memory and to the index of the I/O APIC",
        (read32(io_apic), read32(memory + PAGE - 4) >> 16),
        (5, 0xabcd),
    );
    for page in 0..5 {
        paging::map(page, 0, 0);
    }
}

fn strings() {
    const BYTES: u64 = 9000;
    let (from, to) = (paging::scratch(0), DEVICE + 100);
    for at in 0..BYTES {
        write8(from + at, (at * 7 % 251) as u8);
    }
    let copy = |to: u64, from: u64| {
        let (mut source, mut target, mut count) = (from, to, BYTES);
        execute!(
            "rep movsb",
            inout("rsi") source,
            inout("rdi") target,
            inout("rcx") count
        );
        check_equal(
            "where REP MOVSB ends",
            (source, target, count),
            (from + BYTES, to + BYTES, 0),
        );
    };
    // Interrupts come in between.
    cpu::enable_interrupts();
    copy(to, from);
    cpu::disable_interrupts();
    let same = |a: u64, b: u64| (0..BYTES).all(|at| read8(a + at) == read8(b + at));
    check("REP MOVSB to a device over pages", same(from, to));
    let mut left = BYTES;
    write8(from + 8000, !read8(from + 8000));
    execute!("repe cmpsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") left);
    check_equal("REPE CMPSB finds the difference", BYTES - left, 8001);
    execute!("rep stosq", inout("rdi") to => _, inout("rcx") 100u64 => _, in("rax") 0x5a5a_5a5a_5a5a_5a5au64);
    let mut left = 2000u64;
    execute!("repe scasb", inout("rdi") to => _, inout("rcx") left, in("al") 0x5au8);
    check_equal("REP STOSQ, then REPE SCASB", 2000 - left, 801);
    execute!(
        "std",
        "rep movsw",
        "cld",
        inout("rsi") from + 20 => _,
        inout("rdi") to + 20 => _,
        inout("rcx") 11u64 => _,
    );
    check(
        "backwards",
        (0..22).all(|at| read8(from + at) == read8(to + at)),
    );
}

fn string_ports() {
    write64(DEVICE, 0x1122_3344_5566_7788);
    execute!("rep outsb", inout("rsi") DEVICE => _, inout("rcx") 4u64 => _, in("dx") ECHO);
    let mut at = DEVICE + PAGE - 500;
    let mut end = at + 1000;
    execute!("rep insb", inout("rdi") at, inout("rcx") 1000u64 => _, in("dx") ECHO);
    check_equal(
        "REP OUTSB from a device, REP INSB to it",
        (at, read8(end - 1), read8(end - 1000)),
        (end, 0x55, 0x55),
    );
    // A port whose accesses do not exit.
    execute!(
        "mov rdi, rsi",
        "rep outsb",
        "insb",
        inout("rsi") DEVICE => at,
        out("rdi") end,
        inout("rcx") 4u64 => _,
        in("dx") 0x80u16,
    );
    check_equal(
        "REP OUTSB from a device to port 0x80, INSB to it",
        (at, end, read8(DEVICE)),
        (DEVICE + 4, DEVICE + 1, port::in8(0x80)),
    );
    let page = paging::map(0, DEVICE, PRESENT_WRITABLE);
    let fault = execute!("rep insw", inout("rdi") page + PAGE - 7 => _, inout("rcx") 10u64 => _, in("dx") ECHO);
    check_equal(
        "REP INSW into a page that is not there",
        fault.map(|fault| (fault.vector, fault.error, fault.cr2)),
        Some((vector::PAGE_FAULT, WRITE, page + PAGE)),
    );
    paging::map(0, 0, 0);
}

fn locked() {
    write64(DEVICE, 5);
    write64(DEVICE + 8, 6);
    let (mut low, mut high) = (5u64, 6u64);
    let mut equal = 0u64;
    execute!(
        "xchg rbx, {one}",
        "lock cmpxchg16b [{at}]",
        "setz {equal:l}",
        "xchg rbx, {one}",
        at = in(reg) DEVICE,
        one = inout(reg) 7u64 => _,
        equal = inout(reg) equal,
        inout("rax") low,
        inout("rdx") high,
        in("rcx") 8u64,
    );
    check_equal(
        "LOCK CMPXCHG16B",
        (equal, read64(DEVICE), read64(DEVICE + 8), low, high),
        (1, 7, 8, 5, 6),
    );
    execute!("lock bts [{}], {}", in(reg) DEVICE + 64, in(reg) 100i64);
    execute!("lock btc [{}], {}", in(reg) DEVICE + 64, in(reg) -1i64);
    check_equal(
        "bits beyond the operand",
        (read64(DEVICE + 72), read64(DEVICE + 56) >> 63),
        (1 << 36, 1),
    );
    low = 3;
    high = 0;
    execute!("mul qword ptr [{}]", in(reg) DEVICE, inout("rax") low, inout("rdx") high);
    check_equal("MUL", (low, high), (21, 0));
    check_equal(
        "LOCK where it must not be raises #UD",
        execute!(".byte 0xf0, 0x8b, 0x03").map(|fault| fault.vector),
        Some(vector::INVALID_OPCODE),
    );
}

/// The index of the I/O APIC, again and again: it is known what these do.
fn known() {
    let index = io_apic::BASE;
    for _ in 0..4 {
        write32(index, 0x10);
        let mut old = 0x33u32;
        let mut flags = 0u64;
        execute!(
            "inc dword ptr [{at}]",
            "lock or dword ptr [{at}], 2",
            "neg byte ptr [{at}]",
            "not byte ptr [{at}]",
            "lock dec dword ptr [{at}]",
            "pushfq",
            "pop {flags}",
            "xchg [{at}], {old:e}",
            at = in(reg) index,
            old = inout(reg) old,
            flags = inout(reg) flags,
        );
        check_equal(
            "known arithmetic on a device",
            (old, read32(index), flags & 0x8d5),
            (0x11, 0x33, 0x05),
        );
    }
}

fn stack() {
    let top = DEVICE + 0x800;
    let mut value = 0u64;
    execute!(
        "mov {old}, rsp",
        "mov rsp, {top}",
        "push 0x1234",
        "push qword ptr [{top} - 8]",
        "pop qword ptr [{top} + 8]",
        "call 3f",
        "jmp 4f",
        "3: pushfq",
        "popfq",
        "ret",
        "4: enter 16, 0",
        "leave",
        "pop {value}",
        "mov rsp, {old}",
        old = out(reg) _,
        top = in(reg) top,
        value = inout(reg) value,
    );
    check_equal(
        "a stack in a device",
        (value, read64(top + 8)),
        (0x1234, 0x1234),
    );
}

fn faults() {
    // The stack is in a device now and then.
    exceptions::set_interrupt_stack(vector::PAGE_FAULT, FAULT_STACK_INDEX);
    let page = paging::map(0, 0, 0);
    let not_there =
        |fault: Option<Exception>| fault.map(|fault| (fault.vector, fault.error, fault.cr2));
    let (source, target) = (DEVICE + 8, page + 8);
    check_equal(
        "MOVSB from a device to a page that is not there",
        not_there(execute!("movsb", inout("rsi") source => _, inout("rdi") target => _)),
        Some((vector::PAGE_FAULT, WRITE, target)),
    );
    check_equal(
        "the same the other way",
        not_there(execute!("movsb", inout("rsi") target => _, inout("rdi") source => _)),
        Some((vector::PAGE_FAULT, 0, target)),
    );
    let page = paging::map(0, paging::scratch(0), entry::PRESENT);
    check_equal(
        "POP from the stack in a device to a page that is not writable",
        not_there(execute!(
            "mov {old}, rsp",
            "mov rsp, {top}",
            "pop qword ptr [{page}]",
            old = out(reg) _,
            top = in(reg) DEVICE,
            page = in(reg) page,
        )),
        Some((vector::PAGE_FAULT, WRITE | PRESENT, page)),
    );
    // Two pages, of which the second is not writable: the device has not been written.
    let device = paging::map(1, DEVICE, PRESENT_WRITABLE);
    paging::map(2, paging::scratch(0), entry::PRESENT);
    write32(DEVICE + PAGE - 4, 0xaabb_ccdd);
    check_equal(
        "a write that ends in a page that is not writable",
        not_there(execute!("mov [{}], {}", in(reg) device + PAGE - 4, in(reg) 0u64)),
        Some((vector::PAGE_FAULT, WRITE | PRESENT, device + PAGE)),
    );
    check_equal(
        "it has changed nothing",
        read32(DEVICE + PAGE - 4),
        0xaabb_ccdd,
    );
    write64(DEVICE, 0);
    check_equal(
        "DIV by zero in a device",
        execute!("div qword ptr [{}]", in(reg) DEVICE, inout("rax") 1u64 => _, inout("rdx") 0u64 => _)
            .map(|fault| fault.vector),
        Some(vector::DIVIDE),
    );
    write64(DEVICE, 1 << 62);
    check(
        "JMP to where a device says, which is not canonical",
        is_gp(execute!("jmp qword ptr [{}]", in(reg) DEVICE)),
    );
    for page in 0..3 {
        paging::map(page, 0, 0);
    }
    exceptions::set_interrupt_stack(vector::PAGE_FAULT, 0);
}

/// The CPU has not written the page: only the hypervisor can say that it was.
fn accessed_and_dirty() {
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    let bits = |index| read64(paging::table_entry(index)) & (ACCESSED | DIRTY);
    let page = paging::map(0, paging::scratch(0), PRESENT_WRITABLE);
    let other = paging::map(1, paging::scratch(1), PRESENT_WRITABLE);
    check_equal("no bits yet", (bits(0), bits(1)), (0, 0));
    execute!("movsb", inout("rsi") DEVICE => _, inout("rdi") page => _);
    check_equal("MOVSB from a device sets dirty", bits(0), ACCESSED | DIRTY);
    execute!("movsb", inout("rsi") other => _, inout("rdi") DEVICE => _);
    check_equal(
        "MOVSB to a device sets accessed",
        bits(1) & ACCESSED,
        ACCESSED,
    );
    paging::map(0, 0, 0);
    paging::map(1, 0, 0);
}

fn vectors() {
    let old = cpu::cr4();
    cpu::set_cr4(old | cr4::OSFXSR);
    write64(DEVICE, 0x1111_2222_3333_4444);
    write64(DEVICE + 8, 0x5555_6666_7777_8888);
    execute!(
        "movdqa xmm3, [{at}]",
        "movups [{at} + 0x21], xmm3",
        "movntdq [{at} + 0x40], xmm3",
        "movhps [{at} + 0x60], xmm3",
        "movq xmm12, [{at} + 8]",
        "movlhps xmm12, xmm3",
        "movaps [{at} + 0x70], xmm12",
        at = in(reg) DEVICE,
    );
    check_equal(
        "SSE moves",
        (
            read64(DEVICE + 0x21),
            read64(DEVICE + 0x29),
            read64(DEVICE + 0x48),
            read64(DEVICE + 0x60),
        ),
        (
            0x1111_2222_3333_4444,
            0x5555_6666_7777_8888,
            0x5555_6666_7777_8888,
            0x5555_6666_7777_8888,
        ),
    );
    check_equal(
        "MOVQ and MOVAPS",
        (read64(DEVICE + 0x70), read64(DEVICE + 0x78)),
        (0x5555_6666_7777_8888, 0x1111_2222_3333_4444),
    );
    execute!("fninit", "movq mm5, [{at}]", "movq [{at} + 0x100], mm5", "emms", at = in(reg) DEVICE);
    check_equal(
        "an MMX register",
        read64(DEVICE + 0x100),
        0x1111_2222_3333_4444,
    );
    let page = paging::map(0, DEVICE, PRESENT_WRITABLE);
    check_equal(
        "MOVUPS into a page that is not there",
        execute!("movups [{}], xmm3", in(reg) page + PAGE - 8)
            .map(|fault| (fault.vector, fault.error, fault.cr2)),
        Some((vector::PAGE_FAULT, WRITE, page + PAGE)),
    );
    paging::map(0, 0, 0);
    avx();
    cpu::set_cr4(old);
}

fn avx() {
    const XSAVE: u32 = 1 << 26;
    const AVX: u32 = 1 << 28;
    let [_, _, features, _] = cpu::cpuid(1, 0);
    if features & (XSAVE | AVX) != XSAVE | AVX {
        return;
    }
    cpu::set_cr4(cpu::cr4() | cr4::OSXSAVE);
    execute!("xsetbv", in("ecx") 0, in("eax") 7, in("edx") 0);
    execute!(
        "vpxor ymm1, ymm1, ymm1",
        "vpcmpeqd ymm9, ymm9, ymm9",
        "vmovdqu [{at}], ymm9",
        "vmovdqu xmm9, [{at} + 2]",
        "vmovdqu [{at} + 0x40], ymm9",
        "vmovdqa ymm9, [{at} + 0x20]",
        "vmovq [{at} + 0x80], xmm9",
        at = in(reg) DEVICE,
    );
    check_equal(
        "AVX moves, and what they clear",
        (
            read64(DEVICE + 0x18),
            read64(DEVICE + 0x48),
            read64(DEVICE + 0x50),
            read64(DEVICE + 0x80),
        ),
        (u64::MAX, u64::MAX, 0, read64(DEVICE + 0x20)),
    );
}

fn system() {
    let device = DEVICE + 0x400;
    // SGDT and LGDT by way of the device.
    execute!("sgdt [{at}]", "lgdt [{at}]", at = in(reg) device);
    check("SGDT to a device", read64(device) & 0xffff == 12 * 8 - 1);
    let mut word = 0u64;
    execute!("smsw [{at}]", "movzx {word:e}, word ptr [{at}]", at = in(reg) device, word = inout(reg) word);
    check_equal("SMSW", word, cpu::cr0() & 0xffff);
    execute!(
        "mov [{at}], ss",
        "mov ss, [{at}]",
        "mov [{at}], ds",
        "mov es, [{at}]",
        at = in(reg) device,
    );
    write32(device, 0x1230);
    check_equal(
        "MOV ES from a device with a selector beyond the table",
        execute!("mov es, [{}]", in(reg) device).map(|fault| (fault.vector, fault.error)),
        Some((vector::GENERAL_PROTECTION, 0x1230)),
    );
    // The trap behind MOV SS comes behind the next instruction.
    exceptions::on(vector::DEBUG, |frame| {
        frame.rflags &= !0x100;
        write64(DEVICE + 0x408, frame.rip);
    });
    let mut after = 0u64;
    execute!(
        "mov [{at}], ss",
        "lea {after}, [rip + 2f]",
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "mov ss, [{at}]",
        "nop",
        "2: nop",
        at = in(reg) device,
        after = inout(reg) after,
    );
    exceptions::off(vector::DEBUG);
    cpu::set_dr6(0xffff_0ff0);
    check_equal(
        "MOV SS from a device holds a step back",
        read64(DEVICE + 0x408),
        after,
    );
}

static TRAPS: Shared<[u64; 4]> = Shared::new([0; 4]);

/// Each iteration of a string instruction traps, and so does what is behind it.
fn steps() {
    exceptions::on(vector::DEBUG, |frame| {
        let trap = exceptions::count(vector::DEBUG) as usize - 1;
        TRAPS.put(trap.min(3), frame.rip);
        if trap >= 3 {
            frame.rflags &= !0x100;
        }
    });
    let (mut at, mut after) = (0u64, 0u64);
    execute!(
        "lea {at}, [rip + 2f]",
        "lea {after}, [rip + 3f]",
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "2: rep stosb",
        "3: lock inc byte ptr [rdi]",
        "4: nop",
        at = inout(reg) at,
        after = inout(reg) after,
        inout("rdi") DEVICE => _,
        inout("rcx") 3u64 => _,
    );
    exceptions::off(vector::DEBUG);
    cpu::set_dr6(0xffff_0ff0);
    let length = 3;
    check_equal(
        "steps through REP STOSB and LOCK INC on a device",
        (TRAPS.at(0), TRAPS.at(1), TRAPS.at(2), TRAPS.at(3)),
        (at, at, after, after + length),
    );
}

/// Executes 32-bit code, on the way from 64-bit code and back; RSI is used.
macro_rules! execute_32 {
    ([$($code:literal),* $(,)?], $($operands:tt)*) => {
        execute!(
            "push 0x18",
            "lea rsi, [rip + 2f]",
            "push rsi",
            "lea rsi, [rip + 4f]",
            "retfq",
            ".code32",
            "2:",
            $($code,)*
            "push 0x08",
            "push esi",
            "retf",
            ".code64",
            "4:",
            out("rsi") _,
            $($operands)*
        )
    };
}

/// 32-bit code: EAX to the device, at an offset of a segment.
fn compatibility() {
    let (mut low, mut high) = (0u32, 0u32);
    execute_32!(
        [
            "mov dword ptr [edi], 0x11223344",
            "mov al, [edi + 1]",
            "movzx ecx, al",
            "add dword ptr [edi], 1",
            "bswap ecx",
            "mov [edi + 4], ecx",
            "mov ecx, [0xff000000]",
            "mov eax, [edi + 4]",
        ],
        in("rdi") DEVICE,
        out("rcx") low,
        out("rax") high,
    );
    check_equal("32-bit code", (low, high), (0x1122_3345, 0x3300_0000));
    check_equal("what the device has", read32(DEVICE + 4), 0x3300_0000);
}

/// 32-bit code has 32 bits of a register, whatever 64-bit code has left in the others.
fn upper_half_of_a_control_register() {
    const PGE: u64 = 1 << 7;
    let before = cpu::cr4();
    execute_32!(["mov cr4, eax"], in("rax") before ^ PGE | 0x1234 << 32);
    let after = cpu::cr4();
    cpu::set_cr4(before);
    check_equal("CR4 written by 32-bit code", after, before ^ PGE);
}
