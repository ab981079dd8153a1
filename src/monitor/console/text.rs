//! What the operator is to see and the line has not taken yet.

use alloc::collections::VecDeque;
use core::fmt;

/// The most bytes that wait; what comes then is lost. More than the whole log.
pub const MOST: usize = 64 * 1024;

/// A queue of bytes. Formatted text gets CR LF at the ends of its lines.
#[derive(Debug, Default)]
pub struct Text(VecDeque<u8>);

impl Text {
    /// Empty.
    pub const fn new() -> Self {
        Self(VecDeque::new())
    }

    /// Appends `bytes` as they are.
    pub fn push(&mut self, bytes: &[u8]) {
        if bytes.len() <= self.space() && self.0.try_reserve(bytes.len()).is_ok() {
            self.0.extend(bytes);
        }
    }

    /// Takes the oldest byte. With the last one the memory is given back.
    pub fn pop(&mut self) -> Option<u8> {
        let byte = self.0.pop_front();
        if self.0.is_empty() {
            self.0 = VecDeque::new();
        }
        byte
    }

    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// How many bytes more there is room for.
    pub fn space(&self) -> usize {
        MOST - self.0.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => {
                    self.push(line.as_bytes());
                    self.push(b"\r\n");
                }
                None => self.push(line.as_bytes()),
            }
        }
        Ok(())
    }
}
