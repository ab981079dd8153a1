//! The keyboard controller, without a keyboard or a mouse: its commands answer
//! at once, so that a guest's probe ends quickly, and its output port resets
//! the machine.

use super::{Line, Request};

/// Bits of the status register.
mod status {
    pub const OUTPUT_FULL: u8 = 0x01;
    pub const SYSTEM: u8 = 0x04;
    pub const COMMAND: u8 = 0x08;
    pub const NOT_INHIBITED: u8 = 0x10;
    pub const TIMEOUT: u8 = 0x40;
}

/// Bits of the command byte.
mod command_byte {
    pub const KEYBOARD_INTERRUPT: u8 = 0x01;
    pub const SYSTEM: u8 = 0x04;
    pub const KEYBOARD_DISABLED: u8 = 0x10;
    pub const AUX_DISABLED: u8 = 0x20;
    pub const TRANSLATE: u8 = 0x40;
}

/// What the next write to the data port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Keyboard,
    Ram(u8),
    OutputPort,
    KeyboardLoop,
    AuxLoop,
    Aux,
}

/// Output port at rest: no reset (bit 0), A20 open (bit 1).
const OUTPUT_PORT: u8 = 0x03;

/// An 8042 with the IBM PS/2 firmware's commands.
#[derive(Clone, Debug)]
pub struct I8042 {
    /// The controller's RAM; byte 0 is the command byte.
    ram: [u8; 32],
    output_port: u8,
    output: Option<u8>,
    last_output: u8,
    timeout: bool,
    wrote_command: bool,
    expects: Expects,
    line: Line,
}

impl Default for I8042 {
    fn default() -> Self {
        let mut ram = [0; 32];
        ram[0] = command_byte::SYSTEM
            | command_byte::KEYBOARD_DISABLED
            | command_byte::AUX_DISABLED
            | command_byte::TRANSLATE;
        Self {
            ram,
            output_port: OUTPUT_PORT,
            output: None,
            last_output: 0,
            timeout: false,
            wrote_command: false,
            expects: Expects::Keyboard,
            line: Line::default(),
        }
    }
}

impl I8042 {
    /// The keyboard's interrupt output.
    #[inline]
    pub fn line(&mut self) -> &mut Line {
        &mut self.line
    }

    /// Port 0x64: status.
    pub fn status(&self) -> u8 {
        let mut value = status::NOT_INHIBITED;
        if self.output.is_some() {
            value |= status::OUTPUT_FULL;
        }
        if self.ram[0] & command_byte::SYSTEM != 0 {
            value |= status::SYSTEM;
        }
        if self.wrote_command {
            value |= status::COMMAND;
        }
        if self.timeout {
            value |= status::TIMEOUT;
        }
        value
    }

    /// Port 0x60: the byte in the output buffer, or the last one again.
    pub fn read_data(&mut self) -> u8 {
        if let Some(value) = self.output.take() {
            self.last_output = value;
        }
        self.timeout = false;
        self.update();
        self.last_output
    }

    /// Writes port 0x64: a command.
    pub fn command(&mut self, command: u8) -> Option<Request> {
        self.wrote_command = true;
        self.expects = Expects::Keyboard;
        match command {
            0x20..=0x3f => {
                let value = self.ram.get(usize::from(command & 0x1f)).copied();
                self.answer(value.unwrap_or(0));
            }
            0x60..=0x7f => self.expects = Expects::Ram(command & 0x1f),
            // The clock of the auxiliary port, which is not there, is stuck low.
            0xa9 => self.answer(0x01),
            0xaa => {
                self.ram[0] |= command_byte::SYSTEM;
                self.answer(0x55);
            }
            0xab => self.answer(0x00),
            0xad => self.ram[0] |= command_byte::KEYBOARD_DISABLED,
            0xae => self.ram[0] &= !command_byte::KEYBOARD_DISABLED,
            0xc0 => self.answer(0x00),
            0xd0 => self.answer(self.output_port),
            0xd1 => self.expects = Expects::OutputPort,
            0xd2 => self.expects = Expects::KeyboardLoop,
            0xd3 => self.expects = Expects::AuxLoop,
            0xd4 => self.expects = Expects::Aux,
            // Pulse the output port's low bits: bit 0 is the CPU's reset.
            0xf0..=0xff if command & 1 == 0 => return Some(Request::Reset),
            _ => {}
        }
        self.update();
        None
    }

    /// Writes port 0x60: the operand of a command, or a byte for the keyboard.
    pub fn write_data(&mut self, value: u8) -> Option<Request> {
        self.wrote_command = false;
        match core::mem::replace(&mut self.expects, Expects::Keyboard) {
            Expects::Ram(index) => {
                if let Some(byte) = self.ram.get_mut(usize::from(index)) {
                    *byte = value;
                    self.ram[0] |= command_byte::AUX_DISABLED;
                }
            }
            Expects::OutputPort => {
                self.output_port = value;
                if value & 1 == 0 {
                    self.output_port |= 1;
                    return Some(Request::Reset);
                }
            }
            // Without an auxiliary port its loop-back comes out as keyboard data.
            Expects::KeyboardLoop | Expects::AuxLoop => self.answer(value),
            // Nobody answers; the controller says so.
            Expects::Keyboard | Expects::Aux => {
                self.answer(0xfe);
                self.timeout = true;
            }
        }
        self.update();
        None
    }

    fn answer(&mut self, value: u8) {
        self.output = Some(value);
        self.timeout = false;
    }

    fn update(&mut self) {
        let enabled = self.ram[0] & command_byte::KEYBOARD_INTERRUPT != 0;
        self.line.set(enabled && self.output.is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_controller_check_passes_and_finds_no_mouse() {
        let mut i8042 = I8042::default();
        assert_eq!(i8042.status() & status::OUTPUT_FULL, 0);
        i8042.command(0xaa);
        assert_ne!(i8042.status() & status::OUTPUT_FULL, 0);
        assert_eq!(i8042.read_data(), 0x55);
        i8042.command(0x20);
        let byte = i8042.read_data();
        i8042.command(0x60);
        i8042.write_data(byte & !0x40);
        i8042.command(0x20);
        assert_eq!(i8042.read_data(), byte & !0x40);
        // Enabled, a port that is there would not be disabled.
        i8042.command(0xa8);
        i8042.command(0x60);
        i8042.write_data(0);
        i8042.command(0x20);
        assert_eq!(i8042.read_data(), 0x20);
        // The loop-back comes without the auxiliary flag, the port test fails.
        i8042.command(0xd3);
        i8042.write_data(0x5a);
        assert_eq!(i8042.status() & 0x20, 0);
        i8042.read_data();
        i8042.command(0xa9);
        assert_eq!(i8042.read_data(), 0x01);
    }

    #[test]
    fn a_byte_for_the_missing_keyboard_times_out_with_an_interrupt() {
        let mut i8042 = I8042::default();
        i8042.command(0x60);
        i8042.write_data(0x45);
        i8042.write_data(0xf2);
        assert!(i8042.line().level());
        assert_ne!(i8042.status() & status::TIMEOUT, 0);
        assert_eq!(i8042.read_data(), 0xfe);
        assert!(!i8042.line().level());
        assert_eq!(i8042.status() & status::TIMEOUT, 0);
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let mut i8042 = I8042::default();
        assert_eq!(i8042.command(0xfe), Some(Request::Reset));
        assert_eq!(i8042.command(0xff), None);
        i8042.command(0xd1);
        assert_eq!(i8042.write_data(0xdf), None);
        i8042.command(0xd0);
        assert_eq!(i8042.read_data(), 0xdf);
        i8042.command(0xd1);
        assert_eq!(i8042.write_data(0xde), Some(Request::Reset));
    }
}
