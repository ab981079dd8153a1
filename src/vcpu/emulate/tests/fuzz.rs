//! No bytes, no mode and no state make the emulator panic.

use super::*;
use crate::fuzz;
use crate::vcpu::segmentation::Rights;

#[test]
fn nothing_makes_it_panic() {
    const ROUNDS: u64 = 60_000;
    let (mut done, mut all) = (0, 0);
    fuzz::repeat("emulator", ROUNDS, |random| {
        all += 1;
        let mut code = [0u8; 15];
        code.fill_with(|| random.next() as u8);
        let mode = random.pick(&[Mode::Bits16, Mode::Bits32, Mode::Bits64]);
        let mut ram = Ram::new(4096, mode);
        if mode != Mode::Bits64 {
            ram.addressing = random.pick(&[
                Addressing::Real,
                Addressing::Virtual8086,
                Addressing::Protected,
            ]);
        }
        ram.cpl = random.below(4) as u8;
        ram.cr0 = random.next();
        ram.base = random.number();
        ram.memory.fill_with(|| random.next() as u8);
        for segment in &mut ram.segments {
            if random.below(2) == 0 {
                *segment = SegmentRegister {
                    selector: random.next() as u16,
                    base: random.number(),
                    limit: random.number() as u32,
                    rights: Rights(random.next() as u32),
                };
            }
        }
        ram.tables[0] = TableRegister {
            base: ram.base,
            limit: random.next() as u16,
        };
        ram.system[0] = SegmentRegister {
            rights: Rights(0x82),
            limit: random.next() as u32,
            ..ram.segments[0]
        };
        let mut general = GeneralRegisters::default();
        for index in 0..16 {
            let value = if random.below(2) == 0 {
                ram.base.wrapping_add(random.below(4096))
            } else {
                random.number()
            };
            general.set(index, value);
        }
        let rip = random.number();
        let length = 1 + random.below(15) as usize;
        let Ok(decoded) = Decoded::new(&code[..length], mode, rip) else {
            return;
        };
        let rflags = random.next() | 2;
        let before = general;
        let mut registers = Registers {
            general: &mut general,
            rip,
            rflags,
        };
        let progress = decoded.emulate(&mut registers, &mut ram, 5);
        assert!(ram.log.len() <= 64, "work is bounded");
        match progress {
            Ok(Progress::Done) => done += 1,
            Ok(Progress::Repeats) => assert_eq!(registers.rip, rip),
            Err(_) => {
                assert_eq!(registers.rip, rip);
                if !decoded.instruction.is_string_instruction() {
                    assert_eq!(*registers.general, before, "{code:x?} {mode:?}");
                    assert_eq!(registers.rflags, rflags);
                }
            }
        }
        let _ = decoded.plain_move();
    });
    assert!(done > all / 100, "{done}");
}
