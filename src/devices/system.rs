//! The odd ports of the system board: speaker and timer gate (0x61), delay
//! (0x80), fast A20 and reset (0x92), reset control (0xcf9).
//!
//! The A20 line itself is not modelled: address bit 20 always passes, as on
//! every machine since A20M# went away; the bits only remember what was written.

use super::Request;

/// State of the system board's ports.
#[derive(Clone, Debug)]
pub struct SystemPorts {
    /// Bits 3..0 of port 0x61.
    control: u8,
    post_code: u8,
    fast_a20: u8,
    reset_control: u8,
}

impl Default for SystemPorts {
    fn default() -> Self {
        Self {
            control: 0,
            post_code: 0,
            fast_a20: 0x02,
            reset_control: 0,
        }
    }
}

impl SystemPorts {
    /// Port 0x61: the low bits as written, the refresh toggle in bit 4, and the
    /// output of the 8254's channel 2 in bit 5.
    pub const fn control(&self, refresh: bool, timer_output: bool) -> u8 {
        self.control | (refresh as u8) << 4 | (timer_output as u8) << 5
    }

    /// Writes port 0x61 and returns the new level of channel 2's gate.
    pub const fn set_control(&mut self, value: u8) -> bool {
        self.control = value & 0x0f;
        value & 1 != 0
    }

    /// Port 0x80: the byte that was written last.
    pub const fn post_code(&self) -> u8 {
        self.post_code
    }

    /// Writes port 0x80.
    pub const fn set_post_code(&mut self, value: u8) {
        self.post_code = value;
    }

    /// Port 0x92.
    pub const fn fast_a20(&self) -> u8 {
        self.fast_a20
    }

    /// Writes port 0x92: bit 0 going from 0 to 1 resets.
    pub const fn set_fast_a20(&mut self, value: u8) -> Option<Request> {
        let reset = value & !self.fast_a20 & 1 != 0;
        self.fast_a20 = value & 0x03;
        if reset { Some(Request::Reset) } else { None }
    }

    /// Port 0xcf9.
    pub const fn reset_control(&self) -> u8 {
        self.reset_control
    }

    /// Writes port 0xcf9: bit 2 going from 0 to 1 resets.
    pub const fn set_reset_control(&mut self, value: u8) -> Option<Request> {
        let reset = value & !self.reset_control & 0x04 != 0;
        self.reset_control = value & 0x0e;
        if reset { Some(Request::Reset) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_control_wants_a_rising_bit() {
        let mut ports = SystemPorts::default();
        assert_eq!(ports.set_reset_control(0x02), None);
        assert_eq!(ports.set_reset_control(0x06), Some(Request::Reset));
        assert_eq!(ports.set_reset_control(0x06), None);
    }

    #[test]
    fn fast_a20_keeps_the_gate_and_resets() {
        let mut ports = SystemPorts::default();
        assert_eq!(ports.fast_a20(), 0x02);
        assert_eq!(ports.set_fast_a20(0x02), None);
        assert_eq!(ports.set_fast_a20(0x03), Some(Request::Reset));
    }

    #[test]
    fn control_shows_inputs_that_cannot_be_written() {
        let mut ports = SystemPorts::default();
        assert!(ports.set_control(0xf1));
        assert_eq!(ports.control(false, false), 0x01);
        assert_eq!(ports.control(true, true), 0x31);
    }
}
