//! The machine's off switch.
//!
//! In this order: what the firmware's tables say (ACPI S5), the power
//! management block of the two chipsets that emulators show, Bochs's own
//! port. EFI's ResetSystem is not among them: it would need the firmware's
//! runtime regions mapped executable again.

use super::acpi::{self, SleepRegister};
use super::{console, serial};
use crate::arch::cpu;
use crate::arch::port::{inl, inw, outb, outl, outw};
use core::fmt::Write;

/// PM1 control: sleep enable.
const SLEEP_ENABLE: u16 = 1 << 13;
/// PM1 control: sleep type, at bit 10.
const SLEEP_TYPE: u16 = 7 << 10;
/// PM1 control: the chipset is in ACPI mode.
const SCI_ENABLE: u16 = 1 << 0;
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

/// Chipset functions whose register 0x40 holds the power-management base, with
/// their S5 sleep type: vendor and device, device number, function.
const CHIPSETS: [(u32, u8, u8, u16); 3] = [
    // PIIX4 behind a 440FX: function 3 of device 1, or of device 7 on real boards. S5 is type 0.
    (0x7113_8086, 1, 3, 0),
    (0x7113_8086, 7, 3, 0),
    // ICH9's LPC bridge, as QEMU's q35 has it. S5 is type 7 on silicon; QEMU takes 0, see `off`.
    (0x2918_8086, 31, 0, 7),
];

/// Configuration mechanism 1: the address of a doubleword on bus 0.
const fn config_address(device: u8, function: u8, register: u8) -> u32 {
    1 << 31 | (device as u32 & 0x1f) << 11 | (function as u32 & 7) << 8 | register as u32 & 0xfc
}

fn config_read(device: u8, function: u8, register: u8) -> u32 {
    // SAFETY: configuration reads of bus 0 have no side effect at these registers.
    unsafe {
        outl(CONFIG_ADDRESS, config_address(device, function, register));
        inl(CONFIG_DATA)
    }
}

/// The PM1a control port, from register 0x40; `None` where the block is off.
const fn control_port(base: u32) -> Option<u16> {
    match base as u16 & 0xffc0 {
        0 | 0xffc0 => None,
        base => Some(base + 4),
    }
}

fn sleep(port: u16, kind: u16) {
    // SAFETY: PM1 control of the machine that shall go off.
    unsafe {
        let others = inw(port) & !(SLEEP_TYPE | SLEEP_ENABLE);
        outw(port, others | kind << 10 | SLEEP_ENABLE);
    }
}

/// Turns the machine off; when nothing does, says so and halts.
pub fn off_or_halt() -> ! {
    cpu::disable_interrupts();
    console::flush_unless_locked();
    off();
    let _ = writeln!(
        serial::Polled,
        "vireo: the machine has no off switch that is known here: halted"
    );
    cpu::halt_forever()
}

fn off() {
    if let Some(SleepRegister {
        pm1a,
        pm1b,
        type_a,
        type_b,
        enable,
    }) = acpi::sleep_register()
    {
        if let Some((command, value)) = enable {
            enter_acpi_mode(pm1a, command, value);
        }
        if let Some(port) = pm1b {
            sleep(port, type_b);
        }
        sleep(pm1a, type_a);
        settle();
    }
    for (identity, device, function, kind) in CHIPSETS {
        if config_read(device, function, 0) != identity {
            continue;
        }
        if let Some(port) = control_port(config_read(device, function, 0x40)) {
            sleep(port, kind);
            settle();
            // QEMU's ICH9 has S5 as type 0.
            sleep(port, 0);
            settle();
        }
    }
    for byte in *b"Shutdown" {
        // SAFETY: Bochs ends at this string; elsewhere nobody decodes the port.
        unsafe { outb(0x8900, byte) };
    }
    settle();
}

/// Asks the firmware for ACPI mode, without which some chipsets ignore a sleep type.
fn enter_acpi_mode(pm1a: u16, command: u16, value: u8) {
    // SAFETY: PM1 control and the SMI command port, as the FADT names them.
    unsafe {
        if inw(pm1a) & SCI_ENABLE == 0 {
            outb(command, value);
            for _ in 0..100_000 {
                if inw(pm1a) & SCI_ENABLE != 0 {
                    break;
                }
            }
        }
    }
}

/// Gives the chipset a moment before the next attempt.
fn settle() {
    for _ in 0..1_000_000 {
        core::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_addresses_are_mechanism_1() {
        assert_eq!(config_address(1, 3, 0x40), 0x8000_0b40);
        assert_eq!(config_address(31, 0, 0), 0x8000_f800);
    }

    #[test]
    fn the_power_management_base_is_masked() {
        assert_eq!(control_port(0xb001), Some(0xb004));
        assert_eq!(control_port(0x0000_0601), Some(0x604));
        assert_eq!(control_port(1), None);
        assert_eq!(control_port(u32::MAX), None);
    }
}
