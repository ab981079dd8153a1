//! Whose console the operator's line is on: pure logic.
//!
//! [`ESCAPE`] begins a key for us, everything else is for whoever has the line:
//!
//! | behind Ctrl-T | what it does |
//! | --- | --- |
//! | a digit from 1 | the console of the guest with that number |
//! | `n` | that of the next guest that runs |
//! | `p`, `0` | the hypervisor's prompt |
//! | Ctrl-T | sends one Ctrl-T |
//!
//! A break on the line is Ctrl-T p, also where a guest that does not read keeps the line from
//! sending keys.
//!
//! The first guest that starts gets the line, and when it has ended, one that runs or
//! that starts then.

use super::Text;
use super::commands::Wait;
use super::editor::Editor;
use crate::vm::console::ConsolePort;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arrayvec::ArrayVec;
use core::fmt::Write;

/// Ctrl-T.
pub const ESCAPE: u8 = 0x14;

/// The line is given so many bytes at most, so that it is soon on another console; less than
/// it has space for.
pub const FILL: usize = 256;
/// While so many bytes of answers wait, what is typed waits too.
const ENOUGH_TEXT: usize = 4096;
/// So many bytes may be typed while a command waits.
const TYPED_AHEAD: usize = 1024;
/// Ctrl-C: no longer waits.
const CANCEL: u8 = 0x03;

/// The operator's serial line.
pub trait Line {
    /// The next byte that was typed.
    fn read(&mut self) -> Option<u8>;
    /// How many bytes wait to be sent.
    fn queued(&self) -> usize;
    /// How many bytes more it takes.
    fn space(&self) -> usize;
    /// Sends `bytes`, for which there is space.
    fn write(&mut self, bytes: &[u8]);
    /// Whether it will have itself served again, since it is sending.
    fn is_busy(&self) -> bool;
    /// Whether whoever types is to wait.
    fn hold(&mut self, on: bool);
    /// Whether there was a break since the last call.
    fn take_break(&mut self) -> bool;
}

/// Who answers the prompt's commands.
pub trait Commands {
    /// The answer to `line`, in whole lines; what the next line waits for.
    fn answer(&self, line: &str, out: &mut Text) -> Option<Wait>;
    /// Whether that has come; then the rest of the answer.
    fn is_over(&self, wait: Wait, out: &mut Text) -> bool;
}

/// Who has the line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Focus {
    /// No guest has started yet. What is typed waits.
    #[default]
    Nobody,
    Prompt,
    /// The guest with this index.
    Guest(usize),
}

struct Guest {
    name: String,
    /// None where that is on another line.
    port: Option<Arc<ConsolePort>>,
    runs: bool,
}

/// All consoles, and who has the line.
#[derive(Default)]
pub struct Multiplexer {
    guests: Vec<Guest>,
    focus: Focus,
    /// The line is a guest's: no key is ours.
    raw: bool,
    /// The last byte was [`ESCAPE`].
    escaped: bool,
    editor: Editor,
    /// What the last command waits for; what is typed for the prompt meanwhile.
    waits: Option<Wait>,
    typed_ahead: VecDeque<u8>,
    /// Goes out before anything of a guest's.
    text: Text,
}

impl Multiplexer {
    /// Without any guest.
    pub const fn new() -> Self {
        Self {
            guests: Vec::new(),
            focus: Focus::Nobody,
            raw: false,
            escaped: false,
            editor: Editor::new(),
            waits: None,
            typed_ahead: VecDeque::new(),
            text: Text::new(),
        }
    }

    /// For the line of one guest, whom all bytes are for.
    pub const fn raw() -> Self {
        let mut new = Self::new();
        new.raw = true;
        new
    }

    /// Adds the console of a guest, or its number where that is on another line. Its index; the
    /// operator's number is one more.
    pub fn add(&mut self, name: String, port: Option<Arc<ConsolePort>>) -> usize {
        let runs = false;
        self.guests.push(Guest { name, port, runs });
        self.guests.len() - 1
    }

    /// Guest `index` starts. It gets the line from a guest that has ended, which is told where
    /// there are several.
    pub fn started(&mut self, index: usize) {
        if let Some(guest) = self.guests.get_mut(index) {
            guest.runs = true;
        }
        let is_free = self.port(index).is_some()
            && match self.focus {
                Focus::Nobody => true,
                Focus::Prompt => false,
                Focus::Guest(other) => !self.guests[other].runs,
            };
        if is_free && self.guests.len() > 1 {
            self.switch(Focus::Guest(index));
        } else if is_free {
            self.focus_on(Focus::Guest(index));
        }
    }

    /// Guest `index` has ended. If it had the line, the next that runs gets it.
    pub fn ended(&mut self, index: usize) {
        if let Some(guest) = self.guests.get_mut(index) {
            guest.runs = false;
        }
        if self.focus == Focus::Guest(index)
            && let Some(next) = self.next()
        {
            self.switch(Focus::Guest(next));
        }
    }

    /// Moves what can be moved. Bounded: by what was typed, what the line takes, and what
    /// the commands say, of which `ENOUGH_TEXT` holds back the next.
    pub fn serve(&mut self, line: &mut impl Line, commands: &impl Commands) {
        if line.take_break() && !self.raw {
            self.escaped = false;
            self.cancel();
            self.switch(Focus::Prompt);
        }
        self.wait(commands);
        while self.takes_keys() {
            let ahead = match self.focus {
                Focus::Prompt if self.waits.is_none() => self.typed_ahead.pop_front(),
                _ => None,
            };
            let Some(byte) = ahead.or_else(|| line.read()) else {
                break;
            };
            self.typed(byte, commands);
            self.wait(commands);
        }
        line.hold(match self.focus {
            Focus::Guest(index) => self.port(index).is_some_and(|port| port.holds()),
            _ => false,
        });
        self.fill(line);
    }

    /// Shows a line of the log, without its end; false where there is no room for all of it.
    pub fn log(&mut self, message: &str, line: &mut impl Line) -> bool {
        let needed = message.len() + 2;
        if self.focus != Focus::Prompt && self.text.is_empty() {
            let fits = line.space() >= needed;
            if fits {
                line.write(message.as_bytes());
                line.write(b"\r\n");
            }
            return fits;
        }
        if self.text.space() < needed + FILL {
            return false;
        }
        let at_prompt = self.focus == Focus::Prompt;
        if at_prompt {
            self.text.push(b"\r\x1b[K");
        }
        self.text.push(message.as_bytes());
        self.text.push(b"\r\n");
        self.draw();
        self.fill(line);
        true
    }

    /// Whether the line has taken all that it is to show but what guests send.
    pub fn is_said(&self) -> bool {
        self.text.is_empty()
    }

    /// Whether there is somebody for what is typed, and room for what comes of it.
    fn takes_keys(&self) -> bool {
        let is_full = self.waits.is_some() && self.typed_ahead.len() >= TYPED_AHEAD;
        match self.focus {
            Focus::Nobody => false,
            Focus::Prompt if is_full => false,
            _ => self.text.len() < ENOUGH_TEXT,
        }
    }

    /// No longer waits for a command.
    fn cancel(&mut self) {
        self.waits = None;
        self.typed_ahead.clear();
    }

    /// Goes on with the prompt when the last command is over.
    fn wait(&mut self, commands: &impl Commands) {
        let text = &mut self.text;
        if self.waits.is_some_and(|wait| commands.is_over(wait, text)) {
            self.waits = None;
            self.draw();
        }
    }

    /// Shows the prompt again, where it is to be seen.
    fn draw(&mut self) {
        if self.focus == Focus::Prompt && self.waits.is_none() {
            self.editor.draw(&mut self.text);
        }
    }

    fn typed(&mut self, byte: u8, commands: &impl Commands) {
        if core::mem::take(&mut self.escaped) {
            return self.command_key(byte);
        }
        match self.focus {
            _ if byte == ESCAPE && !self.raw => self.escaped = true,
            Focus::Nobody => {}
            Focus::Prompt if self.waits.is_some() && byte == CANCEL => {
                self.cancel();
                self.draw();
            }
            Focus::Prompt if self.waits.is_some() => self.typed_ahead.push_back(byte),
            Focus::Prompt => {
                if let Some(line) = self.editor.push(byte, &mut self.text) {
                    self.waits = commands.answer(&line, &mut self.text);
                    if self.waits.is_none() {
                        self.draw();
                    }
                }
            }
            // Where nobody waits because of `Line::hold`, this is lost, as with a UART.
            Focus::Guest(index) => {
                self.port(index).map(|port| port.type_in(byte));
            }
        }
    }

    fn command_key(&mut self, key: u8) {
        match (key, self.focus) {
            (b'1'..=b'9', _) => {
                let number = key - b'0';
                let index = usize::from(number - 1);
                match self.guests.get(index) {
                    Some(Guest { port: Some(_), .. }) => self.switch(Focus::Guest(index)),
                    Some(Guest { name, .. }) => {
                        let name = name.clone();
                        self.say(format_args!(
                            "the console of {name} is the second serial port"
                        ));
                    }
                    None => self.say(format_args!("there is no guest {number}")),
                }
            }
            (b'n' | b'N', _) => match self.next() {
                Some(next) => self.switch(Focus::Guest(next)),
                None => self.say(format_args!("no guest runs")),
            },
            (b'p' | b'P' | b'0', _) => self.switch(Focus::Prompt),
            (ESCAPE, Focus::Guest(index)) => {
                self.port(index).map(|port| port.type_in(ESCAPE));
            }
            _ => self.say(format_args!(
                "behind Ctrl-T: 1 to 9 or n (a guest's console), p or 0 (the prompt), Ctrl-T"
            )),
        }
    }

    /// The next guest that runs, behind the one that has the line; the first one from the prompt.
    fn next(&self) -> Option<usize> {
        let first = match self.focus {
            Focus::Guest(index) => index + 1,
            _ => 0,
        };
        let all = 0..self.guests.len();
        all.clone()
            .cycle()
            .skip(first)
            .take(all.len())
            .find(|index| self.guests[*index].runs && self.port(*index).is_some())
    }

    /// The console of a guest that has it here.
    fn port(&self, index: usize) -> Option<&ConsolePort> {
        self.guests.get(index)?.port.as_deref()
    }

    fn focus_on(&mut self, focus: Focus) {
        for (to, on) in [(self.focus, false), (focus, true)] {
            if let Focus::Guest(index) = to
                && let Some(port) = self.port(index)
            {
                port.show(on);
            }
        }
        self.focus = focus;
    }

    /// Gives the line to somebody else, and says so.
    fn switch(&mut self, focus: Focus) {
        self.focus_on(focus);
        let text = &mut self.text;
        // A queue takes everything.
        let _ = match focus {
            Focus::Guest(index) => {
                let Guest { name, runs, .. } = &self.guests[index];
                let (number, state) = (index + 1, if *runs { "" } else { ", which does not run" });
                writeln!(text, "\nvireo: console {number}: {name}{state}")
            }
            _ => writeln!(
                text,
                "\nvireo: console 0: the hypervisor's prompt; help lists its commands"
            ),
        };
        self.draw();
    }

    /// Tells the operator something, whoever has the line.
    fn say(&mut self, what: core::fmt::Arguments<'_>) {
        // As above.
        let _ = writeln!(self.text, "\nvireo: {what}");
        self.draw();
    }

    /// Gives the line what there is for it.
    fn fill(&mut self, line: &mut impl Line) {
        loop {
            self.fill_once(line);
            let Focus::Guest(index) = self.focus else {
                return;
            };
            // The guest may have sent more in between, and left it to a line that was busy.
            let busy = line.is_busy();
            if !self.port(index).is_some_and(|port| port.settle(busy)) {
                return;
            }
        }
    }

    fn fill_once(&mut self, line: &mut impl Line) {
        loop {
            // Seldom and much is cheaper than often and little.
            let queued = line.queued();
            if queued > FILL / 2 {
                return;
            }
            let room = FILL - queued;
            let mut bytes = ArrayVec::<u8, FILL>::new();
            while bytes.len() < room
                && let Some(byte) = self.text.pop()
            {
                bytes.push(byte);
            }
            if let Focus::Guest(index) = self.focus {
                let room = room - bytes.len();
                if let Some(port) = self.port(index) {
                    port.take(room, |byte| bytes.push(byte));
                }
            }
            if !bytes.is_empty() {
                line.write(&bytes);
            }
            if bytes.len() < room {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
