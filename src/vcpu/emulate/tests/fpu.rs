//! x87, and saved state: what this CPU does with its own operand and with a copy of it.

use super::machine::{BASE, exchange};
use super::native::{LAB, Lab, State, aim, patch};
use super::*;
use crate::fuzz::Random;
use crate::vcpu::emulate::fpu::State as SavedState;
use iced_x86::{Mnemonic, OpKind};
use std::arch::is_x86_feature_detected;
use std::collections::BTreeSet;

const BYTES: usize = 2560;
const MXCSR: std::ops::Range<usize> = 24..28;
const HEADER: usize = 512;

/// x87 and saved state, with an operand in memory.
fn code(random: &mut Random) -> Vec<u8> {
    let prefixes: &[&[u8]] = &[&[], &[], &[0x66], &[0x67], &[0x66, 0x67]];
    let mut code = random.pick(prefixes).to_vec();
    if random.below(3) == 0 {
        code.push(0x40 | random.next() as u8 & 0xf);
    }
    let (opcode, register) = match random.below(10) {
        0 | 1 => (vec![0x0f, 0xae], random.below(7) as u8),
        2 => (vec![0x0f, 0xc7], 4),
        _ => (vec![0xd8 + random.below(8) as u8], random.below(8) as u8),
    };
    code.extend(opcode);
    let modrm = random.next() as u8 & 0xc7;
    let modrm = if modrm >= 0xc0 { modrm & 0x07 } else { modrm };
    code.push(modrm | register << 3);
    code.extend((0..10).map(|_| random.next() as u8));
    code.truncate(15);
    code
}

/// An image that XRSTOR takes; exceptions of x87 that are not masked may be pending.
fn image(random: &mut Random) -> [u8; 1024] {
    let mut image = [0u8; 1024];
    image.fill_with(|| random.next() as u8);
    let control = if random.below(2) == 0 {
        0x37f
    } else {
        random.next() as u16 & 0x0f3f | 0x40
    };
    let status = random.next() as u16 & 0x7f00
        | match random.below(8) {
            0 => 0x80 | 1,
            _ => random.next() as u16 & control & 0x3f,
        };
    let status = if status & 0x80 != 0 && control & 1 != 0 {
        status & !0x81
    } else {
        status
    };
    image[0..2].copy_from_slice(&control.to_le_bytes());
    image[2..4].copy_from_slice(&status.to_le_bytes());
    image[5] = 0;
    // Bits of the opcode.
    image[7] &= 7;
    image[MXCSR].copy_from_slice(&(0x1f80 | random.next() as u32 & 0xffff).to_le_bytes());
    image[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    for register in 0..8 {
        // What is beyond 80 bits is not there.
        image[32 + 16 * register + 10..][..6].fill(0);
        // Numbers that are ones, and that can be computed with.
        if random.below(3) != 0 {
            image[32 + 16 * register + 7] |= 0x80;
            image[32 + 16 * register + 9] = 0x3f + random.below(2) as u8;
        }
    }
    image[416..HEADER].fill(0);
    image[HEADER..].fill(0);
    image[HEADER] = 7;
    image[576..832].fill_with(|| random.next() as u8);
    image
}

#[test]
fn x87_and_saved_state_are_what_this_cpu_has() {
    const ROUNDS: usize = 40_000;
    if !is_x86_feature_detected!("xsavec") || !is_x86_feature_detected!("avx") {
        return;
    }
    let mut lab = LAB.lock().unwrap();
    let lab = lab.get_or_insert_with(Lab::new);
    let mut random = Random(23);
    let mut seen = BTreeSet::new();
    let mut pending = 0;
    for _ in 0..ROUNDS {
        let mut code = code(&mut random);
        let (rip, base) = (lab.code as u64, lab.data as u64);
        let middle = base + 1024;
        let Ok(Decoded { instruction, .. }) = Decoded::new(&code, Mode::Bits64, rip) else {
            continue;
        };
        let in_memory =
            (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
        let own = decoded_is_own(&code, &instruction);
        if !in_memory || !own || instruction.is_privileged() {
            continue;
        }
        patch(&mut code, &instruction, middle, rip);
        let decoded = Decoded::new(&code, Mode::Bits64, rip).unwrap();
        let instruction = decoded.instruction;
        let mut before = aim(&instruction, &mut random, middle);
        let components = random.next() & 7;
        let loads_state = matches!(
            instruction.mnemonic(),
            Mnemonic::Fxrstor
                | Mnemonic::Fxrstor64
                | Mnemonic::Xrstor
                | Mnemonic::Xrstor64
                | Mnemonic::Ldmxcsr
        );
        // Of what an address is not made.
        let used = [instruction.memory_base(), instruction.memory_index()];
        let is_used = |number| {
            used.iter().any(|register| {
                register.full_register().is_gpr64() && register.full_register().number() == number
            })
        };
        if is_used(0) || is_used(2) {
            continue;
        }
        (before.rax, before.rdx) = (components, random.next() & 0xffff_ffff_0000_0000);
        let mut ram = Ram::new(BYTES, Mode::Bits64);
        ram.base = base;
        ram.memory.fill_with(|| random.next() as u8);
        let original = image(&mut random);
        let mut fpu = Box::new(Image::EMPTY);
        fpu.0[..1024].copy_from_slice(&original);
        ram.fpu = Some(fpu);
        let mut general = before;
        let mut registers = Registers {
            general: &mut general,
            rip,
            rflags: 0x202,
        };
        if loads_state {
            // Where it is, and with which bits, is known when it has been tried.
            let offset = ram_offset(&decoded, &mut registers, base);
            let Some(at) = offset else { continue };
            let mut valid = image(&mut random);
            let present = random.next() as u8 & 7;
            valid[HEADER] = present;
            if random.below(2) == 0 {
                valid[HEADER + 8] = present | random.next() as u8 & 7;
                valid[HEADER + 15] = 0x80;
            }
            if instruction.mnemonic() == Mnemonic::Ldmxcsr {
                let mxcsr: [u8; 4] = valid[MXCSR].try_into().unwrap();
                ram.memory[at..at + 4].copy_from_slice(&mxcsr);
            } else {
                ram.memory[at..at + 1024].copy_from_slice(&valid);
            }
        }
        let mut memory = ram.memory.clone();
        let what = format!("{:?} {:x?}", instruction.code(), &code[..instruction.len()]);
        match decoded.emulate(&mut registers, &mut ram, 1) {
            Ok(progress) => assert_eq!(progress, Progress::Done),
            Err(EmulateError::Fault(Exception::FloatingPoint)) => {
                assert!(original[2] & 0x80 != 0, "{what}");
                assert!(ram.memory == memory);
                pending += 1;
                continue;
            }
            // Not aligned, or not where the memory is.
            Err(EmulateError::Fault(_)) => continue,
            Err(error) => panic!("{what}: {error:?}"),
        }
        assert_eq!(registers.rip, rip + instruction.len() as u64);
        let mut state = State {
            vectors: original,
            general: before,
            rflags: 0x202,
            code: 0,
            host_rsp: 0,
        };
        let (mut own, mut rest) = (Image::EMPTY, Image::EMPTY);
        let mut start = Image::EMPTY;
        start.0[..1024].copy_from_slice(&original);
        // SAFETY: what the CPU has is there again behind the instruction.
        unsafe { exchange(&mut own, &start) };
        lab.run(&code[..instruction.len()], &mut state, &mut memory);
        // SAFETY: as above.
        unsafe { exchange(&mut rest, &own) };
        assert_eq!(general, state.general, "{what}");
        let differs = memory.iter().zip(&ram.memory).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{what}: memory");
        let emulated = &ram.fpu.unwrap().0;
        // Whether something counts as initial may differ.
        for at in (0..HEADER).chain(HEADER + 8..832) {
            assert_eq!(
                emulated[at],
                state.vectors[at],
                "{what}: state at {at}, from {:x?}",
                &original[..32]
            );
        }
        seen.insert(format!("{:?}", instruction.code()));
    }
    let forms: Vec<&str> = seen.iter().map(String::as_str).collect();
    println!(
        "{} forms, {pending} pending: {}",
        forms.len(),
        forms.join(" ")
    );
    assert!(
        forms.len() > 70 && pending > 100,
        "{} {pending}",
        forms.len()
    );
}

fn decoded_is_own(code: &[u8], instruction: &Instruction) -> bool {
    Escape::of(code, Mode::Bits64).is_some() || SavedState::of(instruction).is_some()
}

/// Where in the memory at `base` the operand is.
fn ram_offset(decoded: &Decoded, registers: &mut Registers<'_>, base: u64) -> Option<usize> {
    let mut probe = Ram::new(BYTES, Mode::Bits64);
    probe.base = base;
    let mut general = *registers.general;
    let mut registers = Registers {
        general: &mut general,
        rip: registers.rip,
        rflags: registers.rflags,
    };
    let _ = decoded.emulate(&mut registers, &mut probe, 1);
    let (_, at, _) = *probe.log.first()?;
    Some((at - base) as usize)
}

/// Executes `code` with its operand at [`BASE`].
fn execute(ram: &mut Ram, mode: Mode, code: &[u8]) -> Result<Progress> {
    let mut general = GeneralRegisters {
        rax: BASE,
        ..Default::default()
    };
    let mut registers = Registers {
        general: &mut general,
        rip: 0,
        rflags: 2,
    };
    Decoded::new(code, mode, 0)?.emulate(&mut registers, ram, 1)
}

#[test]
fn what_is_switched_off_faults() {
    const FILD: &[u8] = &[0xdb, 0x00];
    const FXSAVE: &[u8] = &[0x0f, 0xae, 0x00];
    const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x10];
    const XSAVE: &[u8] = &[0x0f, 0xae, 0x20];
    const MOVQ_MM0: &[u8] = &[0x0f, 0x6f, 0x00];
    const MOVUPS: &[u8] = &[0x0f, 0x10, 0x00];
    const VMOVUPS: &[u8] = &[0xc5, 0xf8, 0x10, 0x00];
    let (available, undefined) = (Exception::DeviceNotAvailable, Exception::InvalidOpcode);
    let (ts, em, all) = (1 << 3, 1 << 2, 1 << 9 | 1 << 18);
    for (code, with_em, with_cr4_0) in [
        (FILD, Err(available), Ok(())),
        (FXSAVE, Err(available), Ok(())),
        (LDMXCSR, Err(undefined), Err(undefined)),
        (XSAVE, Ok(()), Err(undefined)),
        (MOVQ_MM0, Err(undefined), Ok(())),
        (MOVUPS, Err(undefined), Err(undefined)),
        (VMOVUPS, Ok(()), Err(undefined)),
    ] {
        for (cr0, cr4, expected) in [
            (1, all, Ok(())),
            (1 | ts, all, Err(available)),
            (1 | em, all, with_em),
            (1, 0, with_cr4_0),
        ] {
            let mut ram = Ram::new(4096, Mode::Bits64);
            (ram.cr0, ram.cr4) = (cr0, cr4);
            let expected = expected.map(|()| Progress::Done);
            assert_eq!(
                execute(&mut ram, Mode::Bits64, code),
                expected.map_err(EmulateError::Fault),
                "{code:x?} {cr0:x} {cr4:x}"
            );
        }
    }
}

#[test]
fn other_code_than_64_bit_code_has_eight_registers() {
    let mut ram = Ram::new(4096, Mode::Bits32);
    let fill = |state: &mut Image, value: u8| {
        state.0[MXCSR].copy_from_slice(&0x1f80u32.to_le_bytes());
        state.0[160..416].fill(value);
        state.0[HEADER] = 3;
    };
    let mut state = Box::new(Image::EMPTY);
    fill(&mut state, 0x11);
    ram.fpu = Some(state);
    ram.memory.fill(0x22);
    assert!(execute(&mut ram, Mode::Bits32, &[0x0f, 0xae, 0x00]).is_ok()); // fxsave [eax]
    assert_eq!(ram.memory[160..288], [0x11; 128]);
    assert_eq!(ram.memory[288..512], [0x22; 224]);
    fill(ram.fpu.as_mut().unwrap(), 0x33);
    assert!(execute(&mut ram, Mode::Bits32, &[0x0f, 0xae, 0x08]).is_ok()); // fxrstor [eax]
    let state = &ram.fpu.as_ref().unwrap().0;
    assert_eq!(state[160..288], [0x11; 128]);
    assert_eq!(state[288..416], [0x33; 128]);
    // Environments of real mode, and XSAVE, are left alone.
    ram.addressing = Addressing::Real;
    for code in [&[0xd9, 0x30][..], &[0x0f, 0xae, 0x20]] {
        let result = execute(&mut ram, Mode::Bits32, code);
        assert_eq!(result, Err(EmulateError::Unsupported));
    }
}
