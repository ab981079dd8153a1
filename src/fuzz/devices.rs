//! A whole PC, of which everything is touched in any order.

use super::{Random, repeat};
use crate::addr::{Gpa, Hpa};
use crate::devices::chipset::{Chipset, ChipsetConfig};
use crate::devices::fw_cfg::{PIECE, Progress};
use crate::devices::local_apic::{Action, LocalApic};
use crate::devices::{Clock, Message, Request, Ticks, Width, ioapic, pc};
use crate::vm::fw_cfg;
use crate::vm::memory::GuestMemory;
use crate::vm::memory_map::MemoryMap;
use crate::vm::screen;

const RAM: usize = 2 << 20;
/// Bytes before and behind the guest's memory that nobody may touch.
const GUARD: usize = 4096;
const UNTOUCHED: u8 = 0xa5;
/// Steps of a round.
const STEPS: u32 = 400;
const APICS: u32 = 2;
const WIDTHS: [Width; 4] = [Width::Byte, Width::Word, Width::Dword, Width::Qword];

struct Pc<'a> {
    chipset: Chipset,
    apics: [LocalApic; APICS as usize],
    memory: &'a GuestMemory,
    now: Ticks,
}

impl<'a> Pc<'a> {
    fn new(random: &mut Random, map: &MemoryMap, memory: &'a GuestMemory) -> Self {
        let clock = Clock::new(random.pick(&[1_000_000, 50_000_000, 999_999_937, 5_000_000_000]));
        let now = Ticks(random.pick(&[0, 1, 1 << 40, u64::MAX >> 1]));
        let config = ChipsetConfig {
            wall_clock: random.magnitude(),
            ram_below_4g: RAM as u64,
            ram_above_4g: random.magnitude(),
            io_apic_id: random.next() as u8 & 0xf,
            test_device: random.once_in(2),
            firmware: random.once_in(2),
            as_by_bios: random.once_in(2),
            fw_cfg: fw_cfg::describe(map, APICS, None),
        };
        let by_cpu = random.once_in(3);
        Self {
            chipset: Chipset::new(clock, now, &config),
            apics: [0, 1].map(|id| LocalApic::new(id, id == 0, clock).delivered_by_cpu(by_cpu)),
            memory,
            now,
        }
    }

    fn step(&mut self, random: &mut Random) {
        let width = random.pick(&WIDTHS);
        let value = random.number();
        match random.below(24) {
            0..=4 => {
                let width = random.pick(&WIDTHS[..3]);
                let read = self.chipset.port_read(self.now, port(random), width);
                assert!(u64::from(read) <= width.mask());
            }
            5..=11 => {
                let width = random.pick(&WIDTHS[..3]);
                let request = self
                    .chipset
                    .port_write(self.now, port(random), width, value as u32);
                self.obey(request);
            }
            12 => {
                let offset = random.below(0x1000);
                let read = self.chipset.io_apic_read(offset, width);
                assert!(read <= width.mask());
            }
            13 => {
                let index = random.below(0x40);
                self.chipset.io_apic_write(0, Width::Dword, index);
                self.chipset.io_apic_write(0x10, width, value);
            }
            14 => {
                let offset = random.below(0x1000);
                self.chipset.io_apic_write(offset, width, value);
            }
            15 => {
                let gpa = Gpa(pc::TEST_MEMORY - 8 + random.below(pc::TEST_MEMORY_LENGTH + 16));
                let read = self.chipset.memory_read(gpa, width);
                assert!(read <= width.mask());
                self.chipset.memory_write(gpa, width, value);
            }
            16 => {
                if self.chipset.intr() {
                    self.chipset.acknowledge_pic();
                }
            }
            17 => {
                self.chipset.serial_input(self.now, value as u8);
                let count = random.below(40) as usize;
                self.chipset
                    .serial_output(|output| output.take(count).count());
            }
            18 => match random.below(4) {
                0 => self.chipset.press_power_button(),
                1 => drop(self.chipset.take_wake()),
                _ => self.chipset.eoi(value as u8),
            },
            19..=21 => self.local_apic(random, width, value),
            22 => self.wait(random),
            _ => self.look(random),
        }
    }

    /// What the operator looks at, or time passes.
    fn look(&mut self, random: &mut Random) {
        if !random.once_in(32) {
            return self.wait(random);
        }
        if let Some(mode) = self.chipset.text_mode() {
            let cells = [random.next() as u8; 1024];
            assert!(screen::text(mode, &cells).len() < 1 << 16);
        }
    }

    fn wait(&mut self, random: &mut Random) {
        let ticks = match random.below(4) {
            0 => random.below(100),
            1 => random.below(1_000_000),
            _ => random.magnitude() >> 8,
        };
        self.now.0 = self.now.0.saturating_add(ticks);
        self.chipset.advance(self.now);
        if self.now.0 < u64::MAX {
            let due = self.chipset.deadline();
            assert!(due.is_none_or(|due| due > self.now), "{due:?}");
        }
        for apic in &mut self.apics {
            apic.advance(self.now);
        }
        self.pass_messages();
    }

    /// No device sends without end.
    fn pass_messages(&mut self) {
        let mut sent = 0;
        while let Some(message) = self.chipset.take_message() {
            self.send(None, message);
            sent += 1;
            assert!(sent <= u32::from(ioapic::PINS));
        }
    }

    fn send(&mut self, from: Option<u32>, message: Message) {
        for apic in &mut self.apics {
            if apic.is_destination(message.destination, from == Some(apic.id())) {
                apic.accept(message);
            }
        }
    }

    fn local_apic(&mut self, random: &mut Random, width: Width, value: u64) {
        let now = self.now;
        let index = random.below(APICS.into()) as usize;
        let apic = &mut self.apics[index];
        let register = random.below(0x42);
        let action = match random.below(12) {
            0 => {
                assert!(apic.mmio_read(now, register << 4, width) <= width.mask());
                None
            }
            1 | 2 => apic.mmio_write(now, register << 4, Width::Dword, value),
            3 => apic.mmio_write(now, random.below(0x1000), width, value),
            4 => {
                let _ = apic.msr_read(now, 0x800 + register as u32);
                None
            }
            5 | 6 => apic
                .msr_write(now, 0x800 + register as u32, value)
                .unwrap_or(None),
            7 => {
                let base = random.pick(&[0xfee0_0800, 0xfee0_0c00, 0xfee0_0000, value]);
                let _ = apic.set_base_msr(now, base);
                None
            }
            8 => {
                apic.set_tsc_deadline(now, value);
                apic.set_cr8(random.below(16) as u8);
                None
            }
            9 => {
                apic.set_lint0(random.once_in(2));
                apic.set_lint1(random.once_in(2));
                None
            }
            10 => {
                apic.take_requests();
                apic.acknowledge();
                None
            }
            _ => apic.eoi().map(Action::BroadcastEoi),
        };
        match action {
            Some(Action::Send(message)) => self.send(Some(index as u32), message),
            Some(Action::BroadcastEoi(vector)) => self.chipset.eoi(vector),
            None => {}
        }
        self.pass_messages();
    }

    fn obey(&mut self, request: Option<Request>) {
        let Some(Request::Transfer(at)) = request else {
            return;
        };
        // As long as a transfer may be, but not more of it here.
        let mut pieces = 0;
        while self.chipset.transfer(at, self.memory) == Progress::More {
            pieces += 1;
            assert!(pieces <= (1 << 32) / PIECE);
            if pieces > 4 {
                break;
            }
        }
    }
}

fn port(random: &mut Random) -> u16 {
    const KNOWN: [(u16, u16); 20] = [
        // The VGA's.
        (0x3b4, 2),
        (0x3c0, 32),
        (pc::PIC_MASTER, 2),
        (pc::PIC_SLAVE, 2),
        (pc::ELCR, 2),
        (pc::PIT, 4),
        (pc::KEYBOARD_DATA, 5),
        (pc::RTC, 2),
        (pc::RTC, 2),
        (pc::POST_CODE, 1),
        (pc::FAST_A20, 1),
        (pc::SMI_COMMAND, 2),
        (pc::PCI_ADDRESS, 8),
        (pc::COM1, 8),
        (pc::FW_CFG_SELECTOR, 12),
        (pc::TEST_ECHO, 5),
        (pc::TEST_LINES, 24),
        (pc::PM_BASE, 12),
        (pc::DEBUG_CONSOLE, 1),
        (pc::DEBUG_EXIT, 4),
    ];
    if random.once_in(16) {
        return random.next() as u16;
    }
    let (first, count) = random.pick(&KNOWN);
    first + random.below(count.into()) as u16
}

/// A request for a transfer, where the guest's programs of transfers look for it.
fn describe_transfer(random: &mut Random, memory: &GuestMemory) {
    let address = match random.below(4) {
        0 => random.number(),
        1 => RAM as u64 - random.below(64),
        _ => random.below(RAM as u64),
    };
    let control = (random.below(0x30) << 16 | random.below(32)) as u32;
    let mut request = control.to_be_bytes().to_vec();
    request.extend((random.magnitude() as u32).to_be_bytes());
    request.extend(address.to_be_bytes());
    let places = [0, 0x80, 0x8000_0000u32.swap_bytes().into(), 0x7f];
    let _ = memory.write(Gpa(random.pick(&places)), &request);
}

#[test]
fn nothing_makes_a_device_panic() {
    let mut ram = vec![UNTOUCHED; RAM + 2 * GUARD];
    let start = Hpa(ram.as_mut_ptr() as u64 + GUARD as u64);
    let map = MemoryMap::new(start, RAM as u64);
    let memory = GuestMemory::new(map.slots(), 0);
    repeat("devices", 1500, |random| {
        describe_transfer(random, &memory);
        let mut pc = Pc::new(random, &map, &memory);
        for _ in 0..STEPS {
            pc.step(random);
        }
    });
    let guards = ram[..GUARD].iter().chain(&ram[RAM + GUARD..]);
    assert!(guards.copied().all(|byte| byte == UNTOUCHED));
}
