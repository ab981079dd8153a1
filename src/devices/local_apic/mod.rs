//! The local APIC (SDM 3, chapter 12), in xAPIC and x2APIC mode.
//!
//! The registers live in an [`ApicPage`] at their architectural offsets, so that
//! the CPU can virtualize that very page. Interrupt delivery is three
//! steps: [`LocalApic::accept`] puts a vector into the IRR, [`LocalApic::pending`]
//! says whether the priority lets it through, [`LocalApic::acknowledge`] moves
//! it to the ISR, where it stays until [`LocalApic::eoi`].

mod page;
#[cfg(test)]
mod tests;
mod timer;

pub use page::{ApicPage, register};
pub use timer::APIC_TIMER_HZ;

use super::{Clock, DeliveryMode, Destination, Message, Ticks, Trigger, Width};
use alloc::boxed::Box;
use timer::{Timer, TimerMode};

/// The access faults: the guest gets #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// IA32_APIC_BASE bits 11:10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Disabled,
    XApic,
    X2Apic,
}

/// What a register write asks of whoever holds the APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The interrupt command register was written.
    Send(Message),
    /// A level-triggered interrupt was finished: tell the I/O APIC.
    BroadcastEoi(u8),
}

/// What a message does beyond setting a bit of the IRR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    None,
    Nmi,
    Init,
    StartUp(u8),
    ExtInt,
    Smi,
}

/// Six local vector table entries (4 and up are always there), version 0x14.
const VERSION: u32 = 0x14 | 5 << 16;
const SVR_ENABLED: u32 = 1 << 8;
const SVR_WRITABLE: u32 = 0x3ff;
const LVT_MASKED: u32 = 1 << 16;
const DFR_FLAT: u32 = 0xffff_ffff;
const ICR_LOGICAL: u32 = 1 << 11;
const ICR_ASSERT: u32 = 1 << 14;
const ICR_LEVEL: u32 = 1 << 15;
const ICR_DEFINED: u32 = 0x000c_cfff;

const BASE_BOOTSTRAP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLED: u64 = 1 << 11;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const DEFAULT_BASE: u64 = 0xfee0_0000;

const ERROR_SEND_ILLEGAL: u32 = 1 << 5;
const ERROR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ERROR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Writable bits of each local vector table entry, by its offset.
const fn lvt_writable(offset: u16) -> Option<u32> {
    match offset {
        register::LVT_TIMER => Some(0x0007_00ff),
        // Thermal sensor, performance counters.
        0x330 | 0x340 => Some(0x0001_07ff),
        register::LVT_LINT0 | register::LVT_LINT1 => Some(0x0001_a7ff),
        register::LVT_ERROR => Some(0x0001_00ff),
        _ => None,
    }
}

const LVTS: [u16; 6] = [
    register::LVT_TIMER,
    0x330,
    0x340,
    register::LVT_LINT0,
    register::LVT_LINT1,
    register::LVT_ERROR,
];

/// One local APIC.
pub struct LocalApic {
    page: Box<ApicPage>,
    id: u32,
    base: u64,
    mode: Mode,
    timer: Timer,
    /// Errors since the last write to the ESR.
    errors: u32,
}

impl LocalApic {
    /// At reset, in xAPIC mode, with the identifier that the hardware straps give.
    pub fn new(id: u32, bootstrap: bool, clock: Clock) -> Self {
        let mut apic = Self {
            page: Box::default(),
            id,
            base: DEFAULT_BASE | BASE_ENABLED | if bootstrap { BASE_BOOTSTRAP } else { 0 },
            mode: Mode::XApic,
            timer: Timer::new(clock),
            errors: 0,
        };
        apic.reset(clock);
        apic
    }

    /// The state after INIT (SDM 3, 12.4.7.3); the mode stays.
    fn reset(&mut self, clock: Clock) {
        *self.page = ApicPage::new();
        self.timer = Timer::new(clock);
        self.errors = 0;
        self.page.set(register::VERSION, VERSION);
        self.page.set(register::SVR, 0xff);
        self.page.set(register::DFR, DFR_FLAT);
        for entry in LVTS {
            self.page.set(entry, LVT_MASKED);
        }
        self.set_identity();
    }

    /// The registers that follow from the identifier and the mode.
    fn set_identity(&mut self) {
        if self.mode == Mode::X2Apic {
            self.page.set(register::ID, self.id);
            // SDM 3, 12.12.10.2.
            let ldr = (self.id >> 4) << 16 | 1 << (self.id & 15);
            self.page.set(register::LDR, ldr);
        } else {
            self.page.set(register::ID, self.id << 24);
        }
    }

    /// The page that the CPU may virtualize.
    pub fn page(&self) -> &ApicPage {
        &self.page
    }

    #[inline]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// IA32_APIC_BASE.
    pub fn base_msr(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE (SDM 3, 12.12.5).
    ///
    /// # Errors
    /// A transition that does not exist, or a reserved bit.
    pub fn set_base_msr(&mut self, now: Ticks, value: u64) -> Result<(), Fault> {
        if value & !(BASE_ADDRESS | BASE_ENABLED | BASE_X2APIC | BASE_BOOTSTRAP) != 0 {
            return Err(Fault);
        }
        let mode = match (value & BASE_ENABLED != 0, value & BASE_X2APIC != 0) {
            (false, false) => Mode::Disabled,
            (true, false) => Mode::XApic,
            (true, true) => Mode::X2Apic,
            (false, true) => return Err(Fault),
        };
        match (self.mode, mode) {
            (Mode::X2Apic, Mode::XApic) | (Mode::Disabled, Mode::X2Apic) => return Err(Fault),
            (_, Mode::Disabled) if self.mode != mode => {
                self.mode = mode;
                self.page.set(register::SVR, 0xff);
                self.timer.set_initial(now, 0);
                self.timer.set_tsc_deadline(0);
            }
            _ => self.mode = mode,
        }
        self.base = value & !BASE_BOOTSTRAP | self.base & BASE_BOOTSTRAP;
        self.set_identity();
        Ok(())
    }

    fn is_enabled(&self) -> bool {
        self.mode != Mode::Disabled && self.page.get(register::SVR) & SVR_ENABLED != 0
    }

    // ---- registers

    fn read(&mut self, now: Ticks, offset: u16) -> Option<u32> {
        match offset {
            register::PPR => Some(self.ppr()),
            register::TIMER_CURRENT => Some(self.timer.current(now)),
            register::ID
            | register::VERSION
            | register::TPR
            | 0x90
            | register::LDR
            | register::DFR
            | register::SVR
            | register::ISR..=0x280
            | 0x2f0..=register::TIMER_INITIAL
            | register::TIMER_DIVIDE
                if offset != 0x2f0 =>
            {
                Some(self.page.get(offset))
            }
            _ => None,
        }
    }

    /// Writes a register that both modes have and that needs no more than the value.
    fn write(&mut self, now: Ticks, offset: u16, value: u32) -> Result<Option<Action>, Fault> {
        match offset {
            register::TPR => self.page.set(register::TPR, value & 0xff),
            register::EOI => return Ok(self.eoi()),
            register::SVR => {
                self.page.set(register::SVR, value & SVR_WRITABLE);
                if value & SVR_ENABLED == 0 {
                    for entry in LVTS {
                        self.page.set(entry, self.page.get(entry) | LVT_MASKED);
                    }
                }
            }
            register::ESR => {
                self.page.set(register::ESR, self.errors);
                self.errors = 0;
            }
            register::TIMER_INITIAL => {
                self.page.set(register::TIMER_INITIAL, value);
                self.timer.set_initial(now, value);
            }
            register::TIMER_DIVIDE => {
                self.page.set(register::TIMER_DIVIDE, value & 0xb);
                self.timer.set_divide(now, value);
            }
            _ => {
                let writable = lvt_writable(offset).ok_or(Fault)?;
                let mut value = value & writable;
                if !self.is_enabled() {
                    value |= LVT_MASKED;
                }
                self.page.set(offset, value);
                if offset == register::LVT_TIMER {
                    self.timer.set_mode(TimerMode::from_lvt(value));
                }
            }
        }
        Ok(None)
    }

    /// Reads from the page at IA32_APIC_BASE, in xAPIC mode. Registers are 32
    /// bits wide at multiples of 16; elsewhere there is 0.
    pub fn mmio_read(&mut self, now: Ticks, offset: u64, width: Width) -> u64 {
        let offset = (offset & 0xfff) as u16;
        if offset & 0xf > 3 {
            return 0;
        }
        match self.read(now, offset & !0xf) {
            Some(value) => (u64::from(value) >> ((offset & 3) * 8)) & width.mask(),
            None => {
                // EOI and self-IPI are write-only, the rest does not exist.
                self.error(ERROR_ILLEGAL_REGISTER);
                0
            }
        }
    }

    /// Writes to the page at IA32_APIC_BASE, in xAPIC mode.
    pub fn mmio_write(
        &mut self,
        now: Ticks,
        offset: u64,
        width: Width,
        value: u64,
    ) -> Option<Action> {
        let offset = (offset & 0xfff) as u16;
        if offset & 0xf != 0 || width < Width::Dword {
            return None;
        }
        let value = value as u32;
        match offset {
            register::ID => self.page.set(offset, value & 0xff00_0000),
            register::LDR => self.page.set(offset, value & 0xff00_0000),
            register::DFR => self.page.set(offset, value | 0x0fff_ffff),
            register::ICR_HIGH => self.page.set(offset, value & 0xff00_0000),
            register::ICR => {
                let value = value & ICR_DEFINED;
                self.page.set(offset, value);
                let destination = self.page.get(register::ICR_HIGH) >> 24;
                return self.command(value, destination, destination == 0xff);
            }
            _ => {
                return self.write(now, offset, value).unwrap_or_else(|Fault| {
                    self.error(ERROR_ILLEGAL_REGISTER);
                    None
                });
            }
        }
        None
    }

    /// RDMSR of 0x800 to 0x8ff.
    ///
    /// # Errors
    /// Outside x2APIC mode, and for registers that cannot be read.
    pub fn msr_read(&mut self, now: Ticks, msr: u32) -> Result<u64, Fault> {
        let offset = self.msr_offset(msr)?;
        match offset {
            register::ICR => Ok(u64::from(self.page.get(register::ICR_HIGH)) << 32
                | u64::from(self.page.get(register::ICR))),
            register::DFR | register::ICR_HIGH | 0x90 => Err(Fault),
            _ => self.read(now, offset).map(u64::from).ok_or(Fault),
        }
    }

    /// WRMSR of 0x800 to 0x8ff.
    ///
    /// # Errors
    /// Outside x2APIC mode, for registers that cannot be written, and for reserved bits.
    pub fn msr_write(&mut self, now: Ticks, msr: u32, value: u64) -> Result<Option<Action>, Fault> {
        let offset = self.msr_offset(msr)?;
        let low = value as u32;
        if offset == register::ICR {
            if low & !ICR_DEFINED != 0 {
                return Err(Fault);
            }
            let destination = (value >> 32) as u32;
            self.page.set(register::ICR, low);
            self.page.set(register::ICR_HIGH, destination);
            return Ok(self.command(low, destination, destination == u32::MAX));
        }
        let allowed = match offset {
            register::TPR => 0xff,
            register::EOI | register::ESR => 0,
            register::SVR => SVR_WRITABLE,
            register::SELF_IPI => 0xff,
            register::TIMER_INITIAL => u32::MAX,
            register::TIMER_DIVIDE => 0xb,
            _ => lvt_writable(offset).ok_or(Fault)?,
        };
        if value & !u64::from(allowed) != 0 {
            return Err(Fault);
        }
        if offset == register::SELF_IPI {
            self.receive(low as u8, Trigger::Edge);
            return Ok(None);
        }
        self.write(now, offset, low)
    }

    fn msr_offset(&self, msr: u32) -> Result<u16, Fault> {
        match msr.checked_sub(0x800) {
            Some(register @ 0..=0xff) if self.mode == Mode::X2Apic => Ok((register << 4) as u16),
            _ => Err(Fault),
        }
    }

    /// A write to the interrupt command register (SDM 3, 12.6.1). A fixed
    /// interrupt to itself is accepted here.
    fn command(&mut self, command: u32, destination: u32, broadcast: bool) -> Option<Action> {
        let vector = command as u8;
        // The reserved delivery mode sends nothing.
        let mode = DeliveryMode::from_bits(command >> 8)?;
        let destination = match command >> 18 & 3 {
            0 if broadcast => Destination::All,
            0 if command & ICR_LOGICAL != 0 => Destination::Logical(destination),
            0 => Destination::Physical(destination),
            1 => Destination::Itself,
            2 => Destination::All,
            _ => Destination::Others,
        };
        if mode == DeliveryMode::Fixed && vector < 16 {
            self.error(ERROR_SEND_ILLEGAL);
            return None;
        }
        if mode == DeliveryMode::Fixed && destination == Destination::Itself {
            self.receive(vector, Trigger::Edge);
            return None;
        }
        Some(Action::Send(Message {
            mode,
            destination,
            vector,
            // Only INIT knows a level (de-assert).
            trigger: Trigger::Edge,
            assert: mode != DeliveryMode::Init || command & (ICR_ASSERT | ICR_LEVEL) != ICR_LEVEL,
        }))
    }

    // ---- delivery

    /// Whether a message for `destination` is for this APIC.
    pub fn is_destination(&self, destination: Destination, sender_is_self: bool) -> bool {
        match destination {
            Destination::Itself => sender_is_self,
            Destination::All => true,
            Destination::Others => !sender_is_self,
            Destination::Physical(id) if self.mode == Mode::X2Apic => id == self.id,
            Destination::Physical(id) => id == self.page.get(register::ID) >> 24,
            Destination::Logical(mda) => self.is_logical_destination(mda),
        }
    }

    /// SDM 3, 12.6.2.2 (flat, cluster) and 12.12.10.2 (x2APIC).
    fn is_logical_destination(&self, mda: u32) -> bool {
        let ldr = self.page.get(register::LDR);
        if self.mode == Mode::X2Apic {
            return mda >> 16 == ldr >> 16 && mda & ldr & 0xffff != 0;
        }
        let own = ldr >> 24;
        if self.page.get(register::DFR) >> 28 == 0xf {
            own & mda & 0xff != 0
        } else {
            let cluster = mda >> 4 & 15;
            (cluster == 15 || cluster == own >> 4) && own & mda & 15 != 0
        }
    }

    /// Takes a message that is for this APIC.
    #[inline]
    pub fn accept(&mut self, message: Message) -> Event {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.receive(message.vector, message.trigger);
                Event::None
            }
            DeliveryMode::Nmi => Event::Nmi,
            DeliveryMode::Smi => Event::Smi,
            DeliveryMode::ExtInt => Event::ExtInt,
            DeliveryMode::Init if message.assert => Event::Init,
            DeliveryMode::Init => Event::None,
            DeliveryMode::StartUp => Event::StartUp(message.vector),
        }
    }

    #[inline]
    fn receive(&mut self, vector: u8, trigger: Trigger) {
        if !self.is_enabled() {
            return;
        }
        if vector < 16 {
            self.error(ERROR_RECEIVE_ILLEGAL);
            return;
        }
        self.page
            .set_vector(register::TMR, vector, trigger == Trigger::Level);
        self.page.set_vector(register::IRR, vector, true);
    }

    fn error(&mut self, bit: u32) {
        if self.errors & bit != 0 {
            return;
        }
        self.errors |= bit;
        let entry = self.page.get(register::LVT_ERROR);
        // An error interrupt with an illegal vector would be an error again.
        if entry & LVT_MASKED == 0 && entry as u8 >= 16 {
            self.receive(entry as u8, Trigger::Edge);
        }
    }

    /// Whether the 8259s' INTR reaches the CPU through this APIC: LINT0 is
    /// programmed as ExtINT, or the APIC is off and out of the way.
    pub fn lint0_takes_extint(&self) -> bool {
        if self.mode == Mode::Disabled {
            return true;
        }
        let entry = self.page.get(register::LVT_LINT0);
        entry & LVT_MASKED == 0 && DeliveryMode::from_bits(entry >> 8) == Some(DeliveryMode::ExtInt)
    }

    /// The processor priority (SDM 3, 12.8.3.1).
    #[inline]
    fn ppr(&self) -> u32 {
        let tpr = self.page.get(register::TPR);
        let service = u32::from(self.page.highest(register::ISR).unwrap_or(0)) & 0xf0;
        if tpr & 0xf0 >= service { tpr } else { service }
    }

    /// The highest vector that waits and whose priority class is above the processor's.
    #[inline]
    pub fn pending(&self) -> Option<u8> {
        let vector = self.page.highest(register::IRR)?;
        (u32::from(vector) & 0xf0 > self.ppr() & 0xf0 && self.is_enabled()).then_some(vector)
    }

    /// Takes the vector that [`LocalApic::pending`] names into service.
    #[inline]
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.page.set_vector(register::IRR, vector, false);
        self.page.set_vector(register::ISR, vector, true);
        Some(vector)
    }

    /// Ends the interrupt in service with the highest priority.
    #[inline]
    pub fn eoi(&mut self) -> Option<Action> {
        let vector = self.page.highest(register::ISR)?;
        self.page.set_vector(register::ISR, vector, false);
        self.page
            .has_vector(register::TMR, vector)
            .then_some(Action::BroadcastEoi(vector))
    }

    /// CR8: the upper half of the TPR.
    pub fn cr8(&self) -> u8 {
        (self.page.get(register::TPR) >> 4 & 15) as u8
    }

    pub fn set_cr8(&mut self, value: u8) {
        self.page.set(register::TPR, (u32::from(value) & 15) << 4);
    }

    // ---- timer

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self, now: Ticks) -> u64 {
        self.timer.tsc_deadline(now)
    }

    /// Writes IA32_TSC_DEADLINE; a moment that has passed expires at the next
    /// [`LocalApic::advance`].
    pub fn set_tsc_deadline(&mut self, _now: Ticks, deadline: u64) {
        self.timer.set_tsc_deadline(deadline);
    }

    /// Delivers the timer's interrupt when it is due.
    #[inline]
    pub fn advance(&mut self, now: Ticks) {
        if !self.timer.expire(now) {
            return;
        }
        let entry = self.page.get(register::LVT_TIMER);
        if entry & LVT_MASKED == 0 {
            self.receive(entry as u8, Trigger::Edge);
        }
    }

    /// When [`LocalApic::advance`] is needed next.
    #[inline]
    pub fn deadline(&self) -> Option<Ticks> {
        self.timer.deadline()
    }
}
