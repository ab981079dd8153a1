//! What the loader says, and how it gives up.
//!
//! On the firmware's consoles and on COM1, once on each: where the firmware
//! has its console on COM1 it has said it there.

use alloc::string::String;
use core::fmt::{self, Write};
use core::time::Duration;
use uart_16550::spec::registers::LSR;
use uart_16550::{Config, Uart16550};
use uefi::boot::{self, OpenProtocolAttributes, OpenProtocolParams, SearchType};
use uefi::proto::console::text::Output;
use uefi::proto::device_path::{DevicePath, DevicePathNodeEnum};
use uefi::runtime::{self, ResetType};
use uefi::{Guid, Handle, Identify, Status, guid};

/// I/O base of COM1.
const COM1: u16 = 0x3f8;
/// The EISA identifier of a 16550 (PNP0501); COM1 has the unique identifier 0.
const PNP0501: u32 = 0x0501_41d0;
/// Marks the consoles that the firmware writes to (edk2, MdeModulePkg/Include/Guid/ConsoleOutDevice.h).
const CONSOLE_OUT_DEVICE: Guid = guid!("d3b36f2c-d551-11d4-9a46-0090273fc14d");
/// Polls until a transmitter is taken for dead.
const PATIENCE: u32 = 1_000_000;
/// For someone who reads the sentence on a screen.
const READING_TIME: Duration = Duration::from_secs(30);
/// For a serial line to drain.
const DRAIN_TIME: Duration = Duration::from_millis(200);

/// Says one line that begins with `vireo: `.
pub fn say(text: fmt::Arguments<'_>) {
    let mut line = String::new();
    if writeln!(line, "vireo: {text}").is_err() {
        return;
    }
    let has_output = uefi::table::system_table_raw().is_some_and(|table| {
        // SAFETY: the firmware's system table lives as long as the loader.
        unsafe { !table.as_ref().stdout.is_null() }
    });
    if has_output {
        // A console that cannot show a character shows the rest.
        let _ = uefi::system::with_stdout(|output| output.write_str(&line));
    }
    if !firmware_speaks_on_com1() {
        line.insert(line.len() - 1, '\r');
        send(line.as_bytes());
    }
}

/// Says what is wrong, and turns the machine off.
pub fn fail(reason: fmt::Arguments<'_>) -> ! {
    say(format_args!("error: {reason}"));
    boot::stall(if someone_reads_a_screen() {
        READING_TIME
    } else {
        DRAIN_TIME
    });
    runtime::reset(ResetType::SHUTDOWN, Status::SUCCESS, None)
}

/// Whether one of the firmware's consoles is a terminal on COM1.
fn firmware_speaks_on_com1() -> bool {
    consoles().into_iter().any(on_com1)
}

/// Whether the firmware has a console that is no serial line, on a machine
/// that is no virtual one: there the sentence would vanish with the power.
fn someone_reads_a_screen() -> bool {
    let hypervisor = core::arch::x86_64::__cpuid(1).ecx >> 31 & 1 == 1;
    !hypervisor && consoles().into_iter().any(|console| !on_com1(console))
}

/// The devices that the firmware's console writes to.
fn consoles() -> alloc::vec::Vec<Handle> {
    let Ok(outputs) = boot::locate_handle_buffer(SearchType::ByProtocol(&Output::GUID)) else {
        return alloc::vec::Vec::new();
    };
    outputs
        .iter()
        .copied()
        .filter(|output| {
            boot::protocols_per_handle(*output)
                .is_ok_and(|protocols| protocols.iter().any(|guid| **guid == CONSOLE_OUT_DEVICE))
        })
        .collect()
}

fn on_com1(device: Handle) -> bool {
    let params = OpenProtocolParams {
        handle: device,
        agent: boot::image_handle(),
        controller: None,
    };
    // SAFETY: only looked at, while nothing else runs that could remove it. Opening it
    // exclusively would disconnect the console.
    let path =
        unsafe { boot::open_protocol::<DevicePath>(params, OpenProtocolAttributes::GetProtocol) };
    path.is_ok_and(|path| {
        path.node_iter().any(|node| {
            matches!(node.as_enum(), Ok(DevicePathNodeEnum::AcpiAcpi(acpi)) if acpi.hid() == PNP0501 && acpi.uid() == 0)
        })
    })
}

/// Sends to COM1, where there is one, at 115200 baud, to the last bit.
fn send(mut bytes: &[u8]) {
    // SAFETY: the ports of COM1, on which no firmware console is.
    let Ok(mut uart) = (unsafe { Uart16550::new_port(COM1) }) else {
        return;
    };
    if !uart.check_present() || uart.init(Config::default()).is_err() {
        return;
    }
    while !bytes.is_empty() {
        let sent = (0..PATIENCE)
            .map(|_| uart.send_bytes(bytes))
            .find(|&sent| sent > 0);
        let Some(rest) = sent.and_then(|sent| bytes.get(sent..)) else {
            return;
        };
        bytes = rest;
    }
    // The next initialization would empty its FIFO.
    (0..PATIENCE).any(|_| uart.lsr().contains(LSR::TRANSMITTER_EMPTY));
}
