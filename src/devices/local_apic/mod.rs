//! The local APIC (SDM 3, chapter 12), in xAPIC and x2APIC mode.
//!
//! Its registers lie in an [`ApicPage`] at their architectural offsets, since VT-x
//! can virtualize that very page; what is not a register (mode, timer, levels of
//! the LINT pins) is beside it.
//!
//! An interrupt takes four steps. [`LocalApic::accept`], the timer and the LINT
//! pins put its vector into the IRR; [`LocalApic::pending`] says whether the
//! processor priority lets it through; [`LocalApic::acknowledge`] moves it to
//! the ISR; [`LocalApic::eoi`] ends it. Each is on the light path of a VM exit:
//! no allocation and no search.
//!
//! | module | what it is |
//! | --- | --- |
//! | `page` | the registers in their page |
//! | `registers` | accesses to them by MMIO and MSR, and what these may not do |
//! | `address` | whom a message is for |
//! | `base` | IA32_APIC_BASE: the modes and the ways between them |
//! | `icr` | the interrupt command register, decoded |
//! | `lvt` | entries of the local vector table, LINT pins, errors |
//! | `timer` | the timer in its three modes |

mod address;
mod base;
mod icr;
mod lvt;
mod page;
mod registers;
#[cfg(test)]
mod tests;
mod timer;

pub use address::Address;
pub use icr::Command;
pub use page::{ApicPage, register};
pub use registers::LEAST_VECTOR;
pub use timer::input_hz;
#[cfg(test)]
pub use timer::{APIC_TIMER_HZ, MIN_PERIOD};

use super::{Clock, DeliveryMode, Message, Ticks, Trigger};
use alloc::boxed::Box;
use page::Vectors;
use timer::Timer;

/// The access faults: the guest gets #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// What bits 11 and 10 of IA32_APIC_BASE say.
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

/// What an interrupt does beyond setting a bit of the IRR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    None,
    Nmi,
    /// The APIC has been reset; the rest of the CPU is to follow.
    Init,
    /// Start at this page, if waiting for it.
    StartUp(u8),
    /// The 8259s have the vector.
    ExtInt,
    Smi,
}

/// What differs from PC to PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bits of a guest physical address (CPUID 0x8000_0008), up to 52.
    pub physical_address_bits: u8,
    /// Whether software may keep EOIs from the I/O APIC (bit 24 of the version
    /// register, bit 12 of the SVR) and use the I/O APIC's EOI register. The
    /// broadcast costs nothing here and that register an exit, so not by default.
    pub eoi_broadcast_suppression: bool,
    /// Whether there is x2APIC mode. Where there is none, software may change the identifier, as
    /// on the CPUs before; where there is, it may not, as on those of today (SDM 3, 12.4.6).
    pub x2apic: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            physical_address_bits: 52,
            eoi_broadcast_suppression: false,
            x2apic: true,
        }
    }
}

/// One local APIC.
#[derive(Clone, Debug)]
pub struct LocalApic {
    page: Box<ApicPage>,
    id: u32,
    config: Config,
    mode: Mode,
    /// Address and bootstrap flag, as in IA32_APIC_BASE.
    base: u64,
    timer: Timer,
    requested: Vectors<{ register::IRR }>,
    in_service: Vectors<{ register::ISR }>,
    /// Class (bits 7..4) of the highest vector in service, 0 without one.
    service_class: u32,
    /// The CPU moves what is requested into service and out of it, while the guest runs.
    by_cpu: bool,
    /// A bit of the TMR has changed.
    new_trigger: bool,
    /// Errors since the last write to the ESR.
    errors: u32,
    /// Levels of the LINT pins.
    lint: [bool; 2],
}

impl LocalApic {
    /// The APIC at power-on, in xAPIC mode at 0xfee0_0000 (SDM 3, 12.4.7.1). `id`
    /// is its x2APIC identifier; its low 8 bits are the identifier in xAPIC mode.
    ///
    /// There is no firmware, so the bootstrap processor's is as every firmware
    /// leaves it and kernels without APIC support count on: in virtual wire mode
    /// (MP specification 1.4, 3.6.2.2). The others are disabled by software.
    pub fn new(id: u32, bootstrap: bool, clock: Clock) -> Self {
        let mut apic = Self {
            page: Box::new(ApicPage::new()),
            id,
            config: Config::default(),
            mode: Mode::XApic,
            base: base::at_power_on(bootstrap),
            timer: Timer::new(clock),
            requested: Vectors::default(),
            in_service: Vectors::default(),
            service_class: 0,
            by_cpu: false,
            new_trigger: false,
            errors: 0,
            lint: [false; 2],
        };
        apic.power_on();
        apic
    }

    /// The same with another configuration.
    pub fn with_config(mut self, config: Config) -> Self {
        self.config = config;
        self.power_on();
        self
    }

    /// The identifier in xAPIC mode, where no other APIC may have it, nor is it everybody's.
    #[inline]
    fn unique_xapic_id(&self) -> Option<u32> {
        let id = self.id & 0xff;
        (self.config.x2apic && id != 0xff).then_some(id)
    }

    fn power_on(&mut self) {
        self.reset();
        if self.is_bootstrap() {
            self.enter_virtual_wire_mode();
        }
    }

    /// The same, whose interrupts the CPU delivers (virtual-interrupt delivery, SDM 3, 30.2)
    /// or does not. Where it does, `requested` is only what it has not been told, and
    /// what is in service is known after [`LocalApic::refresh`].
    pub fn delivered_by_cpu(mut self, by_cpu: bool) -> Self {
        self.by_cpu = by_cpu;
        self
    }

    /// What was requested since the last call, by its highest vector: for the CPU, which
    /// is to know the highest of all.
    #[inline]
    pub fn take_requests(&mut self) -> Option<u8> {
        let vector = self.requested.highest(&self.page)?;
        self.requested.forget();
        Some(vector)
    }

    /// The guest interrupt status (SDM 3, 25.4.2) of what the page says: the highest
    /// requested vector, and the highest in service in the upper half. Right after
    /// [`LocalApic::refresh`].
    pub fn interrupt_status(&self) -> u16 {
        let highest = |base| {
            (0..=u8::MAX)
                .rev()
                .find(|&vector| self.page.has_vector(base, vector))
        };
        let requested = highest(register::IRR).unwrap_or(0);
        let in_service = highest(register::ISR).unwrap_or(0);
        u16::from_le_bytes([requested, in_service])
    }

    /// Whether [`LocalApic::take_level_vectors`] would say something new.
    #[inline]
    pub const fn has_new_trigger(&self) -> bool {
        self.new_trigger
    }

    /// The vectors that are level triggered: those whose end concerns the I/O APIC.
    pub fn take_level_vectors(&mut self) -> [u64; 4] {
        self.new_trigger = false;
        let word = |index: u16| u64::from(self.page.get(register::TMR + page::STRIDE * index));
        [0, 2, 4, 6].map(|index| word(index) | word(index + 1) << 32)
    }

    /// The class of the highest requested vector, if nothing but the TPR holds it back; else 0.
    #[inline]
    pub fn threshold(&self) -> u8 {
        let Some(vector) = self.requested.highest(&self.page) else {
            return 0;
        };
        let class = u32::from(vector) & 0xf0;
        let tpr_class = self.page.get(register::TPR) & 0xf0;
        if class > self.service_class && class <= tpr_class && self.is_enabled() {
            vector >> 4
        } else {
            0
        }
    }

    /// The page of registers. VT-x may be given its address; after the CPU has
    /// written there, [`LocalApic::refresh`] brings the rest up to date.
    pub fn page(&self) -> &ApicPage {
        &self.page
    }

    /// Recomputes what follows from registers that the CPU has written in the
    /// page by itself (TPR, IRR, ISR).
    pub fn refresh(&mut self) {
        self.requested = Vectors::load(&self.page);
        self.in_service = Vectors::load(&self.page);
        self.set_service_class();
    }

    /// Whether the registers are MSRs.
    #[inline]
    pub const fn is_x2apic(&self) -> bool {
        matches!(self.mode, Mode::X2Apic)
    }

    /// The mode.
    #[inline]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// The x2APIC identifier.
    #[inline]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Takes a message that is for this APIC. INIT resets the APIC, and keeps
    /// its mode and identifier (SDM 3, 12.4.7.3).
    #[inline]
    pub fn accept(&mut self, message: Message) -> Event {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if self.is_enabled() {
                    self.request(message.vector, message.trigger);
                }
                Event::None
            }
            DeliveryMode::Nmi => Event::Nmi,
            DeliveryMode::Smi => Event::Smi,
            DeliveryMode::ExtInt => Event::ExtInt,
            DeliveryMode::Init if message.assert => {
                self.init();
                Event::Init
            }
            // No processor since the Pentium 4 knows the de-assert (SDM 3, 12.6.1).
            DeliveryMode::Init => Event::None,
            DeliveryMode::StartUp => Event::StartUp(message.vector),
        }
    }

    /// Puts `vector` into the IRR.
    #[inline]
    fn request(&mut self, vector: u8, trigger: Trigger) {
        if vector < registers::LEAST_VECTOR {
            self.record_error(registers::RECEIVED_ILLEGAL_VECTOR);
            return;
        }
        let level = trigger == Trigger::Level;
        if level != self.page.has_vector(register::TMR, vector) {
            self.change_trigger(vector, level);
        }
        self.requested.insert(&mut self.page, vector);
    }

    #[inline(never)]
    fn change_trigger(&mut self, vector: u8, level: bool) {
        if level {
            self.page.set_vector(register::TMR, vector);
        } else {
            self.page.clear_vector(register::TMR, vector);
        }
        self.new_trigger = true;
    }

    /// The vector that the CPU would take now: the highest that is requested, if
    /// its class is above the processor priority's. None while software has the
    /// APIC disabled; what was requested before is kept.
    #[inline]
    pub fn pending(&self) -> Option<u8> {
        let vector = self.requested.highest(&self.page)?;
        let class = u32::from(vector) & 0xf0;
        let tpr_class = self.page.get(register::TPR) & 0xf0;
        (class > tpr_class.max(self.service_class) && self.is_enabled()).then_some(vector)
    }

    /// Takes the vector that [`LocalApic::pending`] names into service.
    #[inline]
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.take_into_service(vector);
        Some(vector)
    }

    /// The same, where it has just been asked for.
    #[inline]
    pub fn take_into_service(&mut self, vector: u8) {
        self.requested.remove(&mut self.page, vector);
        self.in_service.insert(&mut self.page, vector);
        self.service_class = u32::from(vector) & 0xf0;
    }

    /// Ends the interrupt in service that has the highest priority. The vector, if the
    /// I/O APIC is to be told: it was level triggered.
    #[inline]
    pub fn eoi(&mut self) -> Option<u8> {
        let vector = self.in_service.highest(&self.page)?;
        self.in_service.remove(&mut self.page, vector);
        self.set_service_class();
        self.end_level(vector).then_some(vector)
    }

    /// The rest of the end of an interrupt that is not in service any more; whether the I/O
    /// APIC is to be told.
    #[inline]
    pub fn end_level(&mut self, vector: u8) -> bool {
        self.page.has_vector(register::TMR, vector) && self.end_level_interrupt(vector)
    }

    /// Whether anything is requested, delivered soon or held back.
    #[inline]
    pub const fn has_requests(&self) -> bool {
        !self.requested.is_empty()
    }

    /// CR8: the class of the TPR.
    #[inline]
    pub const fn cr8(&self) -> u8 {
        (self.page.get(register::TPR) >> 4 & 0xf) as u8
    }

    /// Writes CR8, whose upper bits the CPU has checked: the TPR's subclass becomes 0.
    #[inline]
    pub fn set_cr8(&mut self, value: u8) {
        self.page.set(register::TPR, u32::from(value & 0xf) << 4);
    }

    #[inline]
    fn set_service_class(&mut self) {
        let vector = self.in_service.highest(&self.page).unwrap_or(0);
        self.service_class = u32::from(vector) & 0xf0;
    }

    /// The processor priority (SDM 3, 12.8.3.1; where that leaves a choice, as 30.1.3).
    fn processor_priority(&self) -> u32 {
        let tpr = self.page.get(register::TPR) & 0xff;
        if tpr & 0xf0 >= self.service_class {
            tpr
        } else {
            self.service_class
        }
    }

    /// The arbitration priority (SDM 3, 12.6.2.4): of several that a
    /// lowest-priority message is for, the lowest of these takes it.
    pub fn arbitration_priority(&self) -> u8 {
        let tpr = self.page.get(register::TPR) as u8;
        let requested = self.requested.highest(&self.page).unwrap_or(0) & 0xf0;
        let in_service = self.in_service.highest(&self.page).unwrap_or(0) & 0xf0;
        let class = tpr & 0xf0;
        if class >= requested && class > in_service {
            tpr
        } else {
            (class & in_service).max(requested)
        }
    }

    /// IA32_TSC_DEADLINE: 0 when the timer is not armed, or in another mode.
    pub const fn tsc_deadline(&self, now: Ticks) -> u64 {
        self.timer.tsc_deadline(now)
    }

    /// Writes IA32_TSC_DEADLINE. A moment that has passed expires at once.
    #[inline]
    pub fn set_tsc_deadline(&mut self, now: Ticks, value: u64) {
        // What has expired until now is not undone.
        if self.timer.is_due(now) {
            self.advance(now);
        }
        self.timer.set_tsc_deadline(value);
        if self.timer.is_due(now) {
            self.advance(now);
        }
    }

    /// What [`LocalApic::set_tsc_deadline`] does where `deadline` and the one before it are
    /// still to come. False, and nothing is done, in any other case.
    #[inline(always)]
    pub fn arm_tsc_deadline(&mut self, now: Ticks, deadline: Ticks) -> bool {
        self.timer.arm_tsc_deadline(now, deadline)
    }

    /// Delivers the timer's interrupt when it is due.
    #[inline(never)]
    pub fn advance(&mut self, now: Ticks) {
        if self.timer.expire(now) {
            let entry = self.entry(register::LVT_TIMER);
            if !entry.is_masked() {
                self.request(entry.vector(), Trigger::Edge);
            }
        }
    }

    /// When [`LocalApic::advance`] has to be called next; `None` while the timer
    /// is stopped or masked.
    #[inline]
    pub fn deadline(&self) -> Option<Ticks> {
        let masked = self.entry(register::LVT_TIMER).is_masked();
        self.timer.deadline().filter(|_| !masked)
    }

    /// Whether that is before `time`.
    #[inline(always)]
    pub fn expires_before(&self, time: Ticks) -> bool {
        self.timer.expires_before(time) && self.deadline().is_some()
    }

    /// Whether that is no later than `time`.
    #[inline]
    pub fn expires_by(&self, time: Ticks) -> bool {
        self.timer.is_due(time) && self.deadline().is_some()
    }

    /// Not globally disabled, and enabled in the SVR.
    #[inline]
    fn is_enabled(&self) -> bool {
        self.mode != Mode::Disabled && self.page.get(register::SVR) & registers::SVR_ENABLED != 0
    }
}
