//! What is checked in the linked kernel: the registers of the guest's FPU are
//! live while hypervisor code runs, so no instruction may touch them.

use anyhow::{Context, Result, bail, ensure};
use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SectionFlags, elf};
use std::collections::BTreeMap;

/// The functions that move FPU and vector state, by symbol without crate and
/// hash; only they may contain such instructions.
const STATE_SWITCH: &[&str] = &[
    "save_vectors",
    "load_vectors",
    "store_mmx_register",
    "load_mmx_register",
    "store_xmm_register",
    "load_xmm_register",
    "load_xmm_register_by_vex",
    "store_ymm_register",
    "load_ymm_register",
    "x87_exception_is_pending",
    "fpu_instructions",
];

/// The kernel's loaded bytes must stay below this.
const LARGEST: u64 = 1 << 20;

/// Checks the kernel `elf` and returns its size as loaded from the file, in
/// bytes.
///
/// # Errors
/// Names the function and address of the first forbidden instruction, or the
/// size where the image is too large.
pub fn kernel(elf: &[u8]) -> Result<u64> {
    let file = object::File::parse(elf).context("the linked kernel is not an ELF file")?;
    let size: u64 = file.segments().map(|segment| segment.file_range().1).sum();
    ensure!(
        size < LARGEST,
        "the kernel image has {size} bytes: at most {LARGEST} are allowed"
    );
    let mut symbols = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.is_definition()) {
        if let Ok(name) = symbol.name() {
            symbols.insert(symbol.address(), name);
        }
    }
    let mut executable = 0;
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else {
            continue;
        };
        if !sh_flags.contains(elf::SHF_EXECINSTR) {
            continue;
        }
        let code = section
            .data()
            .context("a code section of the linked kernel cannot be read")?;
        executable += code.len();
        if let Some((address, instruction)) = first_forbidden(section.address(), code, &symbols) {
            let name = symbols
                .range(..=address)
                .next_back()
                .map_or("?", |(_, name)| name);
            bail!(
                "the kernel contains {:?} at {address:#x} in {}: code outside the state-switch \
                 routines (xtask/src/inspect.rs) must not touch FPU, MMX, SSE or AVX state",
                instruction.mnemonic(),
                readable(name),
            );
        }
    }
    ensure!(executable > 0, "the linked kernel contains no code");
    Ok(size)
}

/// Decodes `code` piece by piece, each starting at a symbol, so that padding
/// or data before a function cannot put the decoder out of step.
fn first_forbidden(
    base: u64,
    code: &[u8],
    symbols: &BTreeMap<u64, &str>,
) -> Option<(u64, Instruction)> {
    let end = base + code.len() as u64;
    let mut starts: Vec<u64> = symbols
        .range(base..end)
        .map(|(address, _)| *address)
        .collect();
    if starts.first() != Some(&base) {
        starts.insert(0, base);
    }
    for (index, &start) in starts.iter().enumerate() {
        let stop = starts.get(index + 1).copied().unwrap_or(end);
        if symbols
            .get(&start)
            .is_some_and(|name| STATE_SWITCH.contains(&plain_name(name).as_str()))
        {
            continue;
        }
        let piece = &code[(start - base) as usize..(stop - base) as usize];
        let mut decoder = Decoder::with_ip(64, piece, start, DecoderOptions::NONE);
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if touches_vector_state(&instruction) {
                return Some((instruction.ip(), instruction));
            }
        }
    }
    None
}

/// The last part of a symbol's path.
fn plain_name(symbol: &str) -> String {
    readable(symbol)
        .rsplit("::")
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn readable(symbol: &str) -> String {
    addr2line::demangle_auto(symbol.into(), None)
        .split("::h")
        .next()
        .unwrap_or(symbol)
        .to_owned()
}

/// Whether an instruction reads or writes x87, MMX, SSE or AVX state. PAUSE,
/// fences, prefetches and MOVNTI came with SSE but touch none of it.
fn touches_vector_state(instruction: &Instruction) -> bool {
    let by_register = (0..instruction.op_count())
        .filter(|&operand| instruction.op_kind(operand) == OpKind::Register)
        .map(|operand| instruction.op_register(operand))
        .any(|r| r.is_vector_register() || r.is_mm() || r.is_st() || r.is_k() || r.is_tmm());
    let by_feature = instruction.cpuid_features().iter().any(|feature| {
        use CpuidFeature::*;
        matches!(
            feature,
            FPU | FPU287
                | FPU287XL_ONLY
                | FPU387
                | FPU387SL_ONLY
                | MMX
                | FXSR
                | XSAVE
                | XSAVEC
                | XSAVEOPT
                | XSAVES
        )
    });
    let by_name = matches!(
        instruction.mnemonic(),
        Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Vzeroupper
            | Mnemonic::Vzeroall
    );
    let control = matches!(instruction.mnemonic(), Mnemonic::Xgetbv | Mnemonic::Xsetbv);
    by_register || by_name || (by_feature && !control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finds(code: &[u8]) -> Option<Mnemonic> {
        let symbols = BTreeMap::from([(0x1000, "start")]);
        first_forbidden(0x1000, code, &symbols).map(|(_, instruction)| instruction.mnemonic())
    }

    #[test]
    fn vector_and_fpu_instructions_are_found() {
        assert_eq!(finds(&[0x90, 0x0f, 0x28, 0xc1]), Some(Mnemonic::Movaps));
        assert_eq!(finds(&[0x0f, 0xae, 0x00]), Some(Mnemonic::Fxsave));
        assert_eq!(finds(&[0x48, 0x0f, 0xae, 0x20]), Some(Mnemonic::Xsave64));
        assert_eq!(finds(&[0xd9, 0xee]), Some(Mnemonic::Fldz));
        assert_eq!(finds(&[0x0f, 0x77]), Some(Mnemonic::Emms));
        assert_eq!(finds(&[0xc5, 0xf8, 0x77]), Some(Mnemonic::Vzeroupper));
        assert_eq!(finds(&[0x0f, 0xae, 0x10]), Some(Mnemonic::Ldmxcsr));
    }

    #[test]
    fn neighbours_of_these_instructions_pass() {
        // pause; lfence; mfence; sfence; prefetcht0 [rax]; movnti [rax], ecx; xsetbv; xgetbv; vmresume; ret
        let code = [
            0xf3, 0x90, 0x0f, 0xae, 0xe8, 0x0f, 0xae, 0xf0, 0x0f, 0xae, 0xf8, 0x0f, 0x18, 0x08,
            0x0f, 0xc3, 0x08, 0x0f, 0x01, 0xd1, 0x0f, 0x01, 0xd0, 0x0f, 0x01, 0xc3, 0xc3,
        ];
        assert_eq!(finds(&code), None);
    }

    #[test]
    fn a_function_behind_stray_bytes_is_decoded_from_its_start() {
        // The byte 0x0f before the function would swallow its first instruction.
        let code = [0x0f, 0x0f, 0x28, 0xc1];
        let symbols = BTreeMap::from([(0x1000, "data"), (0x1001, "function")]);
        assert_eq!(
            first_forbidden(0x1000, &code, &symbols).map(|found| found.0),
            Some(0x1001)
        );
    }

    #[test]
    fn something_else_than_a_kernel_is_refused() {
        assert!(kernel(b"MZ").is_err());
    }
}
