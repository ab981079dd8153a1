//! Another CPU, that sees to it that the first one goes on: by an NMI where a round takes long, by a
//! reset where that does not help.

use core::arch::naked_asm;
use vireo_test_guests::apic::{self, entry, register};
use vireo_test_guests::cpu::{self, msr, rdtsc};
use vireo_test_guests::descriptors::{TableRegister, selector};
use vireo_test_guests::port::out8;
use vireo_test_guests::{Shared, processors, time};

/// The local APIC's identifier of that CPU.
const ID: u32 = 1;
const VECTORS: usize = 256;
const TIMER: u32 = 0x40;
/// How often it looks, in microseconds.
const PERIOD: u64 = 2000;
/// How often it finds no progress before it resets the machine.
const PATIENCE: u32 = 100;

/// The round that the first CPU is at.
pub static ROUND: Shared<u64> = Shared::new(0);
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
    if processors::start(ID) {
        processors::give(ID, attend);
        processors::wait(|| ATTENDS.get());
    }
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
            continue;
        }
        times += 1;
        if times > PATIENCE && !crate::code::TRACED.get() {
            const RESET_CONTROL: u16 = 0xcf9;
            out8(RESET_CONTROL, 6);
        }
        // To the first, or whoever else takes it.
        apic::write_unchecked(register::ICR_HIGH, 0);
        apic::write_unchecked(register::ICR, entry::NMI | entry::LEVEL_ASSERT);
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
