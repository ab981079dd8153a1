use super::*;
use crate::vm::console::OUTPUT;
use proptest::prelude::*;
use std::collections::VecDeque;

/// A line that sends when it is told to.
#[derive(Default)]
struct Wire {
    typed: VecDeque<u8>,
    queue: VecDeque<u8>,
    sent: Vec<u8>,
    held: bool,
    has_break: bool,
}

const SPACE: usize = 1024;

impl Line for Wire {
    fn read(&mut self) -> Option<u8> {
        self.typed.pop_front()
    }

    fn queued(&self) -> usize {
        self.queue.len()
    }

    fn space(&self) -> usize {
        SPACE - self.queue.len()
    }

    fn write(&mut self, bytes: &[u8]) {
        self.queue.extend(bytes);
        assert!(self.queue.len() <= SPACE);
    }

    fn is_busy(&self) -> bool {
        !self.queue.is_empty()
    }

    fn hold(&mut self, on: bool) {
        self.held = on;
    }

    fn take_break(&mut self) -> bool {
        std::mem::take(&mut self.has_break)
    }
}

/// Says what it was asked. What begins with "wait" takes until somebody says that it is over.
#[derive(Default)]
struct Echo {
    over: bool,
}

impl Commands for Echo {
    fn answer(&self, line: &str, out: &mut Text) -> Option<Wait> {
        let _ = writeln!(out, "asked: {line}");
        line.starts_with("wait").then_some(Wait::Steered(0))
    }

    fn is_over(&self, _: Wait, _: &mut Text) -> bool {
        self.over
    }
}

#[derive(Default)]
struct Desk {
    multiplexer: Multiplexer,
    wire: Wire,
    commands: Echo,
    ports: Vec<Arc<ConsolePort>>,
}

impl Desk {
    fn with(names: &[&str]) -> Self {
        let mut desk = Self::default();
        for name in names {
            let port = Arc::new(ConsolePort::new());
            desk.multiplexer
                .add((*name).into(), Some(Arc::clone(&port)));
            desk.ports.push(port);
        }
        desk
    }

    fn running(names: &[&str]) -> Self {
        let mut desk = Self::with(names);
        (0..names.len()).for_each(|index| desk.multiplexer.started(index));
        desk.serve();
        desk.shown();
        desk
    }

    fn serve(&mut self) {
        self.multiplexer.serve(&mut self.wire, &self.commands);
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.wire.typed.extend(keys);
        self.serve();
    }

    /// As a guest's CPU does it; how many bytes there was room for.
    fn send(&mut self, index: usize, bytes: &[u8]) -> usize {
        let mut left = bytes.iter().copied();
        if self.ports[index].send(left.by_ref()) {
            self.serve();
        }
        bytes.len() - left.len()
    }

    /// The transmitter takes so many bytes, and interrupts.
    fn transmit(&mut self, count: usize) {
        let count = count.min(self.wire.queue.len());
        self.wire.sent.extend(self.wire.queue.drain(..count));
        self.serve();
    }

    /// What comes out until the line is quiet.
    fn shown(&mut self) -> String {
        while !self.wire.queue.is_empty() {
            self.transmit(16);
        }
        String::from_utf8(std::mem::take(&mut self.wire.sent)).unwrap()
    }

    fn read(&self, index: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.ports[index].receive(|byte| {
            bytes.push(byte);
            true
        });
        bytes
    }
}

#[test]
fn a_single_guest_has_a_raw_line() {
    let mut desk = Desk::with(&["a"]);
    desk.type_in(b"early ");
    desk.multiplexer.started(0);
    desk.type_in(b"\x03\x1b[A\xff");
    assert_eq!(desk.read(0), b"early \x03\x1b[A\xff");
    desk.send(0, b"\x1b[2J\x00text");
    assert!(desk.multiplexer.log("vireo: said", &mut desk.wire));
    desk.multiplexer.ended(0);
    assert_eq!(desk.shown(), "\x1b[2J\0textvireo: said\r\n");
}

#[test]
fn one_after_another_each_has_the_line() {
    let mut desk = Desk::with(&["a", "b"]);
    desk.multiplexer.started(0);
    desk.send(0, b"one ");
    desk.multiplexer.ended(0);
    desk.multiplexer.started(1);
    desk.send(1, b"two");
    let told = |number, name| format!("\r\nvireo: console {number}: {name}\r\n");
    assert_eq!(
        desk.shown(),
        [told(1, "a"), "one ".into(), told(2, "b"), "two".into()].concat()
    );
}

#[test]
fn the_line_goes_from_guest_to_guest() {
    let mut desk = Desk::running(&["a", "b"]);
    desk.send(0, b"one");
    desk.send(1, b"two");
    assert_eq!(desk.shown(), "one");
    desk.type_in(b"x\x142y");
    assert_eq!(desk.shown(), "\r\nvireo: console 2: b\r\ntwo");
    desk.type_in(b"\x14n\x14\x14");
    assert_eq!(desk.shown(), "\r\nvireo: console 1: a\r\none");
    assert_eq!(
        (desk.read(0), desk.read(1)),
        (b"x\x14".to_vec(), b"y".to_vec())
    );
    desk.type_in(b"\x143\x14q");
    let said = desk.shown();
    assert!(said.starts_with("\r\nvireo: there is no guest 3\r\n\r\nvireo: behind Ctrl-T: "));
    desk.multiplexer.ended(0);
    assert_eq!(desk.multiplexer.focus, Focus::Guest(1));
    desk.type_in(b"\x141");
    desk.serve();
    assert!(
        desk.shown()
            .ends_with("vireo: console 1: a, which does not run\r\none")
    );
    desk.type_in(b"\x14n");
    assert_eq!(desk.multiplexer.focus, Focus::Guest(1));
    desk.multiplexer.ended(1);
    desk.type_in(b"\x14n");
    assert!(desk.shown().ends_with("vireo: no guest runs\r\n"));
}

#[test]
fn the_prompt_answers_and_the_log_goes_above_it() {
    let mut desk = Desk::running(&["a"]);
    desk.type_in(b"\x14p");
    let shown = desk.shown();
    assert!(shown.starts_with("\r\nvireo: console 0: "), "{shown}");
    assert!(shown.ends_with("\r\n\rvireo> \x1b[K"), "{shown}");
    desk.type_in(b"vm");
    desk.send(0, b"unseen");
    assert!(desk.multiplexer.log("vireo: event", &mut desk.wire));
    assert_eq!(desk.shown(), "vm\r\x1b[Kvireo: event\r\n\rvireo> vm\x1b[K");
    desk.type_in(b"s\r");
    assert_eq!(desk.shown(), "s\r\nasked: vms\r\n\rvireo> \x1b[K");
    desk.type_in(b"\x141");
    assert_eq!(desk.shown(), "\r\nvireo: console 1: a\r\nunseen");
    assert_eq!(desk.read(0), b"");
}

#[test]
fn a_flood_of_keys_loses_what_the_guest_does_not_read_but_no_escape() {
    let mut desk = Desk::running(&["a"]);
    desk.type_in(&[b'x'; 10_000]);
    desk.type_in(b"\x14p");
    assert_eq!(desk.multiplexer.focus, Focus::Prompt);
    assert_eq!(desk.read(0).len(), crate::vm::console::INPUT);
}

#[test]
fn a_line_with_flow_control_loses_nothing() {
    let mut desk = Desk::running(&["a"]);
    let mut read = 0;
    for _ in 0..10_000 {
        if desk.wire.held {
            let bytes = desk.read(0);
            assert!(bytes.iter().all(|byte| *byte == b'x'));
            read += bytes.len();
            desk.serve();
            assert!(!desk.wire.held);
        }
        desk.type_in(b"x");
    }
    assert_eq!(read + desk.read(0).len(), 10_000);
    // One that does not read keeps keys back, and not a break.
    desk.type_in(&[b'x'; crate::vm::console::INPUT]);
    assert!(desk.wire.held);
    desk.wire.has_break = true;
    desk.serve();
    assert_eq!(desk.multiplexer.focus, Focus::Prompt);
    assert!(!desk.wire.held);
}

#[test]
fn a_guest_has_a_line_for_itself() {
    let mut desk = Desk {
        multiplexer: Multiplexer::raw(),
        ..Desk::default()
    };
    let port = Arc::new(ConsolePort::new());
    desk.multiplexer.add("a".into(), Some(Arc::clone(&port)));
    desk.ports.push(port);
    desk.multiplexer.started(0);
    desk.wire.has_break = true;
    desk.type_in(b"\x14p\x141");
    assert_eq!(desk.read(0), b"\x14p\x141");
    desk.send(0, b"\x14out");
    assert_eq!(desk.shown(), "\x14out");
}

#[test]
fn a_guest_with_another_line_has_a_number_only() {
    let mut desk = Desk::with(&["a"]);
    desk.multiplexer.add("elsewhere".into(), None);
    desk.multiplexer.started(1);
    assert_eq!(desk.multiplexer.focus, Focus::Nobody);
    desk.multiplexer.started(0);
    desk.serve();
    desk.shown();
    desk.type_in(b"\x142");
    assert_eq!(
        desk.shown(),
        "\r\nvireo: the console of elsewhere is the second serial port\r\n"
    );
    desk.multiplexer.ended(0);
    desk.type_in(b"\x14n");
    assert_eq!(desk.shown(), "\r\nvireo: no guest runs\r\n");
}

#[test]
fn a_flood_of_commands_waits_for_the_line() {
    let mut desk = Desk::running(&["a"]);
    desk.type_in(b"\x14p");
    desk.type_in(&b"abcdefgh\r".repeat(2000));
    assert!(!desk.wire.typed.is_empty());
    assert!(desk.multiplexer.text.len() < 2 * ENOUGH_TEXT);
    assert_eq!(desk.shown().matches("asked: abcdefgh\r\n").count(), 2000);
}

#[test]
fn a_command_is_over_before_the_next_is_read() {
    let mut desk = Desk::running(&["a"]);
    desk.type_in(b"\x14p");
    desk.shown();
    desk.type_in(b"wait 1\rnext\r");
    assert_eq!(desk.shown(), "wait 1\r\nasked: wait 1\r\n");
    assert!(desk.multiplexer.log("vireo: event", &mut desk.wire));
    assert_eq!(desk.shown(), "\r\x1b[Kvireo: event\r\n");
    // The guest's keys are not held back.
    desk.type_in(b"\x141key\x14p");
    assert_eq!(desk.read(0), b"key");
    desk.shown();
    desk.commands.over = true;
    desk.serve();
    let prompt = "\rvireo> \x1b[K";
    assert_eq!(
        desk.shown(),
        format!("{prompt}next\r\nasked: next\r\n{prompt}")
    );
    desk.commands.over = false;
    desk.type_in(b"wait 2\rlost\r\x03");
    assert_eq!(desk.shown(), format!("wait 2\r\nasked: wait 2\r\n{prompt}"));
}

#[test]
fn what_is_typed_ahead_waits_on_the_line_when_it_is_too_much() {
    let mut desk = Desk::running(&["a"]);
    desk.type_in(b"\x14p");
    desk.shown();
    desk.type_in(b"wait\r");
    desk.type_in(&b"next\r".repeat(TYPED_AHEAD));
    assert!(!desk.wire.typed.is_empty());
    desk.commands.over = true;
    desk.serve();
    assert_eq!(desk.shown().matches("asked: next").count(), TYPED_AHEAD);
    // A break does not wait.
    desk.commands.over = false;
    desk.type_in(b"wait\r");
    desk.type_in(&[b'x'; 2 * TYPED_AHEAD]);
    desk.wire.typed.clear();
    desk.wire.has_break = true;
    desk.type_in(b"next\r");
    assert!(desk.shown().contains("asked: next"));
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize, usize),
    Transmit(usize),
    Log,
    Type(Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2usize, 0..3000usize).prop_map(|(guest, count)| Step::Send(guest, count)),
        4 => (0..600usize).prop_map(Step::Transmit),
        1 => Just(Step::Log),
        2 => prop::collection::vec(prop::sample::select(&b"\x14\x1412np0x\r"[..]), 1..6)
            .prop_map(Step::Type),
    ]
}

proptest! {
    /// Whatever the operator does meanwhile, a console that is gone to shows the end of what
    /// its guest has sent, and then all that it sends.
    #[test]
    fn a_console_shows_its_guest(
        steps in prop::collection::vec(step(), 0..60), after in 0..20_000usize,
    ) {
        let mut desk = Desk::running(&["a", "b"]);
        // Two alphabets, so that nothing is taken for the other's, or for ours.
        let mut sent = [Vec::new(), Vec::new()];
        let byte = |guest: usize, n: usize| 0x80 + 64 * guest as u8 + (n % 61) as u8;
        for step in steps {
            match step {
                Step::Send(guest, count) => {
                    let start = sent[guest].len();
                    let bytes: Vec<u8> = (start..start + count).map(|n| byte(guest, n)).collect();
                    let taken = desk.send(guest, &bytes);
                    sent[guest].extend(&bytes[..taken]);
                }
                Step::Transmit(count) => desk.transmit(count),
                Step::Log => {
                    desk.multiplexer.log("vireo: log", &mut desk.wire);
                }
                Step::Type(keys) => desk.type_in(&keys),
            }
            prop_assert!(desk.wire.queue.len() <= FILL + 200, "the line is soon free");
        }
        while !desk.wire.queue.is_empty() {
            desk.transmit(100);
        }
        desk.multiplexer.escaped = false;
        desk.wire.sent.clear();
        desk.type_in(b"\x142");
        let history = sent[1].len().min(OUTPUT);
        let mut expected = b"\r\nvireo: console 2: b\r\n".to_vec();
        expected.extend(&sent[1][sent[1].len() - history..]);
        for n in sent[1].len()..sent[1].len() + after {
            while desk.send(1, &[byte(1, n)]) == 0 {
                desk.transmit(16);
            }
            expected.push(byte(1, n));
        }
        while !desk.wire.queue.is_empty() {
            desk.transmit(100);
        }
        prop_assert_eq!(&desk.wire.sent, &expected);
    }
}
