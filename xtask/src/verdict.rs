//! What the hypervisor's own lines on the serial console say.
//!
//! Each of its lines starts with `vireo: `; some are verdicts on a guest or on
//! the hypervisor itself. A guest can print such a line too, so a verdict is
//! believed only together with the end of the machine.

use crate::figures::Memory;

/// The start of every line of the hypervisor and its loader.
pub const PREFIX: &str = "vireo: ";

/// What it says of a guest before the code that it has ended with.
const EXITED: &str = "ended with code ";

/// The longest line that is looked at, in bytes; the rest of it is ignored.
const LONGEST: usize = 4096;

/// A verdict line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The guest has powered itself off, or the operator has stopped it.
    PoweredOff { vm: String },
    /// The guest has asked for a reset, which ends it.
    Reset { vm: String },
    /// The guest has ended its machine with a code (port 0xf4).
    Exited { vm: String, code: u32 },
    /// The hypervisor has stopped the guest.
    Stopped { vm: String, reason: String },
    /// The loader or the hypervisor cannot go on: one sentence.
    Error(String),
    /// The hypervisor has panicked: what it says about itself.
    Panic(String),
}

impl Verdict {
    /// The verdict in `line`, if it is one.
    pub fn parse(line: &str) -> Option<Self> {
        let text = line.trim_end().strip_prefix(PREFIX)?;
        if let Some(sentence) = text.strip_prefix("error: ") {
            return Some(Self::Error(sentence.into()));
        }
        if let Some(sentence) = text.strip_prefix("panic: ") {
            return Some(Self::Panic(sentence.into()));
        }
        let (vm, what) = text.strip_prefix("vm ")?.split_once(": ")?;
        let vm = vm.to_owned();
        match what {
            "powered off" | "stopped by the operator" => Some(Self::PoweredOff { vm }),
            "reset" => Some(Self::Reset { vm }),
            _ if what.starts_with(EXITED) => Some(Self::Exited {
                vm,
                code: what.strip_prefix(EXITED)?.parse().ok()?,
            }),
            _ => Some(Self::Stopped {
                vm,
                reason: what.strip_prefix("stopped: ")?.into(),
            }),
        }
    }

    /// Whether it says that this guest has ended, or could not start.
    pub fn is_end_of(&self, name: &str) -> bool {
        match self {
            Self::PoweredOff { vm }
            | Self::Exited { vm, .. }
            | Self::Reset { vm }
            | Self::Stopped { vm, .. } => vm == name,
            Self::Error(sentence) => sentence.starts_with(&format!("vm {name}: ")),
            Self::Panic(_) => false,
        }
    }

    /// The sentence for the user, where this is not the end that one hopes for.
    pub fn failure(&self) -> Option<String> {
        match self {
            Self::PoweredOff { .. } | Self::Exited { .. } => None,
            Self::Reset { vm } => Some(format!("the guest {vm} has reset its machine")),
            Self::Stopped { vm, reason } => Some(format!("the guest {vm} was stopped: {reason}")),
            Self::Error(sentence) => Some(sentence.clone()),
            Self::Panic(sentence) => Some(format!("the hypervisor has panicked: {sentence}")),
        }
    }
}

/// Collects lines from a byte stream and keeps the verdicts among them.
#[derive(Default)]
pub struct Watcher {
    line: Vec<u8>,
    /// The verdicts so far, in their order.
    pub verdicts: Vec<Verdict>,
    /// The hypervisor's lines after the last panic: registers and backtrace.
    pub aftermath: Vec<String>,
    /// The first line, and whether it came a second time: the machine has restarted.
    first: Option<String>,
    pub restarted: bool,
    /// How much memory the hypervisor says that it and the guests have.
    pub memory: Option<Memory>,
    /// What it says of guests whose exits were timed, without [`PREFIX`].
    pub exits: Vec<String>,
    /// The next lines belong to that, too.
    within_exits: bool,
}

impl Watcher {
    /// Takes the next bytes and returns the lines of the hypervisor that they
    /// complete, without their ends.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                if self.line.len() < LONGEST {
                    self.line.push(byte);
                }
                continue;
            }
            lines.extend(self.take_line());
        }
        lines
    }

    /// The stream has ended: takes what may be an incomplete line.
    pub fn end(&mut self) {
        self.take_line();
    }

    /// Looks at the line that is complete now; returns it if it is the hypervisor's.
    fn take_line(&mut self) -> Option<String> {
        let text = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        // The firmware leaves escape sequences before the first line, and a
        // guest that dies in the middle of a line leaves its beginning.
        let text = text[text.find(PREFIX)?..].trim_end().to_owned();
        // The first line of its kind: guests come after it.
        self.memory = self.memory.or_else(|| Memory::parse(&text));
        if let Some(verdict) = Verdict::parse(&text) {
            self.aftermath.clear();
            self.verdicts.push(verdict);
        } else if let Some(Verdict::Panic(_)) = self.verdicts.last() {
            self.aftermath.push(text.clone());
        }
        self.take_exits(&text);
        self.restarted |= self.first.as_ref() == Some(&text);
        self.first.get_or_insert_with(|| text.clone());
        Some(text)
    }

    /// Keeps a table of exits: `vm NAME: TICKS ticks in root mode, ...`, and the lines from
    /// there to the next about a guest.
    fn take_exits(&mut self, line: &str) {
        let text = &line[PREFIX.len()..];
        if text.starts_with("vm ") {
            self.within_exits = text.contains(" ticks in root mode, ");
        }
        if self.within_exits {
            self.exits.push(text.to_owned());
        }
    }

    /// The exit status that the first guest which has ended with a code asks for: that of
    /// QEMU with its device `isa-debug-exit`, which is odd.
    pub fn exit_status(&self) -> Option<u8> {
        self.verdicts.iter().find_map(|verdict| match verdict {
            Verdict::Exited { code, .. } => Some((code << 1) as u8 | 1),
            _ => None,
        })
    }

    /// The worst thing that was said: a panic before an error, an error before
    /// a guest's end.
    pub fn failure(&self) -> Option<String> {
        let rank = |verdict: &&Verdict| match verdict {
            Verdict::Panic(_) => 3,
            Verdict::Error(_) => 2,
            Verdict::Stopped { .. } => 1,
            _ => 0,
        };
        self.verdicts
            .iter()
            .filter(|verdict| verdict.failure().is_some())
            .max_by_key(rank)?
            .failure()
    }
}

/// Keeps the hypervisor's last lines from a job's output. They look like
/// lines of the guest's, but nothing of the guest follows them: so what starts
/// like them is held until something else follows, or the job's end.
#[derive(Default)]
pub struct Tail {
    held: Vec<u8>,
    /// What was passed on last is the beginning of a line.
    within_line: bool,
}

impl Tail {
    /// Takes the next output and returns what can be passed on.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(bytes);
        let prefix = PREFIX.as_bytes();
        let mut suspect = None;
        let mut at = 0;
        for line in self.held.split_inclusive(|&byte| byte == b'\n') {
            let alike = line.starts_with(prefix) || prefix.starts_with(line);
            if alike && !(at == 0 && self.within_line) {
                suspect.get_or_insert(at);
            } else {
                suspect = None;
            }
            at += line.len();
        }
        let passed: Vec<u8> = self.held.drain(..suspect.unwrap_or(at)).collect();
        if let Some(last) = passed.last() {
            self.within_line = *last != b'\n';
        }
        passed
    }

    /// The job has ended by itself: the rest was its output.
    pub fn end(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

/// Keeps the hypervisor's lines about other guests from the console of one: they come
/// wherever that one's output is, each whole, from [`PREFIX`] to the end of the line.
#[derive(Default)]
pub struct Interjections {
    /// What such lines begin with.
    starts: Vec<Vec<u8>>,
    held: Vec<u8>,
    within: bool,
}

impl Interjections {
    /// For the console of a guest beside these `others`.
    pub fn new(others: &[String]) -> Self {
        let kinds = |vm: &String| {
            ["", "error: "].map(|kind| format!("{PREFIX}{kind}vm {vm}: ").into_bytes())
        };
        Self {
            starts: others.iter().flat_map(kinds).collect(),
            ..Self::default()
        }
    }

    /// Takes the next bytes and returns those that are the guest's.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        if self.starts.is_empty() {
            return bytes.to_vec();
        }
        let mut passed = Vec::new();
        for &byte in bytes {
            if self.within {
                self.within = byte != b'\n';
                continue;
            }
            self.held.push(byte);
            while !self.held.is_empty() && !self.may_start() {
                passed.push(self.held.remove(0));
            }
            if self.starts.contains(&self.held) {
                self.held.clear();
                self.within = true;
            }
        }
        passed
    }

    fn may_start(&self) -> bool {
        self.starts
            .iter()
            .any(|start| start.starts_with(&self.held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_the_hypervisor_are_no_output() {
        let text =
            b"a vireo: 1\nvireo: mine\nvi\nb\nvireo: vm a: 2 exits\r\nvireo: vm a: reset\r\n";
        let guests = "a vireo: 1\nvireo: mine\nvi\nb\n";
        for size in 1..text.len() {
            let mut tail = Tail::default();
            let passed: Vec<u8> = text
                .chunks(size)
                .flat_map(|piece| tail.push(piece))
                .collect();
            assert_eq!(
                String::from_utf8_lossy(&passed),
                guests,
                "in pieces of {size}"
            );
            assert_eq!(guests.len() + tail.end().len(), text.len());
        }
    }

    #[test]
    fn lines_about_others_are_no_output() {
        let text =
            b"onvireo: vm b: started, 64 MiB\r\ne vireo: vm a: vi\nvireo: error: vm b: no\r\nvireo";
        for size in 1..text.len() {
            let mut lines = Interjections::new(&["b".into(), "c".into()]);
            let pieces = text.chunks(size);
            let passed: Vec<u8> = pieces.flat_map(|piece| lines.push(piece)).collect();
            assert_eq!(
                String::from_utf8_lossy(&passed),
                "one vireo: vm a: vi\n",
                "in pieces of {size}"
            );
        }
        assert_eq!(Interjections::new(&[]).push(b"vireo: vm"), b"vireo: vm");
    }

    #[test]
    fn verdict_lines_are_recognized() {
        let vm = String::from("guest");
        assert_eq!(
            Verdict::parse("vireo: vm guest: powered off\r"),
            Some(Verdict::PoweredOff { vm: vm.clone() })
        );
        assert_eq!(
            Verdict::parse("vireo: vm guest: reset"),
            Some(Verdict::Reset { vm: vm.clone() })
        );
        assert_eq!(
            Verdict::parse("vireo: vm guest: stopped: triple fault at 0x1000"),
            Some(Verdict::Stopped {
                vm: vm.clone(),
                reason: "triple fault at 0x1000".into()
            })
        );
        assert_eq!(
            Verdict::parse("vireo: error: no VT-x"),
            Some(Verdict::Error("no VT-x".into()))
        );
        let code = 0x8765_4321;
        assert_eq!(
            Verdict::parse("vireo: vm guest: ended with code 2271560481\r"),
            Some(Verdict::Exited { vm, code })
        );
        assert_eq!(Verdict::parse("vireo: vm guest: ended with code x"), None);
        assert_eq!(
            Verdict::parse("vireo: vm a: stopped by the operator"),
            Some(Verdict::PoweredOff { vm: "a".into() })
        );
        assert_eq!(Verdict::parse("vireo: vm guest: 2 vCPUs"), None);
        assert_eq!(Verdict::parse("error: no VT-x"), None);
    }

    #[test]
    fn the_worst_verdict_wins_and_a_panic_keeps_its_backtrace() {
        let mut watcher = Watcher::default();
        let text = b"\x1b[2Jvireo: vm a: stopped: triple fault\r\nnoise\r\nvireo: panic: here\r\nvireo:   at 0x10\r\nvireo: vm b: reset\r";
        for byte in text {
            watcher.push(&[*byte]);
        }
        assert_eq!(
            watcher.failure(),
            Some("the hypervisor has panicked: here".into())
        );
        assert_eq!(watcher.aftermath, ["vireo:   at 0x10"]);
        assert_eq!(watcher.push(b"\n"), ["vireo: vm b: reset"]);
        assert_eq!(
            watcher.failure(),
            Some("the hypervisor has panicked: here".into())
        );
    }

    #[test]
    fn a_code_makes_an_odd_exit_status() {
        for (code, status) in [(0, 1), (1, 3), (0x10, 0x21), (0x87, 0x0f)] {
            let mut watcher = Watcher::default();
            watcher.push(format!("vireo: vm a: ended with code {code}\r\n").as_bytes());
            assert_eq!(
                (watcher.exit_status(), watcher.failure()),
                (Some(status), None)
            );
        }
        assert_eq!(Watcher::default().exit_status(), None);
    }

    #[test]
    fn the_first_line_comes_again_when_the_machine_restarts() {
        let mut watcher = Watcher::default();
        watcher.push(b"vireo: loader: kernel, 1 KiB\r\nvireo: loader: initrd\r\nvireo: hello\r\n");
        assert!(!watcher.restarted);
        watcher.push(b"\x1b[2JBdsDxe: starting\r\n\x1b[0mvireo: loader: kernel, 1 KiB\r\n");
        assert!(watcher.restarted);
    }

    #[test]
    fn a_table_of_exits_is_kept() {
        let mut watcher = Watcher::default();
        watcher.push(b"vireo: vm a: 5 exits: HLT 5\r\n");
        assert!(watcher.exits.is_empty());
        let table = "vm a: 70 ticks in root mode, of 9 a second\nreason  count\nHLT         5\n";
        for line in table.lines() {
            watcher.push(format!("vireo: {line}\r\n").as_bytes());
        }
        watcher.push(b"vireo: vm a: powered off\r\nvireo: more\r\n");
        assert_eq!(watcher.exits, Vec::from_iter(table.lines()));
    }

    #[test]
    fn a_good_end_is_no_failure() {
        let mut watcher = Watcher::default();
        watcher.push(b"vireo: vm a: powered off");
        watcher.end();
        assert_eq!(watcher.failure(), None);
        assert_eq!(watcher.verdicts.len(), 1);
    }
}
