//! Instructions that nobody has written, in a page of their own, with registers that nobody
//! expects.

use crate::machine::{self, CODE};
use crate::random::Random;
use core::arch::naked_asm;
use vireo_test_guests::cpu::rflags;
use vireo_test_guests::descriptors::selector;
use vireo_test_guests::exceptions::{self, Exception};
use vireo_test_guests::memory::{write_code, write64};
use vireo_test_guests::report::say;
use vireo_test_guests::{Shared, paging};

const LONGEST: usize = 64;
/// INT3: whatever the code is, behind it is an end.
const END: u8 = 0xcc;

/// RAX, RBX, RCX, RDX, RSI, RDI, RBP, R8 to R15, and what IRET takes: RIP, CS, RFLAGS, RSP, SS.
pub const REGISTERS: usize = 20;
pub const RAX: usize = 0;
pub const RCX: usize = 2;
pub const RDX: usize = 3;
pub const RSI: usize = 4;
pub const RIP: usize = 15;
pub const CS: usize = 16;
const RFLAGS: usize = 17;
pub const RSP: usize = 18;
pub const SS: usize = 19;

/// Whether code and registers are told before they are run.
pub static TRACED: Shared<bool> = Shared::new(false);

static STATE: Shared<[u64; REGISTERS]> = Shared::new([0; REGISTERS]);

/// Opcodes of one byte with a ModRM byte.
const WITH_OPERAND: [u8; 81] = [
    0x00, 0x01, 0x02, 0x03, 0x08, 0x09, 0x0a, 0x0b, 0x10, 0x11, 0x12, 0x13, 0x18, 0x19, 0x1a, 0x1b,
    0x20, 0x21, 0x22, 0x23, 0x28, 0x29, 0x2a, 0x2b, 0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3a, 0x3b,
    0x63, 0x69, 0x6b, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8c, 0x8d,
    0x8e, 0x8f, 0xc0, 0xc1, 0xc6, 0xc7, 0xd0, 0xd1, 0xd2, 0xd3, 0xf6, 0xf7, 0xfe, 0xff, 0x86, 0x87,
    0x88, 0x89, 0x8a, 0x8b, 0x88, 0x89, 0x8a, 0x8b, 0x88, 0x89, 0x8a, 0x8b, 0xfe, 0xff, 0x8e, 0x8c,
    0xc7,
];
/// Opcodes behind 0x0f with a ModRM byte.
const WITH_OPERAND_0F: [u8; 59] = [
    0x01, 0x01, 0x0d, 0x18, 0x20, 0x21, 0x22, 0x23, 0x40, 0x45, 0x4c, 0x4f, 0x78, 0x79, 0x90, 0x95,
    0x9c, 0x9f, 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xb8, 0xba,
    0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3, 0xc7, 0xb2, 0xb4, 0xb5, 0x10, 0x11, 0x28, 0x29,
    0x2b, 0x6e, 0x6f, 0x7e, 0x7f, 0xd6, 0xe7, 0xf0, 0x1f, 0xb0, 0xb1,
];
/// Opcodes behind 0x0f without one.
const PLAIN_0F: [u8; 27] = [
    0x05, 0x06, 0x07, 0x08, 0x09, 0x0b, 0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x37, 0x77, 0xa0, 0xa1,
    0xa2, 0xa8, 0xa9, 0xaa, 0xc8, 0xcf, 0x30, 0x32, 0xa2, 0x09, 0x06,
];
/// The last bytes of what begins with 0x0f 0x01: VMX, MONITOR, SMAP, XSETBV, SWAPGS, RDTSCP and
/// what else there may be.
const SYSTEM_0F01: [u8; 28] = [
    0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc8, 0xc9, 0xca, 0xcb, 0xcf, 0xd0, 0xd1, 0xd4, 0xd5, 0xd6,
    0xd7, 0xd8, 0xd9, 0xdd, 0xee, 0xef, 0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd,
];
const STRINGS: [u8; 14] = [
    0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0x6c, 0x6d, 0x6e, 0x6f,
];
const PREFIXES: [u8; 11] = [
    0x66, 0x66, 0xf2, 0xf3, 0xf0, 0xf0, 0x67, 0x2e, 0x36, 0x64, 0x65,
];

/// Some instructions.
pub struct Code {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Code {
    const fn new() -> Self {
        Self {
            bytes: [END; LONGEST],
            length: 0,
        }
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
            self.length += 1;
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.push(byte));
    }

    /// These bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut new = Self::new();
        new.append(bytes);
        new
    }

    /// Bytes as they come.
    pub fn any(random: &mut Random) -> Self {
        let mut new = Self::new();
        for _ in 0..2 + random.below(14) {
            new.push(random.next() as u8);
        }
        new
    }

    /// What looks like instructions, most of them privileged or with an operand in memory.
    pub fn likely(random: &mut Random) -> Self {
        let mut new = Self::new();
        for _ in 0..1 + random.below(3) {
            new.push_likely(random);
        }
        new
    }

    fn push_likely(&mut self, random: &mut Random) {
        while random.once_in(3) {
            self.push(random.pick(&PREFIXES));
        }
        if random.once_in(3) {
            self.push(0x40 | random.below(16) as u8);
        }
        match random.below(12) {
            0..=4 => {
                self.push(random.pick(&WITH_OPERAND));
                self.push_operand(random);
            }
            5..=7 => {
                self.push(0x0f);
                self.push(random.pick(&WITH_OPERAND_0F));
                self.push_operand(random);
            }
            8 => self.append(&[0x0f, random.pick(&PLAIN_0F)]),
            9 => self.append(&[0x0f, 0x01, random.pick(&SYSTEM_0F01)]),
            10 => {
                if random.once_in(2) {
                    self.push(random.pick(&[0xf2, 0xf3]));
                }
                self.push(random.pick(&STRINGS));
            }
            _ => match random.below(6) {
                // INVEPT, INVVPID, MOVBE.
                0 => {
                    let last = random.pick(&[0x80, 0x81, 0xf0, 0xf1]);
                    self.append(&[0x66, 0x0f, 0x38, last]);
                    self.push_operand(random);
                }
                // HLT, STI, CLI, PAUSE, POPF, IRET, INT1, INTO.
                1 => self.push(random.pick(&[0xf4, 0xfb, 0xfa, 0x9c, 0x9d, 0xcf, 0xf1, 0xce])),
                2 => self.append(&[0xcd, random.next() as u8]),
                3 => self.push(random.pick(&[0xec, 0xed, 0xee, 0xef])),
                // VEX.
                4 => {
                    self.append(&[0xc5, random.next() as u8]);
                    self.push(random.pick(&[0x10, 0x11, 0x28, 0x29, 0x6f, 0x7f, 0x77, 0xf7]));
                    self.push_operand(random);
                }
                _ => self.push(random.next() as u8),
            },
        }
    }

    /// ModRM, in most cases memory, and what may belong to it; an immediate operand is what
    /// comes next.
    fn push_operand(&mut self, random: &mut Random) {
        let byte = random.next() as u8;
        let byte = if random.below(4) == 0 {
            byte
        } else {
            byte & 0x3f
        };
        self.push(byte);
        if byte & 7 == 4 && byte < 0xc0 {
            // An index register makes an address that leads nowhere.
            let any = random.next() as u8;
            self.push(if random.once_in(4) {
                any
            } else {
                any & 7 | 0x20
            });
        }
        match byte >> 6 {
            1 => self.push(random.below(64) as u8),
            2 => self.append(&(random.below(0x2000) as u32).to_le_bytes()),
            _ => {}
        }
        if random.once_in(3) {
            for _ in 0..random.below(5) {
                self.push(random.next() as u8);
            }
        }
    }

    /// Takes out what ends the guest at once: OUT to ports such as the debug exit, and in most
    /// cases tables that are nowhere, and x87 instructions, which devices do not see.
    fn defuse(&mut self, random: &mut Random) {
        let keep = random.once_in(64);
        for index in 0..LONGEST {
            let before = |count| {
                index
                    .checked_sub(count)
                    .map_or(0, |index| self.bytes[index])
            };
            let byte = self.bytes[index];
            let register = byte >> 3 & 7;
            self.bytes[index] = match (before(2), before(1), byte) {
                (_, 0xe6 | 0xe7, 0x60..=0x64 | 0xe6..=0xf7) => 0x80,
                // MOV to CR3, LGDT and LIDT become others of their group.
                (0x0f, 0x22, _) if !keep && register == 3 => byte ^ 0x08,
                (0x0f, 0x01, ..0xc0) if !keep && matches!(register, 2 | 3) => byte ^ 0x10,
                (_, _, 0xd8..=0xdf) if !keep => byte ^ 0x50,
                // EVEX, at some of which Bochs panics.
                (_, _, 0x62) => 0x63,
                _ => continue,
            };
        }
    }
}

/// Registers: mostly addresses, the others numbers.
pub fn registers(random: &mut Random) -> [u64; REGISTERS] {
    let mut state = [0; REGISTERS];
    for value in &mut state {
        *value = match random.below(16) {
            0..=7 => machine::pointer(random),
            8 | 9 => random.below(64),
            10 => crate::rounds::msr(random).into(),
            11 => crate::rounds::harmless_port(random).into(),
            _ => random.number(),
        };
    }
    if random.once_in(3) {
        state[RCX] = random.below(80);
    }
    state[RFLAGS] = flags(random);
    state[CS] = selector::CODE.into();
    state[SS] = selector::DATA.into();
    state[RSP] = (machine::DATA + machine::offset(random)) & !7;
    if random.once_in(64) {
        state[RSP] = machine::pointer(random);
    }
    state
}

/// Flags: those of results as they come, the others seldom.
pub fn flags(random: &mut Random) -> u64 {
    let kept = rflags::CARRY | 0xd4 | 0x800;
    let mut flags = random.next() & kept | 2;
    for (bit, rare) in [
        (8, 12),
        (9, 3),
        (10, 6),
        (12, 8),
        (13, 8),
        (14, 64),
        (18, 8),
    ] {
        if random.once_in(rare) {
            flags |= 1 << bit;
        }
    }
    flags
}

/// Puts code at an address, with its end behind it.
pub fn place(random: &mut Random, mut code: Code, address: u64) {
    code.defuse(random);
    write_code(address, &code.bytes);
    if TRACED.get() {
        let bytes = code.bytes.get(..code.length).unwrap_or_default();
        say(format_args!("fuzz: {bytes:02x?} at {address:#x}"));
    }
}

/// Executes the code with these registers, and returns what has ended it: its breakpoint, if it
/// came so far. It may be at the end of its page.
pub fn run(random: &mut Random, mut code: Code, state: &[u64; REGISTERS]) -> Option<Exception> {
    code.defuse(random);
    let place = if random.once_in(16) {
        paging::PAGE - code.length as u64
    } else {
        64 * random.below(63)
    };
    let room = (paging::PAGE - place) as usize;
    let bytes = code.bytes.get(..LONGEST.min(room)).unwrap_or_default();
    write_code(paging::scratch(0) + place, bytes);
    let mut state = *state;
    state[RIP] = CODE + place;
    if TRACED.get() {
        let bytes = bytes.get(..code.length).unwrap_or_default();
        say(format_args!("fuzz: {bytes:02x?} at {:#x}", CODE + place));
    }
    execute(&state)
}

/// Executes what is at RIP.
pub fn execute(state: &[u64; REGISTERS]) -> Option<Exception> {
    for (index, &value) in state.iter().enumerate() {
        STATE.put(index, value);
    }
    if TRACED.get() {
        say(format_args!("fuzz: {state:x?}"));
    }
    machine::begin();
    let caught = exceptions::catch(|| enter());
    machine::restore();
    if TRACED.get() {
        say(format_args!("fuzz: {caught:x?}"));
    }
    caught
}

/// Fills the pages that the registers lead to.
pub fn fill_data(random: &mut Random) {
    for frame in 1..4 {
        let place = paging::scratch(frame) + 8 * random.below(512);
        let value = random.number();
        write64(place, value);
    }
}

/// Loads all registers, and jumps.
#[unsafe(naked)]
extern "C" fn enter() {
    naked_asm!(
        "mov rsp, offset {state}",
        "pop rax",
        "pop rbx",
        "pop rcx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "pop rbp",
        "pop r8",
        "pop r9",
        "pop r10",
        "pop r11",
        "pop r12",
        "pop r13",
        "pop r14",
        "pop r15",
        "iretq",
        state = sym STATE,
    )
}
