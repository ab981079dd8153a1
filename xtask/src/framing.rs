//! The conversation with the scripts that `--exec` and piped input put into
//! the guest (`guest.rs`), carried by its console.
//!
//! The console also carries the firmware's, the hypervisor's and the kernel's
//! lines, so the scripts mark what is theirs. A marker is
//! `\x01vireo-NONCE-WORD\x01`; the nonce is random for each run, so neither an
//! older log nor the command's own output can be taken for one.
//!
//! | word | meaning |
//! | --- | --- |
//! | `init:N` | the guest's time-stamp counter when its first process began |
//! | `begin` | what follows is output, to be passed on byte by byte |
//! | `more` | the guest wants one line of input: base64 of up to [`BLOCK`] bytes, or `.` at the end |
//! | `end:N` | the shell has ended with status N |
//!
//! The guest asks for each piece of input, so the 16-byte receive FIFO and the
//! terminal buffer behind it never have to hold more than one line, however
//! slowly the guest reads.

/// The most bytes of input in one line. Its base64 form, 1024 bytes, fits into
/// the guest's terminal buffer (4096 bytes) with room to spare.
pub const BLOCK: usize = 768;

/// What the stream was found to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest's time-stamp counter when its first process began.
    Init(u64),
    /// The guest's shell is about to run.
    Begin,
    /// Output, to be passed on as it is.
    Output(Vec<u8>),
    /// The guest wants a line of input.
    More,
    /// The shell has ended with this status; nothing more of its output comes.
    End(i32),
}

/// Separates output from markers and from everything else on the console.
pub struct Framer {
    prefix: Vec<u8>,
    held: Vec<u8>,
    open: bool,
}

impl Framer {
    /// A framer for the markers that carry `nonce`.
    pub fn new(nonce: &str) -> Self {
        let prefix = format!("\x01vireo-{nonce}-").into_bytes();
        Self {
            prefix,
            held: Vec::new(),
            open: false,
        }
    }

    /// Takes the next bytes of the console, in pieces of any size.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Event> {
        self.held.extend_from_slice(bytes);
        let mut events = Vec::new();
        loop {
            let Some(start) = self.held.iter().position(|&byte| byte == 1) else {
                let all = std::mem::take(&mut self.held);
                self.output(all, &mut events);
                return events;
            };
            let before: Vec<u8> = self.held.drain(..start).collect();
            self.output(before, &mut events);
            let compared = self.prefix.len().min(self.held.len());
            if self.held[..compared] != self.prefix[..compared] {
                let stray = vec![self.held.remove(0)];
                self.output(stray, &mut events);
                continue;
            }
            let word = &self.held[compared..];
            let Some(length) = word.iter().position(|&byte| byte == 1) else {
                return events;
            };
            let event = parse(&word[..length]);
            self.held.drain(..compared + length + 1);
            match event {
                Some(Event::Begin) => self.open = true,
                Some(Event::End(_)) => self.open = false,
                _ => {}
            }
            events.extend(event);
        }
    }

    fn output(&self, bytes: Vec<u8>, events: &mut Vec<Event>) {
        if !self.open || bytes.is_empty() {
            return;
        }
        if let Some(Event::Output(last)) = events.last_mut() {
            last.extend_from_slice(&bytes);
        } else {
            events.push(Event::Output(bytes));
        }
    }
}

fn parse(word: &[u8]) -> Option<Event> {
    match std::str::from_utf8(word).ok()? {
        "begin" => Some(Event::Begin),
        "more" => Some(Event::More),
        word => match word.split_once(':')? {
            ("init", ticks) => ticks.parse().ok().map(Event::Init),
            ("end", status) => status.parse().ok().map(Event::End),
            _ => None,
        },
    }
}

/// The line that carries `block`, which is not longer than [`BLOCK`]; `None`
/// is the end of the input.
pub fn input_line(block: Option<&[u8]>) -> Vec<u8> {
    match block {
        Some(block) => base64(block) + "\n",
        None => ".\n".into(),
    }
    .into_bytes()
}

/// RFC 4648 base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let mut word = [0; 4];
        word[1..=group.len()].copy_from_slice(group);
        let word = u32::from_be_bytes(word);
        for digit in 0..4 {
            if digit <= group.len() {
                let index = word >> (18 - 6 * digit) & 0x3f;
                text.push(char::from(ALPHABET[index as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"BdsDxe: loading\r\n\x01vireo-old-end:9\x01\x01vireo-77-init:00042\x01\x01vireo-77-begin\x01one\n\
        \x01two\x01vireo-77-more\x01\x01vireo-7\x01vireo-77-end:42\x01vireo: vm a: powered off\r\n";

    fn expected() -> Vec<Event> {
        vec![
            Event::Init(42),
            Event::Begin,
            Event::Output(b"one\n\x01two".to_vec()),
            Event::More,
            Event::Output(b"\x01vireo-7".to_vec()),
            Event::End(42),
        ]
    }

    #[test]
    fn markers_are_separated_from_output() {
        assert_eq!(Framer::new("77").push(STREAM), expected());
    }

    #[test]
    fn the_size_of_the_pieces_does_not_matter() {
        for size in 1..STREAM.len() {
            let mut framer = Framer::new("77");
            let mut events: Vec<Event> = Vec::new();
            for event in STREAM.chunks(size).flat_map(|piece| framer.push(piece)) {
                match (events.last_mut(), event) {
                    (Some(Event::Output(last)), Event::Output(more)) => last.extend(more),
                    (_, event) => events.push(event),
                }
            }
            assert_eq!(events, expected(), "in pieces of {size} bytes");
        }
    }

    #[test]
    fn output_is_not_held_back_longer_than_needed() {
        let mut framer = Framer::new("77");
        framer.push(b"\x01vireo-77-begin\x01");
        assert_eq!(
            framer.push(b"prompt: "),
            [Event::Output(b"prompt: ".to_vec())]
        );
    }

    #[test]
    fn base64_agrees_with_the_vectors_of_rfc_4648() {
        let vectors = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, coded) in vectors {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(input_line(Some(&[0xff; 3])), b"////\n");
        assert_eq!(input_line(None), b".\n");
    }
}
