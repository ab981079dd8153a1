//! A line editor for a terminal that knows the sequences of ECMA-48.
//!
//! A line is shorter than the terminal is wide, so that it never wraps; longer ones are
//! answered by the bell.

use super::Text;
use alloc::collections::VecDeque;
use alloc::string::String;
use arrayvec::{ArrayString, ArrayVec};
use core::fmt::Write;

/// What stands before the line.
pub const PROMPT: &str = "vireo> ";
/// The most bytes of a line.
pub const LONGEST: usize = 79 - PROMPT.len();
/// Lines that are remembered.
pub const HISTORY: usize = 16;

const BELL: u8 = 7;

/// The keys of a line, by what they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Character(u8),
    Enter,
    Left,
    Right,
    Home,
    End,
    Backspace,
    Delete,
    /// From the start to the cursor.
    DeleteBefore,
    /// From the cursor to the end.
    DeleteBehind,
    DeleteWord,
    Earlier,
    Later,
    Cancel,
    Redraw,
}

/// How much of a key's sequence has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sequence {
    #[default]
    None,
    Escape,
    /// ESC O.
    Single,
    /// ESC [ and a number.
    Control(u8),
}

impl Sequence {
    /// The key that `byte` completes.
    fn push(&mut self, byte: u8) -> Option<Key> {
        let before = core::mem::take(self);
        match (before, byte) {
            (_, 0x1b) => *self = Self::Escape,
            (Self::Escape, b'[') => *self = Self::Control(0),
            (Self::Escape, b'O') => *self = Self::Single,
            (Self::Escape, _) => {}
            (Self::Control(number), b'0'..=b'9') => {
                let number = number.saturating_mul(10).saturating_add(byte - b'0');
                *self = Self::Control(number);
            }
            (Self::Control(number), b'~') => {
                return match number {
                    1 | 7 => Some(Key::Home),
                    3 => Some(Key::Delete),
                    4 | 8 => Some(Key::End),
                    _ => None,
                };
            }
            // Parameters that no key of ours has; and the end of a sequence is a letter.
            (Self::Control(_), 0x20..=0x3f) => *self = before,
            (Self::Control(_) | Self::Single, _) => return Self::letter(byte),
            (Self::None, _) => return Self::plain(byte),
        }
        None
    }

    const fn letter(byte: u8) -> Option<Key> {
        match byte {
            b'A' => Some(Key::Earlier),
            b'B' => Some(Key::Later),
            b'C' => Some(Key::Right),
            b'D' => Some(Key::Left),
            b'F' => Some(Key::End),
            b'H' => Some(Key::Home),
            _ => None,
        }
    }

    const fn plain(byte: u8) -> Option<Key> {
        Some(match byte {
            b' '..=b'~' => Key::Character(byte),
            b'\r' | b'\n' => Key::Enter,
            0x7f | 0x08 => Key::Backspace,
            // The control characters that shells have for the same.
            0x01 => Key::Home,
            0x02 => Key::Left,
            0x03 => Key::Cancel,
            0x04 => Key::Delete,
            0x05 => Key::End,
            0x06 => Key::Right,
            0x0b => Key::DeleteBehind,
            0x0c => Key::Redraw,
            0x0e => Key::Later,
            0x10 => Key::Earlier,
            0x15 => Key::DeleteBefore,
            0x17 => Key::DeleteWord,
            _ => return None,
        })
    }
}

/// One line that is being typed, and those before it.
#[derive(Debug, Default)]
pub struct Editor {
    line: ArrayVec<u8, LONGEST>,
    /// At most the line's length.
    cursor: usize,
    sequence: Sequence,
    /// Oldest first.
    history: VecDeque<ArrayVec<u8, LONGEST>>,
    /// How many lines back the one is that is shown; 0 is the new one.
    back: usize,
    /// The new one, while an earlier one is shown.
    new: ArrayVec<u8, LONGEST>,
    /// The last byte was CR: an LF behind it is the same key.
    returned: bool,
}

impl Editor {
    /// An empty line, and no history.
    pub const fn new() -> Self {
        Self {
            line: ArrayVec::new_const(),
            cursor: 0,
            sequence: Sequence::None,
            history: VecDeque::new(),
            back: 0,
            new: ArrayVec::new_const(),
            returned: false,
        }
    }

    /// Takes a byte from the terminal, and says on `screen` what it does. The line, when it
    /// is complete.
    pub fn push(&mut self, byte: u8, screen: &mut Text) -> Option<String> {
        let follows = core::mem::replace(&mut self.returned, byte == b'\r');
        if follows && byte == b'\n' {
            return None;
        }
        let key = self.sequence.push(byte)?;
        if key == Key::Enter {
            return Some(self.enter(screen));
        }
        self.edit(key, screen);
        None
    }

    /// Shows the prompt and the line, over whatever is on the terminal's row.
    pub fn draw(&self, screen: &mut Text) {
        screen.push(b"\r");
        screen.push(PROMPT.as_bytes());
        screen.push(&self.line);
        screen.push(b"\x1b[K");
        let behind = self.line.len() - self.cursor;
        if behind > 0 {
            let mut back = ArrayString::<8>::new();
            // Two digits.
            let _ = write!(back, "\x1b[{behind}D");
            screen.push(back.as_bytes());
        }
    }

    fn enter(&mut self, screen: &mut Text) -> String {
        screen.push(b"\r\n");
        let line = core::mem::take(&mut self.line);
        let text = line.iter().copied().map(char::from).collect();
        self.cursor = 0;
        self.back = 0;
        let is_new = self.history.back() != Some(&line);
        if is_new && line.iter().any(|byte| *byte != b' ') {
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back(line);
        }
        text
    }

    fn edit(&mut self, key: Key, screen: &mut Text) {
        let (cursor, len) = (self.cursor, self.line.len());
        match key {
            Key::Character(byte) if len < LONGEST => {
                self.line.insert(cursor, byte);
                self.cursor += 1;
                if cursor == len {
                    return screen.push(&[byte]);
                }
            }
            Key::Left if cursor > 0 => {
                self.cursor -= 1;
                return screen.push(b"\x08");
            }
            Key::Right if cursor < len => {
                self.cursor += 1;
                return screen.push(b"\x1b[C");
            }
            Key::Home => self.cursor = 0,
            Key::End => self.cursor = len,
            Key::Backspace if cursor > 0 => self.delete(cursor - 1, cursor),
            Key::Delete if cursor < len => self.delete(cursor, cursor + 1),
            Key::DeleteBefore => self.delete(0, cursor),
            Key::DeleteBehind => self.delete(cursor, len),
            Key::DeleteWord => self.delete(self.word(), cursor),
            Key::Earlier if self.back < self.history.len() => self.recall(self.back + 1),
            Key::Later if self.back > 0 => self.recall(self.back - 1),
            Key::Cancel => {
                screen.push(b"^C\r\n");
                self.delete(0, len);
                self.back = 0;
            }
            Key::Redraw | Key::Enter => {}
            _ => return screen.push(&[BELL]),
        }
        self.draw(screen);
    }

    /// Takes these bytes away; the cursor stands there then.
    fn delete(&mut self, start: usize, end: usize) {
        self.line.drain(start..end);
        self.cursor = start;
    }

    /// Where the word before the cursor starts.
    fn word(&self) -> usize {
        let before = &self.line[..self.cursor];
        let end = before.iter().rposition(|byte| *byte != b' ');
        let word = &before[..end.map_or(0, |last| last + 1)];
        let space = word.iter().rposition(|byte| *byte == b' ');
        space.map_or(0, |space| space + 1)
    }

    /// Shows the line that is so many lines `back`.
    fn recall(&mut self, back: usize) {
        if self.back == 0 {
            self.new = self.line.clone();
        }
        self.back = back;
        self.line = match self.history.len().checked_sub(back) {
            Some(index) if back > 0 => self.history[index].clone(),
            _ => self.new.clone(),
        };
        self.cursor = self.line.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A row of a terminal.
    #[derive(Default)]
    struct Screen {
        row: Vec<u8>,
        column: usize,
    }

    impl Screen {
        fn show(&mut self, bytes: &[u8]) {
            let mut bytes = bytes.iter().copied().peekable();
            while let Some(byte) = bytes.next() {
                match byte {
                    b'\r' => self.column = 0,
                    b'\n' => self.row.clear(),
                    0x08 => self.column -= 1,
                    BELL => {}
                    0x1b => {
                        assert_eq!(bytes.next(), Some(b'['));
                        let mut number = 0;
                        while let Some(digit @ b'0'..=b'9') = bytes.peek() {
                            number = number * 10 + usize::from(digit - b'0');
                            bytes.next();
                        }
                        match bytes.next() {
                            Some(b'K') => self.row.truncate(self.column),
                            Some(b'C') => self.column += number.max(1),
                            Some(b'D') => self.column -= number.max(1),
                            other => panic!("{other:?}"),
                        }
                    }
                    byte => {
                        self.row.resize(self.row.len().max(self.column + 1), b' ');
                        self.row[self.column] = byte;
                        self.column += 1;
                    }
                }
            }
        }
    }

    fn typed(editor: &mut Editor, keys: &[u8]) -> Vec<String> {
        let mut screen = Text::default();
        keys.iter()
            .filter_map(|key| editor.push(*key, &mut screen))
            .collect()
    }

    #[test]
    fn a_line_is_edited() {
        for (keys, line) in [
            (&b"vms\r"[..], "vms"),
            (b"vma\x7fs\r", "vms"),
            (b"vm\x1b[D\x1b[Dx\x1b[F-\r", "xvm-"),
            (b"bc\x1b[Ha\x1bOFd\x1b[1~\x1b[3~\r", "bcd"),
            (b"one two three\x17\x17\r", "one "),
            (b"abc\x1b[D\x15x\r", "xc"),
            (b"abc\x1b[D\x0bx\r", "abx"),
            (b"a\x1b[5~\x1b[1;5Cb\xff\x00\r", "ab"),
            (b"lost\x03kept\r", "kept"),
        ] {
            assert_eq!(typed(&mut Editor::default(), keys), [line], "{keys:x?}");
        }
    }

    #[test]
    fn return_and_line_feed_are_one_key() {
        let lines = typed(&mut Editor::default(), b"a\r\nb\n\nc\r");
        assert_eq!(lines, ["a", "b", "", "c"]);
    }

    #[test]
    fn earlier_lines_come_back() {
        let mut editor = Editor::default();
        typed(&mut editor, b"one\rtwo\rtwo\r \r");
        assert_eq!(typed(&mut editor, b"\x1b[A\x1b[A\x1b[A\r"), ["one"]);
        assert_eq!(
            typed(&mut editor, b"new\x1b[A\x1b[A\x1b[B\x1b[B\r"),
            ["new"]
        );
        for n in 0..2 * HISTORY {
            typed(&mut editor, format!("{n}\r").as_bytes());
        }
        let back = b"\x1b[A".repeat(3 * HISTORY);
        typed(&mut editor, &back);
        assert_eq!(typed(&mut editor, b"\r"), [HISTORY.to_string()]);
    }

    proptest! {
        /// Whatever is typed: the terminal shows the line, and the cursor where it is.
        #[test]
        fn the_screen_shows_the_line(
            keys in prop::collection::vec(prop_oneof![
                4 => prop::sample::select(&b"ab -\x7f\x08\x01\x05\x0b\x15\x17\x03\x0c\r"[..])
                    .prop_map(|key| vec![key]),
                4 => prop::sample::select(vec![&b"\x1b[A"[..], b"\x1b[B", b"\x1b[C", b"\x1b[D",
                    b"\x1b[H", b"\x1b[F", b"\x1b[3~"]).prop_map(<[u8]>::to_vec),
                1 => prop::collection::vec(any::<u8>(), 1..4),
                1 => Just(b"x".repeat(LONGEST)),
            ], 0..60)
        ) {
            let (mut editor, mut screen) = (Editor::default(), Screen::default());
            let mut text = Text::default();
            editor.draw(&mut text);
            for key in keys.iter().flatten() {
                if editor.push(*key, &mut text).is_some() {
                    editor.draw(&mut text);
                }
                let mut bytes = Vec::new();
                while let Some(byte) = text.pop() {
                    bytes.push(byte);
                }
                screen.show(&bytes);
                let expected = [PROMPT.as_bytes(), &editor.line].concat();
                prop_assert_eq!(&screen.row, &expected);
                prop_assert_eq!(screen.column, PROMPT.len() + editor.cursor);
                prop_assert!(editor.cursor <= editor.line.len());
            }
        }
    }
}
