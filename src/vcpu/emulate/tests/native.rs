//! The same instruction on this CPU and in the emulator, over all opcodes, forms of
//! operands, and numbers.

use super::machine::Ram;
use super::*;
use crate::fuzz::Random;
use crate::vcpu::emulate::alu::{AF, CF, OF, STATUS};
use core::arch::{asm, global_asm};
use core::mem::offset_of;
use iced_x86::{CpuidFeature, FlowControl, Mnemonic, OpKind, Register};
use std::arch::is_x86_feature_detected;
use std::collections::BTreeSet;
use std::sync::Mutex;

/// What an instruction runs with, and what it leaves behind.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct State {
    /// Of XSAVE: x87, SSE, AVX.
    pub vectors: [u8; 1024],
    pub general: GeneralRegisters,
    pub rflags: u64,
    pub code: u64,
    pub host_rsp: u64,
}

const MMX: usize = 32;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
const YMM: usize = 576;

#[unsafe(no_mangle)]
static mut EMULATE_TEST_STATE: State = State {
    vectors: [0; 1024],
    general: GeneralRegisters {
        rax: 0,
        rcx: 0,
        rdx: 0,
        rbx: 0,
        rsp: 0,
        rbp: 0,
        rsi: 0,
        rdi: 0,
        r8: 0,
        r9: 0,
        r10: 0,
        r11: 0,
        r12: 0,
        r13: 0,
        r14: 0,
        r15: 0,
    },
    rflags: 0,
    code: 0,
    host_rsp: 0,
};

global_asm!(
    "emulate_test_enter:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov [rip + EMULATE_TEST_STATE + {host_rsp}], rsp",
    "mov eax, 7; xor edx, edx",
    "xrstor64 [rip + EMULATE_TEST_STATE]",
    "push qword ptr [rip + EMULATE_TEST_STATE + {rflags}]",
    "popfq",
    "mov rax, [rip + EMULATE_TEST_STATE + {general} + 8 * 0]",
    "mov rcx, [rip + EMULATE_TEST_STATE + {general} + 8 * 1]",
    "mov rdx, [rip + EMULATE_TEST_STATE + {general} + 8 * 2]",
    "mov rbx, [rip + EMULATE_TEST_STATE + {general} + 8 * 3]",
    "mov rsp, [rip + EMULATE_TEST_STATE + {general} + 8 * 4]",
    "mov rbp, [rip + EMULATE_TEST_STATE + {general} + 8 * 5]",
    "mov rsi, [rip + EMULATE_TEST_STATE + {general} + 8 * 6]",
    "mov rdi, [rip + EMULATE_TEST_STATE + {general} + 8 * 7]",
    "mov r8, [rip + EMULATE_TEST_STATE + {general} + 8 * 8]",
    "mov r9, [rip + EMULATE_TEST_STATE + {general} + 8 * 9]",
    "mov r10, [rip + EMULATE_TEST_STATE + {general} + 8 * 10]",
    "mov r11, [rip + EMULATE_TEST_STATE + {general} + 8 * 11]",
    "mov r12, [rip + EMULATE_TEST_STATE + {general} + 8 * 12]",
    "mov r13, [rip + EMULATE_TEST_STATE + {general} + 8 * 13]",
    "mov r14, [rip + EMULATE_TEST_STATE + {general} + 8 * 14]",
    "mov r15, [rip + EMULATE_TEST_STATE + {general} + 8 * 15]",
    "jmp [rip + EMULATE_TEST_STATE + {code}]",
    "emulate_test_leave:",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 0], rax",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 1], rcx",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 2], rdx",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 3], rbx",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 4], rsp",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 5], rbp",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 6], rsi",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 7], rdi",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 8], r8",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 9], r9",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 10], r10",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 11], r11",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 12], r12",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 13], r13",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 14], r14",
    "mov [rip + EMULATE_TEST_STATE + {general} + 8 * 15], r15",
    "mov rsp, [rip + EMULATE_TEST_STATE + {host_rsp}]",
    "pushfq",
    "pop qword ptr [rip + EMULATE_TEST_STATE + {rflags}]",
    "cld",
    "mov eax, 7; xor edx, edx",
    "xsave64 [rip + EMULATE_TEST_STATE]",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    host_rsp = const offset_of!(State, host_rsp),
    general = const offset_of!(State, general),
    rflags = const offset_of!(State, rflags),
    code = const offset_of!(State, code),
);

unsafe extern "C" {
    fn emulate_test_enter();
    fn emulate_test_leave();
}

/// Bytes of the operand's memory, in the middle of which operands are.
const BUFFER: usize = 512;
const PAGE: usize = 4096;

/// Memory below 2 GiB: a page of code, and one of data.
pub(super) struct Lab {
    pub code: *mut u8,
    pub data: *mut u8,
}

// SAFETY: used with [`LAB`] locked.
unsafe impl Send for Lab {}

pub(super) static LAB: Mutex<Option<Lab>> = Mutex::new(None);

impl Lab {
    pub fn new() -> Self {
        const READ_WRITE_EXECUTE: u64 = 7;
        const PRIVATE_ANONYMOUS_32BIT: u64 = 0x62;
        let mut result = 9u64; // mmap
        // SAFETY: maps pages that are nobody's.
        unsafe {
            asm!("syscall", inout("rax") result, in("rdi") 0, in("rsi") 2 * PAGE,
                in("rdx") READ_WRITE_EXECUTE, in("r10") PRIVATE_ANONYMOUS_32BIT, in("r8") -1i64,
                in("r9") 0, out("rcx") _, out("r11") _);
        }
        assert!(result < 1 << 31, "no memory: {result:#x}");
        let code = result as *mut u8;
        Self {
            code,
            data: code.wrapping_add(PAGE),
        }
    }

    /// Executes `code` with `state` and the memory.
    pub fn run(&self, code: &[u8], state: &mut State, memory: &mut [u8]) {
        // jmp [rip]; the address.
        let mut all = code.to_vec();
        all.extend([0xff, 0x25, 0, 0, 0, 0]);
        all.extend((emulate_test_leave as *const () as u64).to_le_bytes());
        // SAFETY: both pages are this object's, and nobody else uses the state, since
        // the object is locked. The code is one instruction that has been emulated, so that it
        // does not fault, and accesses nothing but the memory.
        unsafe {
            self.code.copy_from_nonoverlapping(all.as_ptr(), all.len());
            self.data
                .copy_from_nonoverlapping(memory.as_ptr(), memory.len());
            state.code = self.code as u64;
            (&raw mut EMULATE_TEST_STATE).write(state.clone());
            asm!("call {}", sym emulate_test_enter, clobber_abi("C"));
            *state = (&raw const EMULATE_TEST_STATE).read();
            memory
                .as_mut_ptr()
                .copy_from_nonoverlapping(self.data, memory.len());
        }
    }
}

/// Whether this CPU has what the instruction needs.
fn is_there(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::SSE
        | F::SSE2
        | F::MMX
        | F::CX8
        | F::MULTIBYTENOP
        | F::CLFSH => true,
        F::SSE3 => is_x86_feature_detected!("sse3"),
        F::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        F::AVX => is_x86_feature_detected!("avx"),
        F::AVX2 => is_x86_feature_detected!("avx2"),
        F::MOVBE => is_x86_feature_detected!("movbe"),
        F::BMI1 => is_x86_feature_detected!("bmi1"),
        F::BMI2 => is_x86_feature_detected!("bmi2"),
        F::ADX => is_x86_feature_detected!("adx"),
        F::POPCNT => is_x86_feature_detected!("popcnt"),
        F::LZCNT => is_x86_feature_detected!("lzcnt"),
        F::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        _ => false,
    }
}

/// Whether it may be executed here: it is no system instruction and no jump, and goes where the registers that
/// are set up say.
fn is_harmless(instruction: &Instruction) -> bool {
    let segment = matches!(instruction.segment_prefix(), Register::FS | Register::GS);
    let system = (0..instruction.op_count()).any(|operand| {
        let register = instruction.op_kind(operand) == OpKind::Register;
        register && instruction.op_register(operand).is_segment_register()
    });
    use Mnemonic as M;
    !segment
        && !system
        && !instruction.is_privileged()
        && instruction.flow_control() == FlowControl::Next
        && instruction.cpuid_features().iter().all(|f| is_there(*f))
        && !matches!(
            instruction.mnemonic(),
            M::Popf | M::Popfq | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lfs | M::Lgs | M::Lss
                // Their effect is on the address, or on nothing.
                | M::Nop | M::Enter
                // See `fpu`.
                | M::Ldmxcsr | M::Stmxcsr | M::Vldmxcsr | M::Vstmxcsr
        )
}

/// Bytes of an instruction with an operand in memory, often.
fn code(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    let prefixes: &[&[u8]] = &[
        &[],
        &[],
        &[],
        &[0x66],
        &[0xf3],
        &[0xf2],
        &[0xf0],
        &[0x67],
        &[0x67, 0x66],
    ];
    let prefix = random.pick(prefixes);
    let opcode = random.next() as u8;
    let vex = random.below(4) == 0;
    if vex {
        // Map 1 to 3, any registers.
        let map = 1 + random.below(3) as u8;
        let first = random.next() as u8 & 0xe0 | map;
        // Mostly no second source.
        let second = if random.below(2) == 0 {
            random.next() as u8 & 0x87 | 0x78
        } else {
            random.next() as u8
        };
        if prefix == [0x67] {
            code.push(0x67);
        }
        code.extend([0xc4, first, second, opcode]);
    } else {
        code.extend(prefix);
        if random.below(2) == 0 {
            code.push(0x40 | random.next() as u8 & 0xf);
        }
        match random.below(5) {
            0 | 1 => code.push(opcode),
            2 | 3 => code.extend([0x0f, opcode]),
            _ => code.extend([0x0f, 0x38, 0xf0 | opcode & 1]),
        }
    }
    let modrm = random.next() as u8;
    // In memory, whatever the mode bits say.
    code.push(if modrm >= 0xc0 { modrm & 0x3f } else { modrm });
    code.extend((0..15).map(|_| random.next() as u8));
    code.truncate(15);
    code
}

/// Registers that have the operands at `middle`, or a little behind it.
pub(super) fn aim(instruction: &Instruction, random: &mut Random, middle: u64) -> GeneralRegisters {
    let mut registers = GeneralRegisters::default();
    for index in 0..16 {
        registers.set(index, random.number());
    }
    // Aligned often, for the moves that must be.
    let target = middle + (random.below(64) & random.pick(&[!0, !15, !31]));
    registers.rsp = middle + 8 * random.below(8);
    registers.rbp = registers.rsp;
    if instruction.is_string_instruction() {
        registers.rsi = target;
        registers.rdi = middle + random.below(64);
        registers.rcx = random.below(12);
        return registers;
    }
    let number = |register: Register| {
        let full = register.full_register();
        full.is_gpr64().then_some(full.number() as u8)
    };
    // A bit offset is part of the address.
    let mut moved = target;
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    ) && instruction.op1_kind() == OpKind::Register
        && let Some(offset) = number(instruction.op1_register())
    {
        let bits = random.below(800) as i64 - 400;
        registers.set(offset, bits as u64);
        moved = target & !7;
    }
    let displacement = instruction.memory_displacement64();
    let base_register = number(instruction.memory_base());
    let index_register = number(instruction.memory_index());
    match (base_register, index_register) {
        (Some(b), None) => registers.set(b, moved.wrapping_sub(displacement)),
        (Some(b), Some(i)) if b != i => {
            let scale = u64::from(instruction.memory_index_scale());
            let index = random.below(1 << 20);
            registers.set(i, index);
            let rest = moved.wrapping_sub(displacement).wrapping_sub(index * scale);
            registers.set(b, rest);
        }
        _ => {}
    }
    registers
}

/// Points an operand without registers at `target`.
pub(super) fn patch(code: &mut [u8], instruction: &Instruction, target: u64, code_base: u64) {
    let mut decoder = Decoder::with_ip(64, code, code_base, DecoderOptions::NONE);
    let _ = decoder.decode();
    let offsets = decoder.get_constant_offsets(instruction);
    let none =
        instruction.memory_base() == Register::None && instruction.memory_index() == Register::None;
    let relative = instruction.is_ip_rel_memory_operand();
    if offsets.has_displacement() && (none || relative) {
        let value = if relative {
            target.wrapping_sub(code_base + instruction.len() as u64)
        } else {
            target
        };
        let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
        if size >= 4 {
            code[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
}

/// Flags that the manual leaves undefined.
fn undefined(instruction: &Instruction, before: &GeneralRegisters) -> u64 {
    use Mnemonic as M;
    let mut flags = u64::from(undefined_by_table(instruction));
    let width = instruction.memory_size().size() as u64 * 8;
    let shift = matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if shift {
        let last = instruction.op_count() - 1;
        let count = match instruction.op_kind(last) {
            OpKind::Register => before.rcx,
            _ => instruction.immediate(last),
        } & if width == 64 { 63 } else { 31 };
        flags = if count == 0 { 0 } else { AF };
        if count != 1 {
            flags |= OF;
        }
        if count >= width {
            flags |= CF;
        }
        if matches!(instruction.mnemonic(), M::Shld | M::Shrd) && count > width {
            flags = STATUS;
        }
    }
    flags
}

/// The same from iced's table, in the bits of RFLAGS.
fn undefined_by_table(instruction: &Instruction) -> u32 {
    use iced_x86::RflagsBits as B;
    let table = instruction.rflags_undefined();
    let bits = [
        (B::CF, 0),
        (B::PF, 2),
        (B::AF, 4),
        (B::ZF, 6),
        (B::SF, 7),
        (B::OF, 11),
    ];
    bits.iter()
        .filter(|(flag, _)| table & flag != 0)
        .map(|(_, bit)| 1u32 << bit)
        .sum()
}

/// Where the result is undefined too.
fn has_undefined_result(instruction: &Instruction, before: &GeneralRegisters) -> bool {
    use Mnemonic as M;
    let width = instruction.memory_size().size() as u64 * 8;
    match instruction.mnemonic() {
        M::Shld | M::Shrd => {
            let count = match instruction.op_kind(2) {
                OpKind::Register => before.rcx,
                _ => instruction.immediate(2),
            };
            count & if width == 64 { 63 } else { 31 } > width
        }
        _ => false,
    }
}

#[test]
fn instructions_do_what_this_cpu_does() {
    const ROUNDS: usize = 120_000;
    if !is_x86_feature_detected!("xsave") || !is_x86_feature_detected!("avx") {
        return;
    }
    let mut lab = LAB.lock().unwrap();
    let lab = lab.get_or_insert_with(Lab::new);
    let mut random = Random(7);
    let mut seen = BTreeSet::new();
    let mut runs = 0;
    for _ in 0..ROUNDS {
        let mut code = code(&mut random);
        let (rip, base) = (lab.code as u64, lab.data as u64);
        let Ok(Decoded { instruction, .. }) = Decoded::new(&code, Mode::Bits64, rip) else {
            continue;
        };
        if !is_harmless(&instruction) {
            continue;
        }
        let middle = base + BUFFER as u64 / 2;
        patch(&mut code, &instruction, middle, rip);
        let decoded = Decoded::new(&code, Mode::Bits64, rip).unwrap();
        let instruction = decoded.instruction;
        let before = aim(&instruction, &mut random, middle);
        let mut state = State {
            vectors: [0; 1024],
            general: before,
            // Interrupts are on here, and not AC, TF or NT.
            rflags: 0x202 | random.next() & (STATUS | 1 << 10),
            code: 0,
            host_rsp: 0,
        };
        let mut ram = Ram::new(BUFFER, Mode::Bits64);
        ram.base = base;
        ram.memory.fill_with(|| random.next() as u8);
        if random.below(3) == 0 {
            // Small numbers, so that some divisions succeed.
            ram.memory[BUFFER / 2..].fill_with(|| random.below(2) as u8);
        }
        state.vectors[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        state.vectors[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        state.vectors[XSTATE_BV] = 7;
        for (number, vector) in ram.vectors.iter_mut().enumerate() {
            vector.fill_with(|| random.next() as u8);
            let (low, high) = vector.split_at(16);
            state.vectors[XMM + 16 * number..][..16].copy_from_slice(low);
            state.vectors[YMM + 16 * number..][..16].copy_from_slice(high);
        }
        for (number, register) in ram.mmx.iter_mut().enumerate() {
            register.fill_with(|| random.next() as u8);
            state.vectors[MMX + 16 * number..][..8].copy_from_slice(register);
            state.vectors[MMX + 16 * number + 8..][..2].fill(0xff);
        }
        let mut memory = ram.memory.clone();
        let mut general = before;
        let mut registers = Registers {
            general: &mut general,
            rip,
            rflags: state.rflags,
        };
        let progress = decoded.emulate(&mut registers, &mut ram, 100);
        if progress != Ok(Progress::Done) {
            assert_ne!(progress, Ok(Progress::Repeats));
            continue;
        }
        let (after, rflags) = (registers.rip, registers.rflags);
        assert_eq!(after, rip + instruction.len() as u64);
        // It has no operand in memory, but would be executed all the same.
        if ram.log.is_empty() && !instruction.is_string_instruction() {
            continue;
        }
        lab.run(&code[..instruction.len()], &mut state, &mut memory);
        let what = format!(
            "{:?} {:x?}\n{before:x?}",
            instruction.code(),
            &code[..instruction.len()]
        );
        if !has_undefined_result(&instruction, &before) {
            assert_eq!(general, state.general, "{what}");
            assert!(ram.memory == memory, "{what}: memory");
        }
        let defined = STATUS & !undefined(&instruction, &before);
        assert_eq!(
            rflags & defined,
            state.rflags & defined,
            "{what}: flags, of {defined:x}"
        );
        for (number, vector) in ram.vectors.iter().enumerate() {
            let (low, high) = vector.split_at(16);
            assert_eq!(low, &state.vectors[XMM + 16 * number..][..16], "{what}");
            assert_eq!(high, &state.vectors[YMM + 16 * number..][..16], "{what}");
        }
        for (number, register) in ram.mmx.iter().enumerate() {
            assert_eq!(register, &state.vectors[MMX + 16 * number..][..8], "{what}");
        }
        seen.insert(format!("{:?}", instruction.code()));
        runs += 1;
    }
    let forms: Vec<&str> = seen.iter().map(String::as_str).collect();
    println!("{runs} runs of {} forms: {}", forms.len(), forms.join(" "));
    assert!(runs > ROUNDS / 10);
    assert!(forms.len() > 300, "{}", forms.len());
}
