//! One machine from its start to its end, with our standard streams joined to
//! its console.

use crate::framing::{BLOCK, Event, Framer, input_line};
use crate::machine::Machine;
use crate::progress::Progress;
use crate::terminal::{self, Keys, Raw};
use crate::verdict::{Interjections, PREFIX, Tail, Watcher};
use crate::volume::OneConsole;
use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGTERM};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Typed or pasted bytes go to the guest in pieces of this size, the UART's
/// receive FIFO, with a pause in which the guest can empty it.
const PIECE: usize = 16;
const PAUSE: Duration = Duration::from_millis(10);
/// Emulators send each character of the console on its own. It waits this long for
/// others, so that not every one makes the system switch between them and us.
const GATHER: Duration = Duration::from_millis(2);
/// How long a machine may take to power off when its shell has ended.
const POWER_OFF: Duration = Duration::from_secs(60);

/// What the hypervisor's escape is: Ctrl-T.
const ESCAPE: u8 = 0x14;

/// How the hypervisor says whose console is shown: then its number and name.
const CONSOLE_OF: &str = "vireo: console ";

const TOO_EARLY: &str = "the guest has powered off before its command ended";

/// How our standard streams are used.
pub enum Streams<'a> {
    /// The terminal is the guest's console.
    Terminal,
    /// What the console says is copied to the output; there is no input.
    Console,
    /// The guest runs a job with this nonce, see [`crate::framing`]. The input
    /// is passed on only where `input` says so. Where there are several guests, `console` is that
    /// one's.
    Job {
        nonce: &'a str,
        input: bool,
        console: Option<&'a OneConsole>,
    },
}

impl<'a> Streams<'a> {
    /// The console of the job's guest, where there are others.
    const fn console(&self) -> Option<&'a OneConsole> {
        match self {
            Self::Job { console, .. } => *console,
            Self::Terminal | Self::Console => None,
        }
    }
}

/// How a machine ended, as far as it is no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The machine is off, or the job has ended with this status.
    Status(i32),
    /// The user has left.
    Left,
    /// A signal with this number has ended us, or would have.
    Signal(i32),
}

/// How long a machine may take.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// Somebody watches.
    None,
    /// From its start to its end.
    Total(Duration),
    /// From its start or its job's last output or input to its end.
    Silence(Duration),
}

impl Limit {
    /// When it is over, from now.
    fn deadline(self) -> Option<Instant> {
        match self {
            Self::None => None,
            Self::Total(limit) | Self::Silence(limit) => Some(Instant::now() + limit),
        }
    }
}

/// A session about to run.
pub struct Session<'a> {
    /// The machine, just started.
    pub machine: Machine,
    /// Vireo is on the machine; else the guest's console is all there is.
    pub vireo: bool,
    /// How it is joined to us.
    pub streams: Streams<'a>,
    /// Where a job's output goes, and what else is shown of the console.
    pub output: &'a mut dyn Write,
    /// Everything from the console is kept here.
    pub log: PathBuf,
    /// The most that it may take.
    pub limit: Limit,
    /// Where the stages are shown.
    pub progress: &'a Progress,
}

/// What a session has seen of the hypervisor, whatever its end.
pub struct Report {
    /// The end, or why there was none.
    pub end: Result<End>,
    /// The hypervisor's verdicts.
    pub watcher: Watcher,
    /// The guest's ticks from its kernel's first instruction to its first process.
    pub init: Option<u64>,
    /// When the guest's shell began.
    pub prompt: Option<Instant>,
}

impl Session<'_> {
    /// Runs the machine to its end, and takes it down in any case.
    pub fn run(self) -> Report {
        let mut watcher = Watcher::default();
        let (end, init, prompt) = match Loop::new(self, &mut watcher) {
            Ok(mut running) => (running.run(), running.init, running.prompt),
            Err(error) => (Err(error), None, None),
        };
        Report {
            end,
            watcher,
            init,
            prompt,
        }
    }
}

struct Loop<'s, 'w> {
    session: Session<'s>,
    watcher: &'w mut Watcher,
    log: File,
    signals: [(i32, UnixStream); 3],
    framer: Option<Framer>,
    tail: Tail,
    interjections: Interjections,
    /// The job's guest is one of several, and its console is shown.
    shown: bool,
    stage: usize,
    /// The hypervisor has spoken, and not only the firmware.
    spoken: bool,
    /// The terminal in raw mode, from then on.
    raw: Option<Raw>,
    keys: Keys,
    /// What was typed and is not sent yet, and when the next piece may go.
    typed: Vec<u8>,
    next_piece: Instant,
    /// The job wants input.
    wanted: bool,
    init: Option<u64>,
    prompt: Option<Instant>,
    status: Option<i32>,
    deadline: Option<Instant>,
    /// Nobody reads our standard output any more.
    unread: bool,
}

/// The stages that a starting machine goes through.
const STAGES: [&str; 4] = ["firmware", "loader", "hypervisor", "kernel"];

impl<'s, 'w> Loop<'s, 'w> {
    fn new(session: Session<'s>, watcher: &'w mut Watcher) -> Result<Self> {
        let log = File::create(&session.log)
            .with_context(|| format!("cannot write {}", session.log.display()))?;
        let framer = match session.streams {
            Streams::Terminal | Streams::Console => None,
            Streams::Job { nonce, .. } => Some(Framer::new(nonce)),
        };
        let others = session.streams.console().map(|console| &*console.others);
        let interjections = Interjections::new(others.unwrap_or_default());
        let deadline = session.limit.deadline();
        session.progress.stage(STAGES[0]);
        let vireo = session.vireo;
        let mut new = Self {
            watcher,
            log,
            signals: [signal(SIGINT)?, signal(SIGTERM)?, signal(SIGHUP)?],
            framer,
            tail: Tail::default(),
            interjections,
            shown: false,
            stage: 0,
            spoken: false,
            raw: None,
            keys: Keys::default(),
            typed: Vec::new(),
            next_piece: Instant::now(),
            wanted: false,
            init: None,
            prompt: None,
            status: None,
            deadline,
            unread: false,
            session,
        };
        if !vireo {
            new.open()?;
        }
        Ok(new)
    }

    /// From now on, what the console says is the guest's or the hypervisor's.
    fn open(&mut self) -> Result<()> {
        self.spoken = true;
        if matches!(self.session.streams, Streams::Terminal) {
            self.session.progress.clear();
            eprintln!("{}", terminal::HINT);
            if self.session.vireo {
                eprintln!("{}", terminal::PROMPT_HINT);
            }
            self.raw = Some(Raw::enter()?);
        }
        Ok(())
    }

    fn run(&mut self) -> Result<End> {
        let mut buffer = [0; 16 << 10];
        loop {
            let ready = self.wait()?;
            if let Some(signal) = ready.signal {
                return Ok(End::Signal(signal));
            }
            if ready.serial {
                let count = match self.session.machine.serial().read(&mut buffer) {
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
                    Err(error) => return Err(error).context("cannot read the serial line"),
                };
                if count == 0 {
                    return self.ended();
                }
                self.receive(&buffer[..count])?;
                std::thread::sleep(GATHER);
                if self.unread {
                    return Ok(End::Signal(SIGPIPE));
                }
                if self.watcher.restarted {
                    return self.restarted();
                }
                if let Some(end) = self.guest_ended() {
                    return end;
                }
            }
            if ready.input && self.take_input()?.is_none() {
                return Ok(End::Left);
            }
            self.send_typed()?;
            if self
                .deadline
                .is_some_and(|deadline| Instant::now() > deadline)
            {
                return self.too_late();
            }
        }
    }

    /// Waits for something to do.
    fn wait(&mut self) -> Result<Ready> {
        let listen_to_input = match self.framer {
            None => self.raw.is_some(),
            Some(_) => self.wanted,
        };
        let input = io::stdin();
        let serial = self.session.machine.serial();
        let mut sources = vec![PollFd::new(serial.as_fd(), PollFlags::POLLIN)];
        for (_, pipe) in &self.signals {
            sources.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
        }
        if listen_to_input {
            sources.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        let now = Instant::now();
        let next = (!self.typed.is_empty()).then_some(self.next_piece);
        let until = [next, self.deadline].into_iter().flatten().min();
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            let millis = until.saturating_duration_since(now).as_millis() + 1;
            PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
        });
        match poll(&mut sources, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for the machine"),
        }
        let is_ready = |index: usize| {
            sources
                .get(index)
                .is_some_and(|source| source.any().unwrap_or(false))
        };
        let signal = self
            .signals
            .iter()
            .zip(1..)
            .find(|(_, index)| is_ready(*index))
            .map(|((number, _), _)| *number);
        Ok(Ready {
            serial: is_ready(0),
            signal,
            input: is_ready(4),
        })
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<()> {
        self.log
            .write_all(bytes)
            .context("cannot write the console's log")?;
        if let Some(framer) = &mut self.framer {
            let events = framer.push(&self.interjections.push(bytes));
            if self.session.vireo {
                let lines = self.watcher.push(bytes);
                lines.iter().for_each(|line| self.show_stage(line));
                lines.iter().try_for_each(|line| self.show_console(line))?;
            }
            return events.into_iter().try_for_each(|event| self.handle(event));
        }
        if !self.session.vireo {
            return self.put(bytes);
        }
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let lines = self.watcher.push(piece);
            if self.spoken {
                self.put(piece)?;
                let owner = lines.iter().find_map(|line| line.strip_prefix(CONSOLE_OF));
                if let (Some(raw), Some(owner)) = (&self.raw, owner) {
                    raw.title(&format!("Vireo: {owner}"));
                }
            } else if let Some(line) = lines.first() {
                self.session.progress.clear();
                self.open()?;
                self.put(format!("{line}\r\n").as_bytes())?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<()> {
        if matches!(self.session.limit, Limit::Silence(_)) {
            self.deadline = self.session.limit.deadline();
        }
        match event {
            Event::Init(ticks) => self.init = Some(ticks),
            Event::Begin => {
                self.session.progress.clear();
                self.prompt = Some(Instant::now());
                self.stage = STAGES.len();
            }
            Event::Output(bytes) => {
                let bytes = self.tail.push(&bytes);
                self.put(&bytes)?;
            }
            Event::More => {
                self.wanted = matches!(self.session.streams, Streams::Job { input: true, .. });
                if !self.wanted {
                    self.send(&input_line(None))?;
                }
            }
            Event::End(status) => {
                let bytes = self.tail.end();
                self.put(&bytes)?;
                self.wanted = false;
                self.status = Some(status);
                let limit = Instant::now() + POWER_OFF;
                self.deadline = Some(self.deadline.map_or(limit, |deadline| deadline.min(limit)));
            }
        }
        Ok(())
    }

    /// Has the console of the job's guest shown when that starts.
    fn show_console(&mut self, line: &str) -> Result<()> {
        let Some(OneConsole { vm, key, .. }) = self.session.streams.console() else {
            return Ok(());
        };
        if !self.shown && line.starts_with(&format!("{PREFIX}vm {vm}: started")) {
            self.shown = true;
            self.send(&[ESCAPE, *key])?;
        }
        Ok(())
    }

    fn show_stage(&mut self, line: &str) {
        let stage = match line {
            _ if line.contains("loader") => 1,
            _ if line.contains(" vm ") => 3,
            _ => 2,
        };
        if stage > self.stage {
            self.stage = stage;
            self.session.progress.stage(STAGES[stage]);
        }
    }

    /// Reads what there is of our input; `None` when the user leaves.
    fn take_input(&mut self) -> Result<Option<()>> {
        let mut block = [0; BLOCK];
        let count =
            nix::unistd::read(io::stdin(), &mut block).context("cannot read the standard input")?;
        let block = &block[..count];
        if self.framer.is_some() {
            self.wanted = false;
            self.send(&input_line((count > 0).then_some(block)))?;
        } else if count == 0 {
            return Ok(None);
        } else {
            let Some(keys) = self.keys.push(block) else {
                return Ok(None);
            };
            self.typed.extend(keys);
        }
        Ok(Some(()))
    }

    fn send_typed(&mut self) -> Result<()> {
        if self.typed.is_empty() || Instant::now() < self.next_piece {
            return Ok(());
        }
        let piece: Vec<u8> = self.typed.drain(..PIECE.min(self.typed.len())).collect();
        self.next_piece = Instant::now() + PAUSE;
        self.send(&piece)
    }

    /// Writes to the output, unbuffered: what was shown is shown.
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let output = &mut self.session.output;
        match output.write_all(bytes).and_then(|()| output.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.unread = true,
            result => result.context("cannot write to the standard output")?,
        }
        Ok(())
    }

    /// Sends to the console. A machine that has just ended takes nothing more;
    /// its end is seen when reading.
    fn send(&self, bytes: &[u8]) -> Result<()> {
        match self.session.machine.serial().write_all(bytes) {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Err(error).context("cannot write to the serial line")
            }
            _ => Ok(()),
        }
    }

    /// The serial line has ended: the machine is off.
    fn ended(&mut self) -> Result<End> {
        self.watcher.end();
        if let Some(sentence) = self.watcher.failure() {
            return Err(anyhow!(sentence));
        }
        let status = self.status.or(self.watcher.exit_status().map(i32::from));
        let told = !self.session.vireo || !self.watcher.verdicts.is_empty();
        match (&self.framer, status) {
            (_, Some(status)) => Ok(End::Status(status)),
            (None, None) if told => Ok(End::Status(0)),
            _ if told => bail!(TOO_EARLY),
            _ => bail!(
                "the machine has ended without a word: its console is in {}",
                self.session.log.display()
            ),
        }
    }

    /// The job's guest has ended, and others have not.
    fn guest_ended(&self) -> Option<Result<End>> {
        let vm = &self.session.streams.console()?.vm;
        let mut verdicts = self.watcher.verdicts.iter();
        let verdict = verdicts.find(|verdict| verdict.is_end_of(vm))?;
        Some(match (self.status, verdict.failure()) {
            (Some(status), _) => Ok(End::Status(status)),
            (None, Some(sentence)) => Err(anyhow!(sentence)),
            (None, None) => Err(anyhow!(TOO_EARLY)),
        })
    }

    /// The loader has spoken again, and nobody has asked for that.
    fn restarted(&self) -> Result<End> {
        match self.watcher.failure() {
            Some(sentence) => Err(anyhow!(sentence)),
            None => bail!(
                "the machine has restarted without a word: its console is in {}",
                self.session.log.display()
            ),
        }
    }

    fn too_late(&mut self) -> Result<End> {
        if let Some(sentence) = self.watcher.failure() {
            return Err(anyhow!(sentence));
        }
        if let Some(status) = self.status {
            self.session
                .progress
                .note("the guest's shell has ended, but its machine stays on: ending it");
            return Ok(End::Status(status));
        }
        let time = match self.session.limit {
            Limit::None => String::new(),
            Limit::Total(limit) => format!(" within {} s", limit.as_secs()),
            Limit::Silence(limit) => {
                format!(" within {} s after its last output", limit.as_secs())
            }
        };
        let stage = STAGES
            .get(self.stage)
            .map_or("guest's shell", |stage| stage);
        bail!(
            "the machine has not ended{time} (--timeout), it was last seen in the {stage}: \
             its console is in {}",
            self.session.log.display()
        )
    }
}

struct Ready {
    serial: bool,
    signal: Option<i32>,
    input: bool,
}

fn signal(number: i32) -> Result<(i32, UnixStream)> {
    let (read, write) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(number, write).context("cannot catch signals")?;
    Ok((number, read))
}

/// Whether standard input is a terminal, and so the guest's console.
pub fn input_is_terminal() -> bool {
    io::stdin().is_terminal()
}
