//! The host's I/O APICs: ISA interrupts to vectors, and the 8259s silenced.
//! Data sheet: Intel 82093AA.

use super::acpi::{IoApicEntry, Platform, Route};
use super::interrupts;
use super::memory::paging;
use crate::addr::{Hpa, Hva};
use crate::arch::cpu::without_interrupts;
use crate::arch::port::outb;
use alloc::vec::Vec;
use spin::Mutex;

/// COM1's ISA interrupt.
pub const COM1_IRQ: u8 = 4;
/// COM2's.
pub const COM2_IRQ: u8 = 3;

const VERSION: u32 = 1;
const REDIRECTION: u32 = 0x10;
/// Redirection entry, low half: active low.
const ACTIVE_LOW: u32 = 1 << 13;
/// Redirection entry, low half: level-triggered.
const LEVEL: u32 = 1 << 15;
/// Redirection entry, low half: masked.
const MASKED: u32 = 1 << 16;

/// One I/O APIC, mapped.
struct IoApic {
    registers: Hva,
    /// Its first global system interrupt.
    base: u32,
    /// Its number of inputs.
    inputs: u32,
}

impl IoApic {
    fn select(&self, register: u32) -> *mut u32 {
        // SAFETY: the register-select register, in the page that `init` mapped uncached.
        unsafe { (self.registers.0 as *mut u32).write_volatile(register) };
        (self.registers.0 + 0x10) as *mut u32
    }

    fn read(&self, register: u32) -> u32 {
        // SAFETY: the window register, in the mapped page.
        unsafe { self.select(register).read_volatile() }
    }

    fn write(&self, register: u32, value: u32) {
        // SAFETY: the window register, in the mapped page. Interrupts are all
        // that the values written here can cause.
        unsafe { self.select(register).write_volatile(value) };
    }

    fn mask_all(&self) {
        for input in 0..self.inputs {
            self.write(REDIRECTION + 2 * input, MASKED);
        }
    }
}

struct State {
    apics: Vec<IoApic>,
    routes: [Route; 16],
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

/// Number of inputs, from the version register; `None` where no I/O APIC answers.
fn inputs(version: u32) -> Option<u32> {
    // 0x0x: external 82489DX; 0x1x and 0x2x: I/O APICs. Nothing there reads all ones or zero.
    let inputs = (version >> 16 & 0xff) + 1;
    (matches!(version & 0xff, 0x01..=0x2f) && inputs <= 240).then_some(inputs)
}

/// A redirection entry: fixed delivery to one CPU by its identifier.
const fn entry(route: Route, vector: u8, apic_id: u8, masked: bool) -> u64 {
    let mut low = vector as u32;
    if route.active_low {
        low |= ACTIVE_LOW;
    }
    if route.level {
        low |= LEVEL;
    }
    if masked {
        low |= MASKED;
    }
    (apic_id as u64) << 56 | low as u64
}

/// Masks the 8259s and every input of every I/O APIC, and routes the ISA
/// interrupts, still masked, to vector [`interrupts::ISA`] onwards of the
/// calling CPU. How many I/O APICs answer.
///
/// # Safety
/// Once, on the bootstrap processor, interrupts off; the entries must be real
/// I/O APICs or unclaimed addresses.
pub unsafe fn init(platform: &Platform) -> usize {
    // SAFETY: OCW1 of the two 8259s; all lines masked.
    unsafe {
        outb(0x21, 0xff);
        outb(0xa1, 0xff);
    }
    let mut apics = Vec::new();
    for &IoApicEntry { address, base } in &platform.io_apics {
        let Ok(registers) = paging::map_device(Hpa(address), 0x20) else {
            log::warn!("no memory to map the I/O APIC at {address:#x}");
            continue;
        };
        let mut apic = IoApic {
            registers,
            base,
            inputs: 0,
        };
        match inputs(apic.read(VERSION)) {
            Some(inputs) => {
                apic.inputs = inputs;
                apic.mask_all();
                apics.push(apic);
            }
            None => log::warn!("no I/O APIC answers at {address:#x}"),
        }
    }
    let found = apics.len();
    let state = State {
        apics,
        routes: platform.isa,
    };
    for irq in 0..16 {
        program(&state, irq, true);
    }
    *STATE.lock() = Some(state);
    found
}

fn program(state: &State, irq: u8, masked: bool) -> bool {
    let Some(&route) = state.routes.get(usize::from(irq)) else {
        return false;
    };
    // A destination has eight bits; the CPU that boots has a small identifier.
    let Ok(apic_id) = u8::try_from(super::local_apic::id()) else {
        return false;
    };
    for apic in &state.apics {
        if let Some(input) = route
            .gsi
            .checked_sub(apic.base)
            .filter(|&input| input < apic.inputs)
        {
            let bits = entry(route, interrupts::ISA + irq, apic_id, masked);
            apic.write(REDIRECTION + 2 * input, MASKED);
            apic.write(REDIRECTION + 2 * input + 1, (bits >> 32) as u32);
            apic.write(REDIRECTION + 2 * input, bits as u32);
            return true;
        }
    }
    false
}

/// Lets an ISA interrupt through to the calling CPU; whether an I/O APIC has it.
pub fn unmask_isa(irq: u8) -> bool {
    without_interrupts(|| {
        STATE
            .lock()
            .as_ref()
            .is_some_and(|state| program(state, irq, false))
    })
}

/// Stops an ISA interrupt.
pub fn mask_isa(irq: u8) -> bool {
    without_interrupts(|| {
        STATE
            .lock()
            .as_ref()
            .is_some_and(|state| program(state, irq, true))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_bits_of_the_data_sheet() {
        let isa = Route {
            gsi: 4,
            active_low: false,
            level: false,
        };
        assert_eq!(entry(isa, 0x34, 0, false), 0x34);
        assert_eq!(entry(isa, 0x34, 2, true), 0x0200_0000_0001_0034);
        let pci = Route {
            gsi: 9,
            active_low: true,
            level: true,
        };
        assert_eq!(entry(pci, 0x39, 0xff, false), 0xff00_0000_0000_a039);
    }

    #[test]
    fn only_a_plausible_version_is_an_io_apic() {
        assert_eq!(inputs(0x0017_0011), Some(24));
        assert_eq!(inputs(0x0077_0020), Some(120));
        assert_eq!(inputs(u32::MAX), None);
        assert_eq!(inputs(0), None);
    }
}
