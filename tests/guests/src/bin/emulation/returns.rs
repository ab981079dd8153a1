//! RETF and IRET with their stack in a device.

use super::DEVICE;
use vireo_test_guests::cpu;
use vireo_test_guests::descriptors::{self, FAULT_STACK_INDEX, SPARE_STACK_INDEX, selector};
use vireo_test_guests::exceptions::{self, vector};
use vireo_test_guests::memory::{read64, write64};
use vireo_test_guests::paging::{self, PAGE};
use vireo_test_guests::{check_equal, execute};

/// Where the frame is, and a word behind it.
const FRAME: u64 = DEVICE + 0x600;
const CODE: u64 = selector::CODE as u64;
const DATA: u64 = selector::DATA as u64;

pub fn run() {
    same_level();
    with_32_bits();
    to_level_3();
    refused();
}

fn same_level() {
    write64(FRAME + 24, 0x1234);
    let mut above = 0u64;
    execute!(
        "mov {old}, rsp",
        "lea {above}, [rip + 2f]",
        "mov [{frame}], {above}",
        "mov qword ptr [{frame} + 8], 8",
        "mov rsp, {frame}",
        "retfq 8",
        "ud2",
        "2: pop {above}",
        "mov rsp, {old}",
        old = out(reg) _,
        frame = in(reg) FRAME,
        above = inout(reg) above,
    );
    check_equal("RETF from a stack in a device", above, 0x1234);
    let mut flags = 0u64;
    execute!(
        "mov {old}, rsp",
        "lea {flags}, [rip + 2f]",
        "mov [{frame}], {flags}",
        "mov qword ptr [{frame} + 8], {code}",
        "mov qword ptr [{frame} + 16], 0x40cd7",
        "mov [{frame} + 24], {old}",
        "mov qword ptr [{frame} + 32], {data}",
        "mov rsp, {frame}",
        "iretq",
        "ud2",
        "2: pushfq",
        "pop {flags}",
        "cmp rsp, {old}",
        "je 3f",
        "ud2",
        "3: cld",
        old = out(reg) _,
        frame = in(reg) FRAME,
        flags = inout(reg) flags,
        code = const CODE,
        data = const DATA,
    );
    check_equal("IRET from there", flags, 0x40cd7);
    execute!("push 2", "popfq");
}

/// From 64-bit code to 32-bit code by a frame in a device, and back by RETF and IRET.
fn with_32_bits() {
    let mut seen = 0u64;
    execute!(
        "mov {old}, rsp",
        "lea rcx, [rip + 2f]",
        "mov [rax], rcx",
        "mov qword ptr [rax + 8], 0x18",
        "lea rcx, [rip + 3f]",
        "mov [rax + 16], ecx",
        "mov dword ptr [rax + 20], 0x18",
        "lea rcx, [rip + 4f]",
        "mov [rax + 24], ecx",
        "mov dword ptr [rax + 28], 0x08",
        "mov dword ptr [rax + 32], 0x46",
        "mov rsp, rax",
        "xor ecx, ecx",
        "retfq",
        ".code32",
        "2: inc ecx",
        "retf",
        "3: inc ecx",
        "iretd",
        ".code64",
        "4: mov rsp, {old}",
        old = out(reg) _,
        in("rax") FRAME,
        inout("rcx") 0u64 => seen,
    );
    check_equal("RETF and IRET of 32-bit code", seen, 2);
}

/// To level 3 by a frame in a device, and back by an exception.
fn to_level_3() {
    exceptions::on(vector::BREAKPOINT, |frame| {
        write64(FRAME + 0x40, frame.cs);
        write64(FRAME + 0x48, frame.rsp);
        write64(FRAME + 0x50, frame.ss);
        frame.rip = frame.r8;
        (frame.cs, frame.ss) = (CODE, DATA);
        frame.rsp = frame.rsi;
    });
    descriptors::set_interrupt_stack(SPARE_STACK_INDEX, paging::scratch(0) + PAGE);
    exceptions::set_interrupt_stack(vector::BREAKPOINT, SPARE_STACK_INDEX);
    paging::open_to_level_3(true);
    let (user_code, user_data) = (selector::USER_CODE.into(), selector::USER_DATA.into());
    for far in [true, false] {
        let frame: [u64; 4] = if far {
            [user_code, FRAME + 0x80, user_data, 0]
        } else {
            [user_code, cpu::flags(), FRAME + 0x80, user_data]
        };
        for (index, value) in (1..).zip(frame) {
            write64(FRAME + 8 * index, value);
        }
        execute!(
            "mov rsi, rsp",
            "lea rcx, [rip + 2f]",
            "mov [rax], rcx",
            "lea r8, [rip + 4f]",
            "mov rsp, rax",
            "test edi, edi",
            "jz 3f",
            "retfq",
            "3: iretq",
            "2: int3",
            "4:",
            inout("rax") FRAME => _,
            in("edi") u32::from(far),
            out("rcx") _,
            out("rsi") _,
            out("r8") _,
        );
        check_equal(
            "a return to level 3",
            [0x40, 0x48, 0x50].map(|at| read64(FRAME + at)),
            [user_code, FRAME + 0x80, user_data],
        );
    }
    paging::open_to_level_3(false);
    exceptions::set_interrupt_stack(vector::BREAKPOINT, 0);
    exceptions::off(vector::BREAKPOINT);
}

fn refused() {
    exceptions::set_interrupt_stack(vector::GENERAL_PROTECTION, FAULT_STACK_INDEX);
    write64(FRAME + 8, DATA);
    check_equal(
        "RETF to a data segment",
        execute!("mov rsp, {}", "retfq", in(reg) FRAME).map(|fault| (fault.vector, fault.error)),
        Some((vector::GENERAL_PROTECTION, DATA)),
    );
    exceptions::set_interrupt_stack(vector::GENERAL_PROTECTION, 0);
}
