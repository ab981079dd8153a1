use super::*;
use crate::devices::{Destination, Width};

mod by_cpu;
mod delivery;
mod properties;
mod register_access;
mod timer;

const HZ: u64 = 4_000_000_000;
const NOW: Ticks = Ticks(0);

/// As at power-on: disabled by software.
fn disabled() -> LocalApic {
    LocalApic::new(3, false, Clock::new(HZ))
}

/// Enabled by software, in xAPIC mode.
fn xapic() -> LocalApic {
    let mut apic = disabled();
    set(&mut apic, 0xf0, 0x1ff);
    apic
}

/// Enabled by software, in x2APIC mode.
fn x2apic() -> LocalApic {
    let mut apic = xapic();
    let base = apic.base_msr();
    apic.set_base_msr(NOW, base | 1 << 10).unwrap();
    apic
}

fn get(apic: &mut LocalApic, offset: u64) -> u64 {
    apic.mmio_read(NOW, offset, Width::Dword)
}

fn set(apic: &mut LocalApic, offset: u64, value: u64) -> Option<Action> {
    apic.mmio_write(NOW, offset, Width::Dword, value)
}

/// The error status, after the write that brings it up to date.
fn errors(apic: &mut LocalApic) -> u64 {
    set(apic, 0x280, 0);
    get(apic, 0x280)
}

fn message(mode: DeliveryMode, vector: u8, trigger: Trigger) -> Message {
    Message {
        mode,
        destination: Destination::All,
        vector,
        trigger,
        assert: true,
    }
}

fn fixed(vector: u8, trigger: Trigger) -> Message {
    message(DeliveryMode::Fixed, vector, trigger)
}

/// The highest vector in the 256-bit register at `base`, by a search of the page.
fn highest(page: &ApicPage, base: u16) -> Option<u8> {
    (0..=255)
        .rev()
        .find(|&vector| page.has_vector(base, vector))
}
