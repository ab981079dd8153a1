//! Accesses to the registers: by MMIO in xAPIC mode (SDM 3, 12.4.1), where what
//! does not exist is an error in the ESR, and by MSR in x2APIC mode (12.12.1),
//! where it faults.

use super::address;
use super::icr::{self, Command};
use super::lvt::{self, Entry};
use super::page::{Vectors, register};
use super::timer::TimerMode;
use super::{Action, Fault, LocalApic, Mode};
use crate::devices::{DeliveryMode, Destination, Ticks, Trigger, Width};

/// An integrated APIC whose highest entry of the local vector table is number 5.
const VERSION: u32 = 0x15 | (lvt::ENTRIES.len() as u32 - 1) << 16;
const VERSION_SUPPRESS_BROADCAST: u32 = 1 << 24;

/// The APIC is enabled by software.
pub const SVR_ENABLED: u32 = 1 << 8;
/// EOIs stay here.
pub const SVR_SUPPRESS_BROADCAST: u32 = 1 << 12;

/// Models of logical destinations, in the upper four bits of the DFR.
pub const DFR_FLAT: u32 = 0xf;
/// See [`DFR_FLAT`].
pub const DFR_CLUSTER: u32 = 0;
const DFR_ONES: u32 = 0x0fff_ffff;

/// Bits of ESR (SDM 3, figure 12-9).
pub const SENT_ILLEGAL_VECTOR: u32 = 1 << 5;
/// See [`SENT_ILLEGAL_VECTOR`].
pub const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
const ILLEGAL_REGISTER: u32 = 1 << 7;

/// The bits of the divide configuration.
const DIVIDE: u32 = 0b1011;

/// Vectors below are illegal.
pub const LEAST_VECTOR: u8 = 16;

/// MSR of the x2APIC register at offset 0.
const X2APIC_MSR: u32 = 0x800;
/// Bytes of the page in which registers are defined.
const REGISTERS_END: u16 = 0x400;

impl LocalApic {
    /// The registers after power-on, in the mode (SDM 3, 12.4.7.1 and 12.12.5.1).
    pub(super) fn reset(&mut self) {
        self.reset_but_id(self.id << 24);
    }

    /// INIT leaves the identifier alone (SDM 3, 12.4.7.3).
    pub(super) fn init(&mut self) {
        self.reset_but_id(self.page.get(register::ID));
    }

    fn reset_but_id(&mut self, xapic_id: u32) {
        self.page.clear();
        self.requested = Vectors::default();
        self.in_service = Vectors::default();
        self.service_class = 0;
        self.new_trigger = true;
        self.timer.reset();
        self.errors = 0;
        let suppress = if self.config.eoi_broadcast_suppression {
            VERSION_SUPPRESS_BROADCAST
        } else {
            0
        };
        self.page.set(register::VERSION, VERSION | suppress);
        self.page.set(register::DFR, u32::MAX);
        self.page.set(register::SVR, 0xff);
        for offset in lvt::ENTRIES {
            self.page.set(offset, Entry::MASKED);
        }
        if self.mode == Mode::X2Apic {
            self.enter_x2apic();
        } else {
            self.page.set(register::ID, xapic_id);
        }
    }

    /// What is different in x2APIC mode; all else stays (SDM 3, 12.12.5.1).
    pub(super) fn enter_x2apic(&mut self) {
        self.page.set(register::ID, self.id);
        self.page
            .set(register::LDR, address::x2apic_logical(self.id));
        self.page.set(register::DFR, 0);
        self.page.set(register::ICR_HIGH, 0);
    }

    /// Reads `width` bytes at `offset` in the page. Registers are 32 bits wide
    /// at multiples of 16; what lies between them reads as 0, and so does, with
    /// an error in the ESR, a register that does not exist.
    pub fn mmio_read(&mut self, now: Ticks, offset: u64, width: Width) -> u64 {
        if self.mode != Mode::XApic {
            return width.mask();
        }
        let offset = (offset & 0xfff) as u16;
        if offset & 0xf >= 4 || offset >= REGISTERS_END {
            return 0;
        }
        let value = match self.read(now, offset & !0xf) {
            Some(value) => value,
            // Write-only.
            None if offset & !0xf == register::EOI => 0,
            None => {
                self.record_error(ILLEGAL_REGISTER);
                0
            }
        };
        u64::from(value) >> (8 * (offset & 3)) & width.mask()
    }

    /// Writes the register at `offset` in the page. Only aligned writes of 32
    /// bits reach one; a register that does not exist is an error in the ESR.
    pub fn mmio_write(
        &mut self,
        now: Ticks,
        offset: u64,
        width: Width,
        value: u64,
    ) -> Option<Action> {
        let offset = (offset & 0xfff) as u16;
        if self.mode != Mode::XApic
            || width != Width::Dword
            || offset & 0xf != 0
            || offset >= REGISTERS_END
        {
            return None;
        }
        let value = value as u32;
        match offset {
            register::EOI => {
                self.follow_cpu();
                return self.eoi().map(Action::BroadcastEoi);
            }
            register::ICR => {
                let low = value & icr::WRITABLE;
                self.page.set(register::ICR, low);
                let destination = self.page.get(register::ICR_HIGH) >> 24;
                return self.send(low, destination, 0xff);
            }
            register::ICR_HIGH | register::LDR => self.page.set(offset, value & 0xff << 24),
            register::ID if !self.config.x2apic => self.page.set(offset, value & 0xff << 24),
            register::DFR => self.page.set(offset, value | DFR_ONES),
            _ if self.write(now, offset, value) => {}
            // Read-only.
            _ if self.read(now, offset).is_some() => {}
            _ => self.record_error(ILLEGAL_REGISTER),
        }
        None
    }

    /// The CPU has put a register, at `offset`, into the page, as the guest wrote it there in
    /// xAPIC mode, or by SELF_IPI in x2APIC mode: does what else the write does.
    pub fn written(&mut self, now: Ticks, offset: u16) -> Option<Action> {
        let value = self.page.get(offset);
        match offset {
            register::SELF_IPI => {
                self.send_to_itself(value as u8);
                None
            }
            register::ID if self.config.x2apic => {
                self.page.set(register::ID, self.id << 24);
                None
            }
            _ => self.mmio_write(now, offset.into(), Width::Dword, value.into()),
        }
    }

    /// Learns what the CPU has done to the page.
    fn follow_cpu(&mut self) {
        if self.by_cpu {
            self.refresh();
        }
    }

    /// RDMSR of 0x800 to 0x8ff.
    ///
    /// # Errors
    /// Outside x2APIC mode, and for what is not there or write-only.
    #[inline]
    pub fn msr_read(&mut self, now: Ticks, msr: u32) -> Result<u64, Fault> {
        match self.x2apic_offset(msr)? {
            register::ICR => {
                let high = self.page.get(register::ICR + 4);
                Ok(u64::from(high) << 32 | u64::from(self.page.get(register::ICR)))
            }
            register::APR | register::REMOTE_READ | register::DFR | register::ICR_HIGH => {
                Err(Fault)
            }
            offset => self.read(now, offset).map(u64::from).ok_or(Fault),
        }
    }

    /// WRMSR of 0x800 to 0x8ff.
    ///
    /// # Errors
    /// Outside x2APIC mode, for what is not there or read-only, and when a
    /// reserved bit is set.
    #[inline]
    pub fn msr_write(&mut self, now: Ticks, msr: u32, value: u64) -> Result<Option<Action>, Fault> {
        let offset = self.x2apic_offset(msr)?;
        let low = value as u32;
        // What a busy guest writes comes first.
        match offset {
            register::EOI if value == 0 => return Ok(self.eoi().map(Action::BroadcastEoi)),
            register::ICR if value & icr::X2APIC_RESERVED == 0 => {
                let (low, high) = (low & icr::WRITABLE, (value >> 32) as u32);
                self.page.set(register::ICR, low);
                self.page.set(register::ICR + 4, high);
                return Ok(self.send(low, high, u32::MAX));
            }
            register::SELF_IPI if value <= 0xff => self.send_to_itself(low as u8),
            _ => self.x2apic_write(now, offset, value)?,
        }
        Ok(None)
    }

    /// What [`LocalApic::msr_write`] does with a command of the commonest kind, a fixed
    /// interrupt for this APIC alone; false, and nothing done, where it is another.
    #[inline]
    pub fn x2apic_self_ipi(&mut self, command: u64) -> bool {
        let (low, high) = (command as u32 & icr::WRITABLE, (command >> 32) as u32);
        let known = self.is_x2apic()
            && command & icr::X2APIC_RESERVED == 0
            && (icr::is_fixed_to_itself(low) || icr::is_fixed_to(low) && high == self.id);
        if known {
            self.page.set(register::ICR, low);
            self.page.set(register::ICR + 4, high);
            self.send_to_itself(low as u8);
        }
        known
    }

    /// The same in xAPIC mode, for a write of 32 bits to the ICR: `low` with the
    /// shorthand, or with the identifier that its upper half has been given.
    #[inline]
    pub fn xapic_self_ipi(&mut self, low: u32) -> bool {
        let low = low & icr::WRITABLE;
        let destination = self.page.get(register::ICR_HIGH) >> 24;
        let known = icr::is_fixed_to_itself(low)
            || icr::is_fixed_to(low) && self.unique_xapic_id() == Some(destination);
        if known {
            self.page.set(register::ICR, low);
            self.send_to_itself(low as u8);
        }
        known
    }

    /// Writes a register in x2APIC mode that is not a command.
    #[inline(never)]
    fn x2apic_write(&mut self, now: Ticks, offset: u16, value: u64) -> Result<(), Fault> {
        let defined = self.x2apic_defined(offset).ok_or(Fault)?;
        if value & !u64::from(defined) != 0 {
            return Err(Fault);
        }
        self.write(now, offset, value as u32);
        Ok(())
    }

    fn x2apic_offset(&self, msr: u32) -> Result<u16, Fault> {
        let index = msr.wrapping_sub(X2APIC_MSR);
        if self.mode == Mode::X2Apic && index < u32::from(REGISTERS_END >> 4) {
            Ok((index as u16) << 4)
        } else {
            Err(Fault)
        }
    }

    /// The bits that may be set in a write to a register in x2APIC mode; `None`
    /// when it cannot be written.
    fn x2apic_defined(&self, offset: u16) -> Option<u32> {
        Some(match offset {
            register::TPR => 0xff,
            register::SVR => self.svr_defined(),
            register::ESR => 0,
            register::LVT_TIMER..=register::LVT_ERROR => Entry::defined(offset),
            register::INITIAL_COUNT => u32::MAX,
            register::DIVIDE => DIVIDE,
            _ => return None,
        })
    }

    const fn svr_defined(&self) -> u32 {
        let suppress = if self.config.eoi_broadcast_suppression {
            SVR_SUPPRESS_BROADCAST
        } else {
            0
        };
        0xff | SVR_ENABLED | suppress
    }

    /// The 32 bits of a register; `None` when it is write-only or does not exist
    /// in either mode.
    fn read(&mut self, now: Ticks, offset: u16) -> Option<u32> {
        match offset {
            register::CURRENT_COUNT => {
                self.advance(now);
                Some(self.timer.current_count(now))
            }
            register::APR => {
                self.follow_cpu();
                Some(self.arbitration_priority().into())
            }
            register::PPR => {
                self.follow_cpu();
                Some(self.processor_priority())
            }
            register::ID
            | register::VERSION
            | register::TPR
            | register::REMOTE_READ
            | register::LDR
            | register::DFR
            | register::SVR
            | register::ISR..=register::ESR
            | register::ICR..=register::INITIAL_COUNT
            | register::DIVIDE => Some(self.page.get(offset)),
            _ => None,
        }
    }

    /// Writes a register that works alike in both modes; false when it is none of these.
    fn write(&mut self, now: Ticks, offset: u16, value: u32) -> bool {
        match offset {
            register::TPR => self.page.set(register::TPR, value & 0xff),
            register::ESR => {
                self.page.set(register::ESR, self.errors);
                self.errors = 0;
            }
            // What has expired under the old setting is not undone, nor
            // delivered because of the new one.
            register::SVR => {
                self.advance(now);
                self.page.set(register::SVR, value & self.svr_defined());
                if value & SVR_ENABLED == 0 {
                    self.mask_entries();
                }
            }
            register::LVT_TIMER => {
                self.advance(now);
                self.set_entry(offset, value);
                let mode = self.entry(offset).timer_mode();
                self.timer.set_mode(now, TimerMode::from_bits(mode));
                self.show_initial_count();
            }
            register::LVT_THERMAL..=register::LVT_ERROR => self.set_entry(offset, value),
            register::INITIAL_COUNT => {
                self.advance(now);
                self.timer.set_initial_count(now, value);
                self.show_initial_count();
            }
            register::DIVIDE => {
                self.advance(now);
                self.page.set(register::DIVIDE, value & DIVIDE);
                self.timer.set_divide(now, value);
            }
            _ => return false,
        }
        true
    }

    fn show_initial_count(&mut self) {
        let count = self.timer.initial_count();
        self.page.set(register::INITIAL_COUNT, count);
    }

    /// Does what a write of `low` to the ICR asks, with this destination field.
    /// A fixed interrupt for this APIC alone is accepted here.
    #[inline]
    fn send(&mut self, low: u32, destination: u32, broadcast: u32) -> Option<Action> {
        if icr::is_fixed_to_itself(low) {
            self.send_to_itself(low as u8);
            return None;
        }
        self.send_decoded(Command::decode(low, destination, broadcast))
    }

    #[inline(never)]
    fn send_decoded(&mut self, command: Command) -> Option<Action> {
        let own = match self.mode {
            Mode::X2Apic => Some(self.id),
            _ => self.unique_xapic_id(),
        };
        match command {
            Command::Send(message)
                if message.mode == DeliveryMode::Fixed
                    && own.map(Destination::Physical) == Some(message.destination) =>
            {
                self.accept(message);
            }
            Command::Send(message) => return Some(Action::Send(message)),
            Command::IllegalVector => self.record_error(SENT_ILLEGAL_VECTOR),
            Command::Invalid => {}
        }
        None
    }

    /// A fixed interrupt that the APIC sends to itself alone.
    #[inline]
    pub fn send_to_itself(&mut self, vector: u8) {
        if vector < LEAST_VECTOR {
            self.record_error(SENT_ILLEGAL_VECTOR);
        } else if self.is_enabled() {
            self.request(vector, Trigger::Edge);
        }
    }
}
