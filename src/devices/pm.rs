//! ACPI's fixed hardware (ACPI 6.5, 4.8): the PM1a event and control blocks,
//! the power-management timer, and the SMI command port that switches ACPI
//! mode on and off. Where it lies and the sleep type of soft-off are in
//! [`pc`](super::pc).

use super::{Clock, Line, Request, Ticks, Width, pc};

/// Frequency of the power-management timer, in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;

/// Bits of the timer.
const TIMER_BITS: u32 = if pc::PM_TIMER_32_BIT { 32 } else { 24 };

/// Bits of the PM1 status and enable registers.
mod event {
    /// The timer's highest bit changed.
    pub const TIMER: u16 = 1 << 0;
    pub const GLOBAL: u16 = 1 << 5;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const SLEEP_BUTTON: u16 = 1 << 9;
    pub const RTC: u16 = 1 << 10;
    /// Set on the way out of a sleep.
    pub const WAKE: u16 = 1 << 15;
    /// What can raise the SCI.
    pub const ENABLE: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
}

/// Bits of the PM1 control register.
mod control {
    pub const SCI_ENABLE: u16 = 1 << 0;
    pub const BUS_MASTER_RELOAD: u16 = 1 << 1;
    pub const SLEEP_TYPE: u16 = 7 << 10;
    pub const SLEEP_TYPE_SHIFT: u32 = 10;
    pub const SLEEP_ENABLE: u16 = 1 << 13;
}

/// The power-management block.
#[derive(Clone, Debug)]
pub struct PowerManagement {
    clock: Clock,
    power_on: Ticks,
    status: u16,
    enable: u16,
    control: u16,
    /// The byte in the port after the SMI command port.
    smi_status: u8,
    /// Half periods of the timer that have been seen.
    halves: u64,
    sci: Line,
    deadline: Option<Ticks>,
}

impl PowerManagement {
    /// The block at power-on: ACPI mode is off, the timer runs.
    pub fn new(clock: Clock, now: Ticks) -> Self {
        Self {
            clock,
            power_on: now,
            status: 0,
            enable: 0,
            control: 0,
            smi_status: 0,
            halves: 0,
            sci: Line::default(),
            deadline: None,
        }
    }

    /// The system control interrupt.
    #[inline]
    pub fn line(&mut self) -> &mut Line {
        &mut self.sci
    }

    /// When the timer's highest bit changes, if that raises the SCI.
    #[inline]
    pub const fn deadline(&self) -> Option<Ticks> {
        self.deadline
    }

    /// The power-management timer.
    #[inline]
    pub const fn timer(&self, now: Ticks) -> u32 {
        let mask = u32::MAX >> (32 - TIMER_BITS);
        self.timer_cycles(now) as u32 & mask
    }

    /// Reads `width` bytes at `offset` in the block.
    pub fn read(&mut self, now: Ticks, offset: u16, width: Width) -> u32 {
        self.advance(now);
        let mut value = 0;
        for index in (0..width.bytes().min(4) as u16).rev() {
            value = value << 8 | u32::from(self.byte(now, offset.wrapping_add(index)));
        }
        value
    }

    /// Writes `width` bytes at `offset` in the block. Bytes that belong to no
    /// register of the block are ignored.
    pub fn write(&mut self, now: Ticks, offset: u16, width: Width, value: u32) -> Option<Request> {
        self.advance(now);
        let mut request = None;
        let bytes = value.to_le_bytes();
        for (index, &byte) in (0..width.bytes().min(4) as u16).zip(&bytes) {
            let offset = offset.wrapping_add(index);
            let shifted = u16::from(byte) << (8 * (offset & 1));
            let lane = 0xff << (8 * (offset & 1));
            match offset & !1 {
                0 => self.status &= !shifted,
                2 => self.enable = (self.enable & !lane) | (shifted & event::ENABLE),
                4 => request = request.or(self.set_control(shifted, lane)),
                _ => {}
            }
        }
        self.update();
        request
    }

    /// Writes the SMI command port.
    pub fn smi_command(&mut self, now: Ticks, command: u8) {
        self.advance(now);
        match command {
            pc::ACPI_ENABLE => self.control |= control::SCI_ENABLE,
            pc::ACPI_DISABLE => self.control &= !control::SCI_ENABLE,
            _ => {}
        }
        self.update();
    }

    /// The byte in the port after the SMI command port.
    pub const fn smi_status(&self) -> u8 {
        self.smi_status
    }

    /// Writes the port after the SMI command port.
    pub const fn set_smi_status(&mut self, value: u8) {
        self.smi_status = value;
    }

    /// Somebody pressed the power button.
    pub fn press_power_button(&mut self) {
        self.status |= event::POWER_BUTTON;
        self.update();
    }

    /// Brings status and line up to `now`.
    pub fn advance(&mut self, now: Ticks) {
        let halves = self.timer_cycles(now) >> (TIMER_BITS - 1);
        if halves != self.halves {
            self.halves = halves;
            self.status |= event::TIMER;
            self.update();
        }
    }

    /// SCI_EN is the hardware's answer to the SMI command and cannot be written here.
    fn set_control(&mut self, value: u16, lane: u16) -> Option<Request> {
        let writable = lane & (control::BUS_MASTER_RELOAD | control::SLEEP_TYPE);
        self.control = (self.control & !writable) | (value & writable);
        let sleep_type = (self.control & control::SLEEP_TYPE) >> control::SLEEP_TYPE_SHIFT;
        let sleep = value & control::SLEEP_ENABLE != 0;
        let request = match u8::try_from(sleep_type) {
            Ok(pc::S5_SLEEP_TYPE | pc::PIIX4_OFF_SLEEP_TYPE) => Request::PowerOff,
            Ok(pc::S3_SLEEP_TYPE) => Request::Suspend,
            _ => return None,
        };
        sleep.then_some(request)
    }

    /// Whether the machine is to end its sleep: for the power button, or for the real-time
    /// clock, whose interrupt line is `rtc`.
    pub fn wakes(&mut self, rtc: bool) -> bool {
        let clock = if rtc { event::RTC } else { 0 };
        let wakes = (self.status | clock) & self.enable & (event::RTC | event::POWER_BUTTON) != 0;
        if wakes {
            self.status |= event::WAKE | clock;
            self.update();
        }
        wakes
    }

    fn byte(&self, now: Ticks, offset: u16) -> u8 {
        let register = match offset & !1 {
            0 => self.status,
            2 => self.enable,
            4 => self.control,
            8 => self.timer(now) as u16,
            10 => (self.timer(now) >> 16) as u16,
            _ => return 0,
        };
        let [low, high] = register.to_le_bytes();
        if offset & 1 == 0 { low } else { high }
    }

    fn update(&mut self) {
        let acpi = self.control & control::SCI_ENABLE != 0;
        self.sci.set(acpi && self.status & self.enable != 0);
        // The SCI is asserted or nobody wants it: the timer changes nothing.
        let wanted = acpi && self.enable & !self.status & event::TIMER != 0;
        self.deadline = wanted.then(|| {
            let cycles = self.halves.saturating_add(1) << (TIMER_BITS - 1);
            Ticks(
                self.power_on
                    .0
                    .saturating_add(self.clock.ticks(cycles, PM_TIMER_HZ)),
            )
        });
    }

    const fn timer_cycles(&self, now: Ticks) -> u64 {
        self.clock
            .cycles(now.0.saturating_sub(self.power_on.0), PM_TIMER_HZ)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HZ: u64 = 1_000_000_000;

    fn block() -> PowerManagement {
        PowerManagement::new(Clock::new(HZ), Ticks(100))
    }

    #[test]
    fn the_timer_runs_at_its_rate() {
        let mut pm = block();
        assert_eq!(pm.read(Ticks(100), 8, Width::Dword), 0);
        assert_eq!(
            pm.read(Ticks(100 + HZ), 8, Width::Dword),
            PM_TIMER_HZ as u32
        );
        assert_eq!(
            pm.read(Ticks(100 + HZ), 9, Width::Byte),
            (PM_TIMER_HZ as u32 >> 8) & 0xff
        );
    }

    #[test]
    fn soft_off_as_linux_does_it() {
        let mut pm = block();
        let now = Ticks(100);
        pm.smi_command(now, pc::ACPI_ENABLE);
        let control = pm.read(now, 4, Width::Word);
        assert_eq!(control, 1);
        let typed = control | u32::from(pc::S5_SLEEP_TYPE) << 10;
        assert_eq!(pm.write(now, 4, Width::Word, typed), None);
        assert_eq!(
            pm.write(now, 4, Width::Word, typed | 1 << 13),
            Some(Request::PowerOff)
        );
        assert_eq!(pm.read(now, 4, Width::Word) & 1 << 13, 0);
        assert_eq!(
            pm.write(now, 4, Width::Word, 1 << 13),
            Some(Request::PowerOff)
        );
        // Other sleep types are none.
        assert_eq!(pm.write(now, 4, Width::Word, 2 << 10 | 1 << 13), None);
    }

    #[test]
    fn a_sleep_ends_by_what_is_enabled() {
        let mut pm = block();
        let now = Ticks(100);
        let sleep = 1 << 10 | 1 << 13;
        assert_eq!(pm.write(now, 4, Width::Word, sleep), Some(Request::Suspend));
        pm.press_power_button();
        assert!(!pm.wakes(true));
        pm.write(now, 2, Width::Word, 0x400);
        assert!(!pm.wakes(false));
        assert!(pm.wakes(true));
        assert_eq!(pm.read(now, 0, Width::Word), 0x8500);
        pm.write(now, 2, Width::Word, 0x100);
        assert!(pm.wakes(false));
        pm.write(now, 0, Width::Word, 0x8500);
        assert!(!pm.wakes(false));
        assert_eq!(pm.read(now, 0, Width::Word), 0);
    }

    #[test]
    fn acpi_mode_is_only_switched_by_the_smi_command() {
        let mut pm = block();
        pm.write(Ticks(100), 4, Width::Word, 1);
        assert_eq!(pm.read(Ticks(100), 4, Width::Word), 0);
        pm.smi_command(Ticks(100), pc::ACPI_ENABLE);
        pm.write(Ticks(100), 4, Width::Word, 0);
        assert_eq!(pm.read(Ticks(100), 4, Width::Word), 1);
        pm.smi_command(Ticks(100), pc::ACPI_DISABLE);
        assert_eq!(pm.read(Ticks(100), 4, Width::Word), 0);
    }

    #[test]
    fn the_power_button_raises_the_sci_until_it_is_cleared() {
        let mut pm = block();
        let now = Ticks(100);
        pm.smi_command(now, pc::ACPI_ENABLE);
        pm.write(now, 2, Width::Word, 0x100);
        assert!(!pm.line().level());
        pm.press_power_button();
        assert!(pm.line().level());
        assert_eq!(pm.read(now, 0, Width::Word), 0x100);
        pm.write(now, 0, Width::Word, 0x100);
        assert!(!pm.line().level());
    }

    #[test]
    fn the_timer_carry_raises_the_sci_once_per_half_period() {
        let mut pm = block();
        pm.smi_command(Ticks(100), pc::ACPI_ENABLE);
        assert_eq!(pm.deadline(), None);
        pm.write(Ticks(100), 2, Width::Word, 1);
        let deadline = pm.deadline().unwrap();
        pm.advance(Ticks(deadline.0 - 1));
        assert!(!pm.line().level());
        pm.advance(deadline);
        assert!(pm.line().level());
        assert_eq!(pm.deadline(), None);
        pm.write(deadline, 0, Width::Word, 1);
        assert!(!pm.line().level());
        assert!(pm.deadline() > Some(deadline));
    }

    proptest! {
        #[test]
        fn nothing_a_guest_does_goes_wrong(
            steps in prop::collection::vec((0..5u8, any::<u16>(), any::<u32>(), prop_oneof![0..1000u64, any::<u64>()]), 0..50),
        ) {
            let mut now = Ticks(0);
            let mut pm = PowerManagement::new(Clock::new(HZ), now);
            for (what, offset, value, pause) in steps {
                now = Ticks(now.0.saturating_add(pause));
                match what {
                    0 => { pm.read(now, offset, Width::Dword); }
                    1 => { pm.write(now, offset & 15, Width::Dword, value); }
                    2 => { pm.write(now, offset & 15, Width::Word, value); }
                    3 => pm.smi_command(now, value as u8 & 1 | 0xf0),
                    _ => pm.press_power_button(),
                }
                pm.advance(now);
                prop_assert!(pm.deadline().is_none_or(|t| t > now || t.0 == u64::MAX));
            }
        }
    }
}
