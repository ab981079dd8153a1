//! The rounds, by kind.

use crate::code::{self, Code, RAX, RCX, RDX, RSI};
use crate::machine::{self, DEVICES, LOOSE, LOOSE_PAGES, Touched};
use crate::modes;
use crate::random::Random;
use crate::warden;
use vireo_test_guests::cpu::{self, msr as number, rdtsc};
use vireo_test_guests::exceptions;
use vireo_test_guests::memory::{read8, read16, read32, read64, write8, write16, write32, write64};
use vireo_test_guests::paging::{self, PAGE, WINDOW};
use vireo_test_guests::port::{in8, in16, in32, out8, out16, out32};
use vireo_test_guests::{apic, io_apic, processors, time};

/// A kind of round.
type Kind = fn(&mut Random) -> Touched;

/// How often of a hundred, and which.
const KINDS: [(u64, Kind); 12] = [
    (19, instructions),
    (10, other_modes),
    (10, anything),
    (10, model_specific),
    (14, ports),
    (14, devices_in_memory),
    (6, control_registers),
    (3, descriptor_tables),
    (4, interrupt_commands),
    (5, page_tables),
    (3, waiting),
    (2, transfers),
];

/// One round.
pub fn round(random: &mut Random) -> Touched {
    let mut left = random.below(100);
    for (share, kind) in KINDS {
        match left.checked_sub(share) {
            Some(rest) => left = rest,
            None => return kind(random),
        }
    }
    Touched::NOTHING
}

fn instructions(random: &mut Random) -> Touched {
    code::fill_data(random);
    let code = Code::likely(random);
    let state = code::registers(random);
    code::run(random, code, &state);
    if random.once_in(4) {
        Touched::ALL
    } else {
        Touched::NOTHING
    }
}

fn other_modes(random: &mut Random) -> Touched {
    modes::run(random);
    if random.once_in(4) {
        Touched::ALL
    } else {
        Touched::NOTHING
    }
}

fn anything(random: &mut Random) -> Touched {
    code::fill_data(random);
    let code = Code::any(random);
    let state = code::registers(random);
    code::run(random, code, &state);
    if random.once_in(4) {
        Touched::ALL
    } else {
        Touched::NOTHING
    }
}

/// The number of an MSR: mostly one that is known.
pub fn msr(random: &mut Random) -> u32 {
    const KNOWN: [u32; 48] = [
        0x0, 0x1, 0x10, 0x17, 0x1b, 0x2a, 0x34, 0x3a, 0x3b, 0x48, 0x49, 0x79, 0x8b, 0xce, 0xe7,
        0xe8, 0xfe, 0x10a, 0x10b, 0x122, 0x140, 0x174, 0x175, 0x176, 0x179, 0x17a, 0x17b, 0x1a0,
        0x1d9, 0x200, 0x250, 0x277, 0x2ff, 0x38f, 0x400, 0x480, 0x48d, 0x491, 0x6a0, 0x6e0, 0xc80,
        0xd90, 0xda0, 0x570, 0xe1, 0x1c8, 0x1db, 0x300,
    ];
    match random.below(8) {
        0..=2 => random.pick(&KNOWN),
        3 => 0x800 + random.below(0x48) as u32,
        4 => 0xc000_0080 + random.below(5) as u32,
        5 => 0xc000_0100 + random.below(4) as u32,
        6 => random.pick(&[
            0x4b56_4d00,
            0x4b56_4d01,
            0x4b56_4d02,
            0x4000_0000,
            0xc001_0015,
        ]),
        _ => random.number() as u32,
    }
}

fn model_specific(random: &mut Random) -> Touched {
    let msr = msr(random);
    let old = cpu::rdmsr(msr);
    if random.once_in(3) {
        return Touched::NOTHING;
    }
    let value = match (random.below(3), old) {
        (0, Ok(old)) => old ^ 1 << random.below(64),
        (1, Ok(old)) => old,
        _ => random.number(),
    };
    let value = match msr {
        // Its own INIT would be its end, and what is written by such a clock goes to memory.
        0x830 => harmless_command(value),
        0x4b56_4d00 | 0x4b56_4d01 => paging::scratch(1) + value % (2 * PAGE),
        _ => value,
    };
    cpu::wrmsr(msr, value);
    if let (Ok(old), 0x10 | 0x3b | 0x174..=0x176 | 0x48 | 0x277 | 0xc000_0081.., true) =
        (old, msr, msr != 0x830)
    {
        cpu::wrmsr(msr, old);
    }
    machine::restore();
    Touched::APICS
}

/// An interrupt command that ends nobody.
pub fn harmless_command(value: u64) -> u64 {
    let is_init = value >> 8 & 7 == 5;
    if is_init { value ^ 0x100 } else { value }
}

/// A port: mostly one where somebody is.
pub fn port(random: &mut Random) -> u16 {
    const KNOWN: [(u16, u16); 19] = [
        (0x3b4, 2),
        (0x3c0, 32),
        (0x20, 2),
        (0xa0, 2),
        (0x4d0, 2),
        (0x40, 4),
        (0x60, 5),
        (0x70, 2),
        (0x80, 1),
        (0x92, 1),
        (0xb2, 2),
        (0xcf8, 8),
        (0x3f8, 8),
        (0x510, 12),
        (0xe0, 5),
        (0x2000, 24),
        (0x600, 12),
        (0xe9, 1),
        (0xf0, 8),
    ];
    if random.once_in(8) {
        return random.next() as u16;
    }
    let (first, count) = random.pick(&KNOWN);
    first.wrapping_add(random.below(count.into()) as u16)
}

/// What may be written to so many ports from this one on, if anything: nothing that ends the
/// machine, has it sleep or talks on its console.
fn harmless(port: u16, bytes: u16, value: u32) -> Option<u32> {
    let touches = |first: u16, last: u16| port <= last && port.saturating_add(bytes) > first;
    if touches(0xf4, 0xf7) || touches(0xe9, 0xe9) || touches(0x3f8, 0x3f8) || touches(0xcf9, 0xcf9)
    {
        return None;
    }
    // Commands that reset, or change the output port, which does too; the latter's bit.
    if touches(0x64, 0x64) || touches(0x92, 0x92) || touches(0x60, 0x60) {
        return Some(value & 0x3e3e_3e3e);
    }
    if touches(0x604, 0x605) {
        return Some(value & !0x2020_2020);
    }
    Some(value)
}

/// A port to which anything may be written.
pub fn harmless_port(random: &mut Random) -> u16 {
    const NOBODY: u16 = 0x84;
    let port = port(random);
    if harmless(port, 4, u32::MAX) == Some(u32::MAX) {
        port
    } else {
        NOBODY
    }
}

fn ports(random: &mut Random) -> Touched {
    let mut wrote = false;
    for _ in 0..1 + random.below(6) {
        let port = port(random);
        let value = random.number() as u32;
        match random.below(7) {
            0 => core::hint::black_box(in8(port).into()),
            1 => core::hint::black_box(in16(port).into()),
            2 => core::hint::black_box(in32(port)),
            3 => string_port(random, port),
            width => {
                let bytes = 1 << (width - 4);
                let Some(value) = harmless(port, bytes, value) else {
                    continue;
                };
                wrote = true;
                match bytes {
                    1 => out8(port, value as u8),
                    2 => out16(port, value as u16),
                    _ => out32(port, value),
                }
                0
            }
        };
    }
    if wrote {
        Touched::PORTS
    } else {
        Touched::NOTHING
    }
}

/// INS, or OUTS where nothing can be ended by it, with or without a repeat prefix.
fn string_port(random: &mut Random, port: u16) -> u32 {
    let output = random.once_in(2) && harmless(port, 4, u32::MAX) == Some(u32::MAX);
    let opcode = random.pick(&[0x6c, 0x6d]) | if output { 2 } else { 0 };
    let prefix = random.pick(&[0x90, 0xf3, 0xf2, 0x66, 0x67, 0x65]);
    // Port 0x80 is nobody's, whose accesses do not exit.
    let port = if port == 0x80 { 0x84 } else { port };
    let mut state = code::registers(random);
    state[RDX] = port.into();
    if !random.once_in(16) {
        state[RCX] = random.below(32);
    }
    code::run(random, Code::of(&[prefix, opcode]), &state);
    0
}

fn devices_in_memory(random: &mut Random) -> Touched {
    for _ in 0..1 + random.below(6) {
        let address = machine::pointer(random);
        let is_local_apic = address & !(PAGE - 1) == DEVICES;
        let value = random.number();
        let value = match address & 0xff0 {
            0x300 if is_local_apic => harmless_command(value),
            _ => value,
        };
        exceptions::catch(|| match random.below(8) {
            0 => drop(core::hint::black_box(read8(address))),
            1 => drop(core::hint::black_box(read16(address))),
            2 => drop(core::hint::black_box(read32(address))),
            3 => drop(core::hint::black_box(read64(address))),
            4 => write8(address, value as u8),
            5 => write16(address, value as u16),
            6 => write32(address, value as u32),
            _ => write64(address, value),
        });
    }
    Touched::APICS
}

fn control_registers(random: &mut Random) -> Touched {
    let value = match random.below(4) {
        0 => random.number(),
        1 => random.next() & 0x1f_ffff,
        2 => 1 << random.below(32),
        _ => 0,
    };
    // MOV from and to CR0, CR4, CR8 and the debug registers, the value being XORed; LMSW; XSETBV;
    // MOV to CR3, of which the address stays.
    let mut state = code::registers(random);
    state[RAX] = value;
    let read_write = |debug: u8, register: u8, rex: u8| {
        let modrm = 0xc0 | register << 3 | 3;
        let read = [rex, 0x0f, 0x20 | debug, modrm];
        let write = [rex, 0x0f, 0x22 | debug, modrm];
        let [a, b, c, d] = read;
        let [e, f, g, h] = write;
        // XOR RBX, RAX, and a look at memory behind it.
        [a, b, c, d, 0x48, 0x31, 0xc3, e, f, g, h, 0x48, 0x8b, 0x06]
    };
    let code = match random.below(9) {
        0 | 1 => Code::of(&read_write(0, 0, 0x40)),
        2 | 3 => Code::of(&read_write(0, 4, 0x40)),
        4 => Code::of(&read_write(0, 0, 0x44)),
        5 => Code::of(&read_write(1, random.below(8) as u8, 0x40)),
        6 => Code::of(&[0x0f, 0x01, 0xf0, 0x48, 0x8b, 0x06]),
        7 => {
            state[RCX] = random.below(2);
            Code::of(&[0x0f, 0x01, 0xd1, 0x0f, 0x01, 0xd0])
        }
        _ => {
            state[RAX] = value & 0x8000_0000_0000_0fff;
            Code::of(&read_write(0, 3, 0x40))
        }
    };
    code::run(random, code, &state);
    Touched::NOTHING
}

/// SGDT, SIDT, LIDT and LGDT of what they have stored, with a limit that suffices or not; LLDT and
/// LTR of anything.
fn descriptor_tables(random: &mut Random) -> Touched {
    let mut state = code::registers(random);
    let selector = match random.below(3) {
        0 => random.next() as u16,
        _ => 8 * random.below(16) as u16,
    };
    state[RAX] = selector.into();
    if !random.once_in(64) {
        state[RSI] = machine::DATA + machine::offset(random) % (PAGE - 16);
    }
    let modrm = |register: u8| register << 3 | 6;
    let code = match random.below(6) {
        // SGDT [RSI], LGDT [RSI].
        0 => Code::of(&[0x0f, 0x01, modrm(0), 0x0f, 0x01, modrm(2)]),
        1 => Code::of(&[0x0f, 0x01, modrm(1), 0x0f, 0x01, modrm(3)]),
        2 => Code::of(&[0x0f, 0x00, 0xc0 | (random.below(6) as u8) << 3]),
        3 => Code::of(&[0x0f, 0x00, modrm(random.below(6) as u8)]),
        // LAR and LSL.
        4 => Code::of(&[0x0f, 0x02, 0xc8, 0x0f, 0x03, 0xc8]),
        // MOV to a segment register.
        _ => Code::of(&[0x8e, 0xc0 | (random.below(6) as u8) << 3]),
    };
    code::run(random, code, &state);
    Touched::NOTHING
}

fn interrupt_commands(random: &mut Random) -> Touched {
    if random.once_in(16) {
        return start_ups(random);
    }
    if random.once_in(4) {
        apic::set_x2apic(!apic::is_x2apic());
    }
    for _ in 0..1 + random.below(4) {
        let command = random.next() as u32 & 0xc_cfff;
        let vector = if random.once_in(4) { 0 } else { 0x20 };
        let command = harmless_command((command | vector).into()) as u32;
        let any = random.next() as u32;
        let destination = random.pick(&[0, 1, 0xff, u32::MAX, any]);
        apic::send(destination, command);
        if random.once_in(2) {
            cpu::interrupt_window();
        }
    }
    Touched::APICS
}

/// INIT, start-up and other interrupts for the warden's CPU, which may begin at another place than
/// its own, and then it starts again. Seldom INIT is for all, and ends the round's CPU.
fn start_ups(random: &mut Random) -> Touched {
    const INIT: u32 = 5;
    // An NMI ends everything until that CPU has an IDT.
    io_apic::mask_all();
    for _ in 0..random.below(6) {
        let command = match random.below(4) {
            0 => INIT << 8 | random.next() as u32 & 0xc000,
            1 => processors::START_UP,
            2 if random.once_in(16) => 0x600 | random.next() as u32 & 0xff,
            // No NMI either.
            _ => random.next() as u32 & 0xc3ff,
        };
        let destination = if random.once_in(256) {
            0xff
        } else {
            warden::ID
        };
        apic::send(destination, command);
        if random.once_in(2) {
            time::spin(random.below(1000));
        }
    }
    warden::restart();
    Touched::APICS
}

/// Entries that point anywhere, with any bits, and an access by them.
fn page_tables(random: &mut Random) -> Touched {
    let number = random.below(LOOSE_PAGES);
    let index = (LOOSE - WINDOW) / PAGE + number;
    let frame = match random.below(4) {
        0 => paging::scratch(random.below(4)),
        1 => apic::BASE,
        2 => random.number() & !0xfff,
        _ => random.next() >> 12 & 0xf_ffff_f000,
    };
    let low = random.next() & 0xfff;
    let high = if random.once_in(4) {
        random.next() & 0xfff << 52
    } else {
        0
    };
    paging::map(index, frame, low | high | u64::from(random.below(8) != 0));
    let mut state = code::registers(random);
    let address = WINDOW + PAGE * index + machine::offset(random) % PAGE;
    let accessed = [4, 5].map(|_| address);
    state[4..6].copy_from_slice(&accessed);
    // The local APIC may be there: nothing that could be an interrupt command to itself.
    state[RAX] = harmless_command(random.number());
    let code = match random.below(4) {
        0 => Code::of(&[0x48, 0x8b, 0x06]),
        1 => Code::of(&[0x48, 0x89, 0x06]),
        2 => Code::of(&[0xff, 0x06]),
        _ => Code::likely(random),
    };
    code::run(random, code, &state);
    machine::map_loose(number);
    if frame == apic::BASE {
        Touched::APICS
    } else {
        Touched::NOTHING
    }
}

/// HLT with a timer that is due soon, or was.
fn waiting(random: &mut Random) -> Touched {
    apic::write(apic::register::SVR, apic::SVR_ENABLED);
    let mode = random.pick(&[0, apic::entry::PERIODIC, apic::entry::TSC_DEADLINE]);
    let vector = 0x20 + random.below(0xe0) as u32;
    apic::write(apic::register::LVT_TIMER, mode | vector);
    if mode == apic::entry::TSC_DEADLINE {
        let due = random.below(2000);
        let now = rdtsc();
        cpu::wrmsr(number::TSC_DEADLINE, now.wrapping_add(due));
    } else {
        apic::write(apic::register::DIVIDE, random.below(16) as u32);
        apic::write(apic::register::INITIAL_COUNT, random.below(1000) as u32);
    }
    machine::look_soon();
    match random.below(3) {
        0 => cpu::halt(),
        1 => time::spin(random.below(1000)),
        _ => cpu::interrupt_window(),
    }
    apic::write(apic::register::INITIAL_COUNT, 0);
    Touched::APICS
}

/// A transfer that `fw_cfg` is asked for, from or to anywhere.
fn transfers(random: &mut Random) -> Touched {
    let request = paging::scratch(3) + random.below(64);
    let any = random.next() as u16;
    let key = random.pick(&[0, 1, 0x19, 0x20, 0x21, 0x22, any]);
    let control = u32::from(key) << 16 | random.below(32) as u32;
    let length = match random.below(8) {
        0 => random.number() as u32,
        _ => random.below(3 * PAGE) as u32,
    };
    let address = match random.below(8) {
        0 => random.number() | 1 << 24,
        1 => request,
        _ => paging::scratch(1),
    };
    let address = if address >> 24 == 0 && length > 2 * PAGE as u32 {
        0xfec0_0000
    } else {
        address
    };
    write32(request, control.swap_bytes());
    write32(request + 4, length.swap_bytes());
    write64(request + 8, address.swap_bytes());
    let at = if random.once_in(8) {
        random.number() | 1 << 24
    } else {
        request
    };
    out32(0x514, ((at >> 32) as u32).swap_bytes());
    out32(0x518, (at as u32).swap_bytes());
    core::hint::black_box(read32(request));
    Touched::NOTHING
}
