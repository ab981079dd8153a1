//! The registers of a VGA that shows text (IBM, PS/2 Video Subsystem Technical Reference, 1992):
//! they remember what is written. Nobody draws; what a screen would show is read from
//! text memory when somebody asks, as [`Vga::text_mode`] says.

const CRTC_INDEX: u16 = 0x3d4;
const CRTC_DATA: u16 = 0x3d5;
/// Input status 1; written, feature control.
const STATUS: u16 = 0x3da;

/// Cells of text memory, which is 32 KiB: a character and its colours each.
pub const CELLS: u16 = 0x4000;

/// Indices of the CRT controller.
mod crtc {
    /// Columns less one.
    pub const HORIZONTAL_DISPLAY_END: usize = 0x01;
    /// Bits 8 and 9 of vertical counts.
    pub const OVERFLOW: usize = 0x07;
    /// Scan lines of a row less one; bit 7: each is shown twice.
    pub const MAXIMUM_SCAN_LINE: usize = 0x09;
    pub const START_HIGH: usize = 0x0c;
    pub const START_LOW: usize = 0x0d;
    /// Bit 7 protects the first eight registers.
    pub const VERTICAL_RETRACE_END: usize = 0x11;
    pub const VERTICAL_DISPLAY_END: usize = 0x12;
    /// Half the cells of a row.
    pub const OFFSET: usize = 0x13;
    /// The first that is not protected.
    pub const PROTECTED_END: usize = 0x08;
}

/// Beside an index of the attribute controller: the processor leaves it alone.
const SCREEN_ON: u8 = 0x20;
/// Index of the graphics controller's miscellaneous register: bit 0 is graphics, bits 3 and 2
/// say where the memory is.
const GRAPHICS_MISCELLANEOUS: usize = 0x06;
/// 32 KiB from 0xb8000.
const TEXT_MEMORY: u8 = 0b11 << 2;

/// Registers behind an index.
#[derive(Clone, Debug)]
struct Indexed<const N: usize> {
    index: u8,
    registers: [u8; N],
}

impl<const N: usize> Indexed<N> {
    const fn new(registers: [u8; N]) -> Self {
        Self {
            index: 0,
            registers,
        }
    }

    /// The register with this index; 0 where there is none.
    fn at(&self, index: usize) -> u8 {
        self.registers.get(index).copied().unwrap_or(0)
    }

    fn get(&self) -> u8 {
        self.at(self.index.into())
    }

    fn set(&mut self, value: u8) {
        if let Some(register) = self.registers.get_mut(usize::from(self.index)) {
            *register = value;
        }
    }
}

/// The palette's ports.
#[derive(Clone, Debug)]
struct Palette {
    /// Red, green and blue, 6 bits each.
    colours: [u8; 3 * 256],
    /// The next byte that is written, and that is read.
    write: u16,
    read: u16,
    /// Whether it was last set up for reading.
    reads: bool,
    mask: u8,
}

impl Palette {
    const NEW: Self = Self {
        colours: [0; 3 * 256],
        write: 0,
        read: 0,
        reads: false,
        mask: 0xff,
    };

    fn next(at: &mut u16) -> usize {
        let here = usize::from(*at);
        *at = (*at + 1) % (3 * 256);
        here
    }

    fn get(&mut self) -> u8 {
        let at = Self::next(&mut self.read);
        self.colours.get(at).copied().unwrap_or(0)
    }

    fn set(&mut self, value: u8) {
        let at = Self::next(&mut self.write);
        if let Some(colour) = self.colours.get_mut(at) {
            *colour = value & 0x3f;
        }
    }
}

/// How text memory becomes a screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextMode {
    /// The cell in the upper left corner.
    pub start: u16,
    /// Cells from a row to the next.
    pub pitch: u16,
    pub columns: u16,
    pub rows: u16,
}

impl TextMode {
    /// What a VGA begins with: a BIOS' mode 3.
    pub const FIRST: Self = Self {
        start: 0,
        pitch: 80,
        columns: 80,
        rows: 25,
    };
}

/// The registers.
#[derive(Clone, Debug)]
pub struct Vga {
    miscellaneous: u8,
    feature_control: u8,
    sequencer: Indexed<5>,
    crtc: Indexed<25>,
    graphics: Indexed<9>,
    attributes: Indexed<21>,
    /// The next byte to the attribute controller is a register's contents.
    attribute_data: bool,
    /// [`SCREEN_ON`], or 0.
    screen_on: u8,
    palette: Palette,
    /// Toggled by each read: software that waits for a retrace, or for its end, need not wait.
    retrace: bool,
}

impl Default for Vga {
    /// In [`TextMode::FIRST`], with 16 scan lines a row.
    fn default() -> Self {
        Self {
            miscellaneous: 0x67,
            feature_control: 0,
            sequencer: Indexed::new([0x03, 0x00, 0x03, 0x00, 0x02]),
            crtc: Indexed::new([
                0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0x00, 0x00,
                0x00, 0x00, 0x9c, 0x8e, 0x8f, 0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
            ]),
            graphics: Indexed::new([0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x0e, 0x00, 0xff]),
            attributes: Indexed::new([
                0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x14, 0x07, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d,
                0x3e, 0x3f, 0x0c, 0x00, 0x0f, 0x08, 0x00,
            ]),
            attribute_data: false,
            screen_on: SCREEN_ON,
            palette: Palette::NEW,
            retrace: false,
        }
    }
}

impl Vga {
    /// Reads a port; `None` where it is none of the VGA's.
    pub fn read(&mut self, port: u16) -> Option<u8> {
        Some(match port {
            0x3c0 => self.attributes.index | self.screen_on,
            0x3c1 => self.attributes.get(),
            // Input status 0: a colour monitor is there.
            0x3c2 => 0x10,
            0x3c4 => self.sequencer.index,
            0x3c5 => self.sequencer.get(),
            0x3c6 => self.palette.mask,
            0x3c7 => 3 * u8::from(self.palette.reads),
            0x3c8 => (self.palette.write / 3) as u8,
            0x3c9 => self.palette.get(),
            0x3ca => self.feature_control,
            0x3cc => self.miscellaneous,
            0x3ce => self.graphics.index,
            0x3cf => self.graphics.get(),
            0x3c3 | 0x3cb | 0x3cd => 0,
            CRTC_INDEX => self.crtc.index,
            CRTC_DATA => self.crtc.get(),
            STATUS => {
                /// Nothing is displayed; the retrace is a vertical one.
                const RETRACE: u8 = 0b1001;
                self.attribute_data = false;
                self.retrace = !self.retrace;
                if self.retrace { RETRACE } else { 0 }
            }
            _ => return None,
        })
    }

    /// Writes a port; false where it is none of the VGA's.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        match port {
            0x3c0 if self.attribute_data => {
                self.attributes.set(value);
                self.attribute_data = false;
            }
            0x3c0 => {
                self.attributes.index = value & 0x1f;
                self.screen_on = value & SCREEN_ON;
                self.attribute_data = true;
            }
            0x3c2 => self.miscellaneous = value,
            0x3c4 => self.sequencer.index = value & 0x07,
            0x3c5 => self.sequencer.set(value),
            0x3c6 => self.palette.mask = value,
            0x3c7 => {
                self.palette.read = 3 * u16::from(value);
                self.palette.reads = true;
            }
            0x3c8 => {
                self.palette.write = 3 * u16::from(value);
                self.palette.reads = false;
            }
            0x3c9 => self.palette.set(value),
            0x3ce => self.graphics.index = value & 0x0f,
            0x3cf => self.graphics.set(value),
            0x3c1 | 0x3c3 | 0x3ca..=0x3cd => {}
            CRTC_INDEX => self.crtc.index = value & 0x1f,
            CRTC_DATA => self.write_crtc(value),
            STATUS => self.feature_control = value,
            _ => return false,
        }
        true
    }

    fn write_crtc(&mut self, value: u8) {
        let protects = self.crtc.at(crtc::VERTICAL_RETRACE_END) & 0x80 != 0;
        if !protects || usize::from(self.crtc.index) >= crtc::PROTECTED_END {
            self.crtc.set(value);
        }
    }

    /// How it shows text; `None` while it shows graphics.
    pub fn text_mode(&self) -> Option<TextMode> {
        let register = |index| u16::from(self.crtc.at(index));
        if self.graphics.at(GRAPHICS_MISCELLANEOUS) & (TEXT_MEMORY | 1) != TEXT_MEMORY {
            return None;
        }
        let columns = register(crtc::HORIZONTAL_DISPLAY_END) + 1;
        let overflow = register(crtc::OVERFLOW);
        let lines =
            register(crtc::VERTICAL_DISPLAY_END) | (overflow & 0x02) << 7 | (overflow & 0x40) << 3;
        let of_a_row = register(crtc::MAXIMUM_SCAN_LINE);
        let height = ((of_a_row & 0x1f) + 1) << (of_a_row >> 7);
        let rows = (lines + 1) / height;
        Some(TextMode {
            start: (register(crtc::START_HIGH) << 8 | register(crtc::START_LOW)) % CELLS,
            pitch: register(crtc::OFFSET) * 2,
            columns,
            rows: rows.min(CELLS / columns),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn crtc(vga: &mut Vga, index: u8, value: u8) {
        assert!(vga.write(0x3d4, index) && vga.write(0x3d5, value));
        assert_eq!(vga.read(0x3d4), Some(index));
    }

    #[test]
    fn it_begins_with_80_by_25() {
        assert_eq!(Vga::default().text_mode(), Some(TextMode::FIRST));
    }

    #[test]
    fn the_screen_is_what_the_crt_controller_says() {
        let mut vga = Vga::default();
        crtc(&mut vga, 0x0c, 0x47);
        crtc(&mut vga, 0x0d, 0xd0);
        // 8 scan lines a row, and 100 cells from one to the next.
        crtc(&mut vga, 0x09, 0x47);
        crtc(&mut vga, 0x13, 50);
        // Protected until bit 7 of register 0x11 is clear.
        crtc(&mut vga, 0x01, 39);
        assert_eq!(vga.read(0x3d5), Some(0x4f));
        let mode = vga.text_mode().unwrap();
        assert_eq!((mode.start, mode.pitch), (0x7d0, 100));
        assert_eq!((mode.columns, mode.rows), (80, 50));
        crtc(&mut vga, 0x11, 0x0e);
        crtc(&mut vga, 0x01, 39);
        crtc(&mut vga, 0x09, 0xc7);
        let mode = vga.text_mode().unwrap();
        assert_eq!((mode.columns, mode.rows), (40, 25));
        // Graphics, and text somewhere else.
        for miscellaneous in [0x0f, 0x05, 0x0a] {
            vga.write(0x3ce, 6);
            vga.write(0x3cf, miscellaneous);
            assert_eq!(vga.text_mode(), None);
        }
    }

    #[test]
    fn a_wait_for_the_retrace_and_for_its_end_ends() {
        let mut vga = Vga::default();
        let status = [0; 3].map(|_| vga.read(0x3da).unwrap() & 9);
        assert_eq!(status, [9, 0, 9]);
    }

    #[test]
    fn the_attribute_controller_takes_index_and_data_in_turn() {
        let mut vga = Vga::default();
        vga.write(0x3c0, 0x30);
        // It begins anew with the index.
        vga.read(0x3da);
        for byte in [0x11, 0x2a, 0x31, 0x3b] {
            vga.write(0x3c0, byte);
        }
        assert_eq!(vga.read(0x3c0), Some(0x31));
        vga.write(0x3c0, 0x11);
        assert_eq!(vga.read(0x3c1), Some(0x3b));
    }

    #[test]
    fn the_palette_goes_on_by_itself() {
        let mut vga = Vga::default();
        vga.write(0x3c8, 255);
        for byte in [1, 2, 0xff, 4] {
            vga.write(0x3c9, byte);
        }
        assert_eq!((vga.read(0x3c8), vga.read(0x3c7)), (Some(0), Some(0)));
        vga.write(0x3c7, 255);
        let read = [0; 4].map(|_| vga.read(0x3c9).unwrap());
        assert_eq!((read, vga.read(0x3c7)), ([1, 2, 0x3f, 4], Some(3)));
    }

    proptest! {
        /// Whatever is written, a screen is no more than text memory.
        #[test]
        fn nothing_a_guest_does_goes_wrong(
            steps in prop::collection::vec((0x3b0..0x3e0u16, any::<u8>()), 0..300),
        ) {
            let mut vga = Vga::default();
            for (port, value) in steps {
                let mine = vga.write(port, value);
                prop_assert_eq!(vga.read(port).is_some(), mine);
                if let Some(mode) = vga.text_mode() {
                    prop_assert!(mode.start < CELLS);
                    prop_assert!(u32::from(mode.columns) * u32::from(mode.rows) <= CELLS.into());
                }
            }
        }
    }
}
