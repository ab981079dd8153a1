//! The user's terminal while it is the guest's console.

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{Stdin, Write, stderr, stdin};

/// What starts a command to us instead of going to the guest: Ctrl-].
const ESCAPE: u8 = 0x1d;

/// The line that tells the user how to leave.
pub const HINT: &str = "connected to the guest's console; to leave: Ctrl-] then q";

/// The same for the hypervisor's prompt.
pub const PROMPT_HINT: &str = "Vireo's own prompt: Ctrl-T then p; back to a guest: Ctrl-T then 1";

/// Raw mode, until dropped.
pub struct Raw {
    before: Termios,
    input: Stdin,
    /// The terminal has a title.
    titled: bool,
}

impl Raw {
    /// Puts standard input's terminal into raw mode.
    ///
    /// # Errors
    /// When it is no terminal.
    pub fn enter() -> Result<Self> {
        let input = stdin();
        let before = tcgetattr(&input).context("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&input, SetArg::TCSANOW, &raw)
            .context("cannot put the terminal into raw mode")?;
        let name = std::env::var("TERM").unwrap_or_default();
        let titled = !["", "dumb", "linux"].contains(&name.as_str());
        if titled {
            command("\x1b[22;0t");
        }
        Ok(Self {
            before,
            input,
            titled,
        })
    }
}

impl Raw {
    /// Sets the terminal's title, where it has one, until this is dropped.
    pub fn title(&self, title: &str) {
        if self.titled {
            let plain: String = title.chars().filter(|c| !c.is_control()).collect();
            command(&format!("\x1b]0;{plain}\x07"));
        }
    }
}

/// A command to the terminal (ECMA-48, and xterm's for titles). One that is lost is no harm.
fn command(sequence: &str) {
    let mut terminal = stderr();
    let _ = terminal.write_all(sequence.as_bytes());
}

impl Drop for Raw {
    fn drop(&mut self) {
        if self.titled {
            command("\x1b[23;0t");
        }
        let _ = tcsetattr(&self.input, SetArg::TCSADRAIN, &self.before);
    }
}

/// Separates the keys for us from those for the guest.
#[derive(Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// Takes what was typed and returns what goes to the guest; `None` means
    /// that the user leaves. The escape key typed twice goes to the guest
    /// once; before any other key it is dropped with that key.
    pub fn push(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut forwarded = Vec::with_capacity(typed.len());
        for &key in typed {
            match (self.escaped, key) {
                (true, b'q' | b'Q') => return None,
                (true, ESCAPE) => forwarded.push(ESCAPE),
                (false, ESCAPE) => {
                    self.escaped = true;
                    continue;
                }
                (false, key) => forwarded.push(key),
                (true, _) => {}
            }
            self.escaped = false;
        }
        Some(forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_escape_key_and_q_leave() {
        let mut keys = Keys::default();
        assert_eq!(keys.push(b"quit\x03\x1d"), Some(b"quit\x03".to_vec()));
        assert_eq!(keys.push(b"\x1da"), Some(b"\x1da".to_vec()));
        assert_eq!(keys.push(b"\x1dx"), Some(vec![]));
        assert_eq!(keys.push(b"\x1d"), Some(vec![]));
        assert_eq!(keys.push(b"q"), None);
    }
}
