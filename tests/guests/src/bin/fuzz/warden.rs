//! Another CPU, that sees to it that the first one goes on: by an NMI where a round takes long, by a
//! reset where that does not help. In between it meddles with what the first one is at.

use crate::machine;
use crate::random::Random;
use crate::rounds;
use core::arch::naked_asm;
use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::descriptors::{TableRegister, selector};
use vireo_test_guests::memory::{read32, write8, write32, write64};
use vireo_test_guests::port::{in32, out8, out32};
use vireo_test_guests::{Shared, io_apic, paging, processors, time};

/// The local APIC's identifier of that CPU.
pub const ID: u32 = 1;
const VECTORS: usize = 256;
const TIMER: u32 = 0x40;
/// How often it looks, in microseconds.
const PERIOD: u64 = 1000;
/// How often it meddles in a round, less one.
const MEDDLINGS: u64 = 16;
/// How long it may take to start, in microseconds, and how often that is tried.
const START: u64 = 10_000;
const STARTS: u32 = 3;
/// How often it finds no progress before it resets the machine.
const PATIENCE: u32 = 100;

/// The round that the first CPU is at.
pub static ROUND: Shared<u64> = Shared::new(0);
/// The round behind the one that it has last called to an end.
static CALLED: Shared<u64> = Shared::new(0);
/// The round behind the one that it has last meddled with.
static MEDDLED: Shared<u64> = Shared::new(0);
/// Whether it looks yet.
static ATTENDS: Shared<bool> = Shared::new(false);
/// Its own: the other's handlers have stacks that are the other's.
static IDT: Shared<[u64; 2 * VECTORS]> = Shared::new([0; 2 * VECTORS]);

/// Starts it, where there is one.
pub fn start() {
    let handler = ignore as *const () as u64;
    let low = handler & 0xffff | u64::from(selector::CODE) << 16 | 0x8e << 40;
    for vector in 0..VECTORS {
        IDT.put(2 * vector, low | (handler >> 16 & 0xffff) << 48);
        IDT.put(2 * vector + 1, handler >> 32);
    }
    processors::prepare();
    restart();
}

/// Starts it again, whatever it is at.
pub fn restart() {
    let limit = time::microseconds(START);
    for _ in 0..STARTS {
        ATTENDS.set(false);
        if processors::start_within(ID, limit) {
            processors::give(ID, attend);
            if processors::wait_for(limit, || ATTENDS.get()) {
                return;
            }
        }
    }
}

/// Whether this round has taken too long.
pub fn has_called() -> bool {
    CALLED.get() == ROUND.get() + 1
}

/// Whether devices may not be as this round has left them.
pub fn has_meddled() -> bool {
    has_called() || MEDDLED.get() == ROUND.get() + 1
}

fn attend() {
    let register = TableRegister {
        limit: 16 * VECTORS as u16 - 1,
        base: IDT.pointer().cast::<u64>().cast_const(),
    };
    cpu::disable_interrupts();
    // SAFETY: all entries are valid.
    unsafe { core::arch::asm!("lidt [{}]", in(reg) &raw const register) };
    ATTENDS.set(true);
    let period = time::microseconds(PERIOD);
    let (mut seen, mut times) = (ROUND.get(), 0);
    loop {
        apic::write_unchecked(register::LVT_TIMER, entry::TSC_DEADLINE | TIMER);
        cpu::wrmsr_unchecked(msr::TSC_DEADLINE, rdtsc() + period);
        cpu::halt();
        let round = ROUND.get();
        if round != seen {
            (seen, times) = (round, 0);
            MEDDLED.set(round + 1);
            let mut random = Random::new(rdtsc(), round);
            for _ in 0..random.below(MEDDLINGS) {
                meddle(&mut random);
            }
            continue;
        }
        times += 1;
        CALLED.set(round + 1);
        if times > PATIENCE && !crate::code::TRACED.get() {
            const RESET_CONTROL: u16 = 0xcf9;
            out8(RESET_CONTROL, 6);
        }
        // To the first, or whoever else takes it.
        apic::write_unchecked(register::ICR_HIGH, 0);
        apic::write_unchecked(register::ICR, entry::NMI | entry::LEVEL_ASSERT);
    }
}

/// Does something to code, data, page tables or devices that the first CPU may be using. Nothing
/// of it faults.
fn meddle(random: &mut Random) {
    let value = random.number();
    let in_scratch = |random: &mut Random| paging::scratch(random.below(4)) + random.below(4088);
    match random.below(8) {
        0..=2 => write64(in_scratch(random), value),
        3 => write8(in_scratch(random), value as u8),
        4 => write64(machine::loose_entry(random), value),
        5 => {
            let port = rounds::harmless_port(random);
            match random.below(2) {
                0 => out32(port, value as u32),
                _ => drop(core::hint::black_box(in32(port))),
            }
        }
        6 => {
            write32(io_apic::BASE, random.below(0x40) as u32);
            match random.below(2) {
                0 => write32(io_apic::BASE + 0x10, value as u32),
                _ => drop(core::hint::black_box(read32(io_apic::BASE + 0x10))),
            }
        }
        _ => {
            let destination = random.pick(&[0, 0, ID, 0xff]);
            let command = rounds::harmless_command(value & 0xc_cfff) as u32;
            apic::write_unchecked(register::ICR_HIGH, destination << 24);
            apic::write_unchecked(register::ICR, command);
        }
    }
}

/// Ends whatever has come, by the page that its local APIC has its registers in.
#[unsafe(naked)]
unsafe extern "C" fn ignore() {
    naked_asm!(
        "push rax",
        "mov eax, {eoi}",
        "mov dword ptr [rax], 0",
        "pop rax",
        "iretq",
        eoi = const apic::BASE + register::EOI as u64,
    )
}
