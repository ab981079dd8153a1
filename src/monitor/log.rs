//! The hypervisor's own log: the back end of the crate `log`.
//!
//! A line goes into a memory ring and, unless a guest owns the serial port
//! ([`Quiet`]), to the console and the screen. Errors are always shown.

use crate::arch::cpu::without_interrupts;
use crate::host::console::{self, Ring};
use crate::host::framebuffer;
use alloc::string::String;
use alloc::vec::Vec;
use arrayvec::ArrayString;
use core::fmt::Write;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::Mutex;

/// Bytes of the memory ring.
pub const RING: usize = 32 * 1024;
/// Bytes of one line; longer ones are cut.
const LINE: usize = 512;
/// What each begins with.
const WHOSE: &str = "vireo: ";

static MEMORY: Mutex<Ring<RING>> = Mutex::new(Ring::new());
/// Who wants it quiet; no other memory is read because of it.
static QUIET: AtomicU32 = AtomicU32::new(0);
/// See [`lost`]. A number for people: relaxed.
static LOST: AtomicU64 = AtomicU64::new(0);

struct Backend;

impl Log for Backend {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = format_line(record);
        without_interrupts(|| {
            let mut memory = MEMORY.lock();
            line.bytes().for_each(|byte| memory.push_over(byte));
        });
        let shown = record.level() == Level::Error || record.target() == ALWAYS;
        if shown || QUIET.load(Ordering::Relaxed) == 0 {
            show(&line);
            framebuffer::write(&line);
        }
    }

    fn flush(&self) {
        console::flush();
    }
}

/// A whole line or, when the console has no room for it, nothing.
fn show(line: &str) {
    if !super::console::log(line.trim_end_matches('\n')) {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

fn format_line(record: &Record<'_>) -> ArrayString<LINE> {
    let kind = match record.level() {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info => "",
        Level::Debug | Level::Trace => "debug: ",
    };
    let mut line = Line(ArrayString::new());
    // A line that is too long is cut, not refused.
    let _ = write!(line, "{WHOSE}{kind}{}", record.args());
    line.0.push('\n');
    line.0
}

/// A writer that keeps what fits, leaving one byte for the line's end.
struct Line(ArrayString<LINE>);

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = LINE - 1 - self.0.len();
        self.0.push_str(&text[..text.floor_char_boundary(room)]);
        Ok(())
    }
}

/// Makes the log the process's. Lines below `level` are dropped.
pub fn init(level: LevelFilter) {
    static BACKEND: Backend = Backend;
    // A second call only changes the level.
    let _ = log::set_logger(&BACKEND);
    log::set_max_level(level);
}

/// The target of what the operator waits for, and gets to see as errors are seen.
pub const ALWAYS: &str = "always";

/// Keeps everything but errors, and what is for [`ALWAYS`], off the serial port as long as there
/// is one of these.
#[derive(Debug)]
pub struct Quiet(());

impl Quiet {
    #[expect(clippy::new_without_default, reason = "it does something")]
    pub fn new() -> Self {
        QUIET.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        QUIET.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Lines that the console had no room for; the memory ring has them.
pub fn lost() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// The lines that the memory ring has, without what says whose they are.
pub fn lines() -> String {
    let bytes: Vec<u8> = without_interrupts(|| MEMORY.lock().iter().collect());
    whole_lines(&bytes)
}

/// Those lines of `bytes` that have their beginning: the first may have lost it.
fn whole_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.split_inclusive('\n')
        .filter_map(|line| line.strip_prefix(WHOSE))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: Level, text: &str) -> String {
        format_line(
            &Record::builder()
                .level(level)
                .args(format_args!("{text}"))
                .build(),
        )
        .to_string()
    }

    #[test]
    fn a_line_says_who_and_how_bad() {
        assert_eq!(line(Level::Info, "hello"), "vireo: hello\n");
        assert_eq!(line(Level::Error, "no VT-x"), "vireo: error: no VT-x\n");
        assert_eq!(line(Level::Warn, "slow"), "vireo: warning: slow\n");
    }

    #[test]
    fn a_line_that_has_lost_its_beginning_is_left_out() {
        let bytes = b"reo: lost\nvireo: error: one\nvireo: two vireo: \n";
        assert_eq!(whole_lines(bytes), "error: one\ntwo vireo: \n");
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let text = line(Level::Info, &"ü".repeat(600));
        assert!(text.len() <= LINE && text.len() >= LINE - 2);
        assert!(text.ends_with("ü\n"));
    }
}
