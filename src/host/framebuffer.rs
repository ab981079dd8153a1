//! The screen, where the firmware left one: the hypervisor's log and its last
//! words in text, for boards whose serial port nobody listens to.
//!
//! Text only, grey on black, so the order of the colours does not matter. The
//! framebuffer is written and never read: it is slow memory, so what stands on
//! the screen is kept in a grid of characters, and only cells that change are
//! drawn. Never used on the way of a VM exit.

use super::memory::paging::{self, MapError};
use crate::addr::{Hpa, Hva};
use crate::arch::cpu::without_interrupts;
use alloc::vec;
use alloc::vec::Vec;
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};
use spin::Mutex;
use vireo_handoff::Framebuffer;

const WEIGHT: FontWeight = FontWeight::Regular;
const SIZE: RasterHeight = RasterHeight::Size16;
/// Pixels of a character.
const WIDTH: usize = get_raster_width(WEIGHT, SIZE);
const HEIGHT: usize = SIZE.val();
/// Wider or higher modes use their upper left part.
const MOST_COLUMNS: usize = 240;
const MOST_ROWS: usize = 100;

static SCREEN: Mutex<Option<Screen<Mapped>>> = Mutex::new(None);

/// Where pixels go.
trait Pixels {
    /// Sets the pixel at `index`, counted along the rows.
    fn set(&mut self, index: usize, value: u32);
}

/// A framebuffer in the hypervisor's address space.
struct Mapped {
    start: Hva,
    /// Number of pixels.
    len: usize,
}

impl Pixels for Mapped {
    fn set(&mut self, index: usize, value: u32) {
        if index < self.len {
            let pixel = (self.start.0 as *mut u32).wrapping_add(index);
            // SAFETY: inside the mapping of the framebuffer, which nothing else uses.
            unsafe { pixel.write_volatile(value) };
        }
    }
}

/// A grid of characters on pixels.
struct Screen<P> {
    pixels: P,
    /// Pixels from one row of pixels to the next.
    stride: usize,
    columns: usize,
    /// What is shown, row by row.
    cells: Vec<u8>,
    /// Where the next character goes; at the end of the cells, the screen scrolls first.
    next: usize,
}

impl<P: Pixels> Screen<P> {
    /// A black screen; `None` where not one character fits.
    fn new(mut pixels: P, width: usize, height: usize, stride: usize) -> Option<Self> {
        let columns = (width.min(stride) / WIDTH).min(MOST_COLUMNS);
        let rows = (height / HEIGHT).min(MOST_ROWS);
        if columns == 0 || rows == 0 {
            return None;
        }
        for index in 0..height.checked_mul(stride)? {
            pixels.set(index, 0);
        }
        Some(Self {
            pixels,
            stride,
            columns,
            cells: vec![b' '; columns * rows],
            next: 0,
        })
    }

    fn write(&mut self, text: &str) {
        for character in text.chars() {
            match character {
                '\n' => self.next += self.columns - self.next % self.columns,
                '\r' => {}
                ' '..='~' => self.put(character as u8),
                _ => self.put(b'?'),
            }
        }
    }

    fn put(&mut self, character: u8) {
        if self.next >= self.cells.len() {
            self.scroll();
        }
        self.show(self.next, character);
        self.next += 1;
    }

    /// Moves everything up by a row.
    fn scroll(&mut self) {
        for cell in 0..self.cells.len() {
            let below = self.cells.get(cell + self.columns).copied();
            self.show(cell, below.unwrap_or(b' '));
        }
        self.next = self.cells.len() - self.columns;
    }

    /// Shows a printable character in a cell, unless it is there already.
    fn show(&mut self, cell: usize, character: u8) {
        let Some(shown) = self.cells.get_mut(cell) else {
            return;
        };
        if *shown == character {
            return;
        }
        *shown = character;
        let Some(raster) = get_raster(char::from(character), WEIGHT, SIZE) else {
            return;
        };
        let (row, column) = (cell / self.columns, cell % self.columns);
        let corner = row * HEIGHT * self.stride + column * WIDTH;
        for (y, line) in raster.rows().enumerate() {
            for (x, &grey) in line.iter().enumerate() {
                let value = u32::from(grey) * 0x01_0101;
                self.pixels.set(corner + y * self.stride + x, value);
            }
        }
    }
}

/// Takes over the screen that the loader found.
///
/// # Errors
/// When it cannot be mapped.
///
/// # Safety
/// `framebuffer` is the loader's, so that nothing else lies there.
pub unsafe fn init(framebuffer: &Framebuffer) -> Result<(), MapError> {
    let len = framebuffer.len / 4;
    let start = paging::map_framebuffer(Hpa(framebuffer.start), len * 4)?;
    let mapped = Mapped {
        start,
        len: len as usize,
    };
    let (width, height) = (framebuffer.width as usize, framebuffer.height as usize);
    let screen = Screen::new(mapped, width, height, framebuffer.stride as usize);
    without_interrupts(|| *SCREEN.lock() = screen);
    Ok(())
}

/// Whether there is a screen that shows what is written.
pub fn is_on() -> bool {
    without_interrupts(|| SCREEN.try_lock().is_some_and(|screen| screen.is_some()))
}

/// Shows `text`, where there is a screen and nobody is writing to it: whoever
/// holds the lock may be the code that died.
pub fn write(text: &str) {
    without_interrupts(|| {
        if let Some(mut screen) = SCREEN.try_lock()
            && let Some(screen) = screen.as_mut()
        {
            screen.write(text);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Pixels for Vec<u32> {
        fn set(&mut self, index: usize, value: u32) {
            self[index] = value;
        }
    }

    const STRIDE: usize = 4 * WIDTH + 5;
    const ROWS: usize = 3;

    fn screen() -> Screen<Vec<u32>> {
        let pixels = vec![7; STRIDE * ROWS * HEIGHT];
        Screen::new(pixels, 4 * WIDTH + 2, ROWS * HEIGHT, STRIDE).unwrap()
    }

    fn lines(screen: &Screen<Vec<u32>>) -> Vec<&str> {
        screen
            .cells
            .chunks(screen.columns)
            .map(|row| core::str::from_utf8(row).unwrap())
            .collect()
    }

    #[test]
    fn text_wraps_and_scrolls() {
        let mut screen = screen();
        screen.write("abcdef\ng\u{fc}\r\n");
        assert_eq!(lines(&screen), ["abcd", "ef  ", "g?  "]);
        screen.write("h");
        assert_eq!(lines(&screen), ["ef  ", "g?  ", "h   "]);
        screen.write("\n\n");
        screen.write("ijkl");
        assert_eq!(lines(&screen), ["g?  ", "h   ", "ijkl"]);
    }

    #[test]
    fn a_mode_too_small_for_a_character_is_no_screen() {
        assert!(Screen::new(Vec::new(), WIDTH - 1, HEIGHT, WIDTH).is_none());
        assert!(Screen::new(Vec::new(), WIDTH, HEIGHT - 1, WIDTH).is_none());
    }

    proptest! {
        #[test]
        fn the_pixels_are_those_of_the_characters(text in "[ -~\n]{0,60}") {
            let mut screen = screen();
            screen.write(&text);
            for (index, &pixel) in screen.pixels.iter().enumerate() {
                let (x, y) = (index % STRIDE, index / STRIDE);
                let expected = if x < 4 * WIDTH {
                    let cell = screen.cells[y / HEIGHT * screen.columns + x / WIDTH];
                    let raster = get_raster(char::from(cell), WEIGHT, SIZE).unwrap();
                    u32::from(raster.pixel(x % WIDTH, y % HEIGHT).unwrap()) * 0x01_0101
                } else {
                    0
                };
                prop_assert_eq!(pixel, expected, "{}, {}", x, y);
            }
        }
    }
}
