//! `cargo xtask fuzz`: a guest that does random things, for as long as one likes.
//!
//! It is one guest, which is started again whenever it has died of what it does or has done all
//! rounds of its seed; the next seed is by its clock. Here its rounds are counted, and how it
//! ended.

use crate::machine::bound_command;
use crate::paths;
use crate::run::PlatformChoice;
use crate::verdict::{PREFIX, Verdict};
use crate::{build, progress::Progress, provision::Provisioner};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::io::{self, BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How many guests a machine has, one after the other: what they do may also be to power off.
const GUESTS: u32 = 32;
/// How often it is said how far it is.
const TOLD: Duration = Duration::from_secs(30);
/// What a machine may take for nothing that is seen, in seconds, beside a time for each round.
const START: u64 = 300;
/// The least rounds in a second, on a machine that does other things too.
const SLOWEST: u64 = 50;

/// How long a guest may say nothing before it is reset, and then the hypervisor.
const SILENCE: Duration = Duration::from_secs(60);
/// How long the operator's commands may take.
const COMMAND: Duration = Duration::from_secs(3);

/// How guests may end that do everything: what the hypervisor says of it begins so. All else is
/// its own mistake.
const HARMLESS: [&str; 5] = [
    "triple fault at ",
    "halted with interrupts off",
    "code or page tables at ",
    "an interrupt or exception was to be delivered by way of ",
    "the instruction at ",
];

/// `cargo xtask fuzz`
#[derive(Args, Debug)]
pub struct Options {
    /// As many seeds, at least: a guest that dies goes on with another one
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    seeds: u64,
    /// Rounds for each seed
    #[arg(long, value_name = "NUMBER", default_value_t = 100_000)]
    rounds: u64,
    /// Only this seed, to see again what one has done; its rounds are told as they come
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// With --seed: only from this round on
    #[arg(long, value_name = "ROUND", requires = "seed", default_value_t = 0)]
    from: u64,
    /// With --seed: tell what each round executes
    #[arg(long, requires = "seed")]
    trace: bool,
    /// How much of the guest's local APIC the CPU is
    #[arg(long, value_name = "TIER", default_value = "auto")]
    apic: String,
    /// CPUs of the machine: with two the guest's second one does what it does at the same time
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    smp: u8,
    /// What the machine runs on
    #[arg(long, value_enum, default_value_t = PlatformChoice::Auto)]
    platform: PlatformChoice,
    /// The emulator's CPU model, by the emulator's name for it
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
}

/// What has been seen of the guest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Rounds of seeds before this one.
    before: u64,
    /// Of this one.
    rounds: u64,
    seeds: u64,
    seed: Option<u64>,
    first: u64,
    /// The guest that runs.
    vm: Option<String>,
    /// How often it had to be reset, as code that loops with interrupts off has it.
    resets: u64,
    /// How often each harmless end came, by the beginning of its sentence.
    ends: BTreeMap<&'static str, u64>,
    /// Guests of this machine that have powered off, or ended themselves by the test device.
    over: u32,
    /// What must not be.
    failure: Option<String>,
}

impl Tally {
    fn total(&self) -> u64 {
        self.before + self.rounds
    }

    /// Takes a line of the console.
    fn take(&mut self, line: &str) {
        if let Some((_, text)) = line.split_once("vireo: vm ")
            && let Some((name, _)) = text.split_once(": started")
        {
            self.vm = Some(name.to_owned());
        }
        // Escape sequences of the terminal may come before.
        let number = |name: &str| line.split_once(name)?.1.trim_end().parse().ok();
        if let Some(seed) = number("fuzz: seed ") {
            self.before = self.total();
            (self.rounds, self.first) = (0, u64::MAX);
            self.seed = Some(seed);
            self.seeds += 1;
        } else if let Some(round) = number("fuzz: round ") {
            self.first = self.first.min(round);
            self.rounds = round - self.first;
        } else if let Some(at) = line.find(PREFIX)
            && let Some(verdict) = Verdict::parse(&line[at..])
        {
            self.judge(&verdict);
        }
    }

    fn judge(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Stopped { reason, .. } => {
                match HARMLESS.iter().find(|start| reason.starts_with(**start)) {
                    Some(start) => *self.ends.entry(start).or_default() += 1,
                    None => self.failure = Some(format!("the guest was stopped: {reason}")),
                }
            }
            Verdict::Panic(_) | Verdict::Error(_) => self.failure = verdict.failure(),
            Verdict::PoweredOff { .. } | Verdict::Exited { .. } => self.over += 1,
            Verdict::Reset { .. } => {}
        }
    }

    /// One line about all of it.
    fn summary(&self, time: Duration) -> String {
        let mut text = format!(
            "{} rounds, {} seeds, {} s",
            self.total(),
            self.seeds,
            time.as_secs()
        );
        for (end, count) in &self.ends {
            let _ = write!(text, "; {count} times: {}", end.trim_end());
        }
        if self.resets > 0 {
            let _ = write!(text, "; {} times reset for its silence", self.resets);
        }
        text
    }
}

/// Runs the command, and returns the exit code.
///
/// # Errors
/// When a machine cannot be had.
pub fn run(options: &Options) -> Result<u8> {
    let folder = paths::target().join("fuzz");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let progress = Progress::new();
    options.platform.provision(&Provisioner::new(&progress))?;
    progress.clear();
    build::all()?;
    let kernel = build::guest("fuzz")?;
    fs::copy(&kernel, folder.join("fuzz")).context("cannot copy the guest")?;
    attend(options, &folder)
}

fn configuration(options: &Options) -> Result<String> {
    let Options { rounds, apic, .. } = options;
    let (guests, rest) = match options.seed {
        Some(seed) => {
            let (from, trace) = (options.from, u8::from(options.trace));
            (1, format!("seed={seed} from={from} trace={trace}\""))
        }
        None => {
            let salt = u64::from_str_radix(&crate::run::nonce()?, 16)?;
            let policies = "on_crash = \"restart\"\non_reboot = \"restart\"";
            (GUESTS, format!("salt={salt} then=1\"\n{policies}"))
        }
    };
    let mut text = String::new();
    for number in 0..guests {
        writeln!(
            text,
            "[[vm]]\nname = \"fuzz-{number}\"\nmemory = \"8M\"\nvcpus = 2\nkernel = \"fuzz\"\napic = \"{apic}\"\ntest_device = true\ncmdline = \"rounds={rounds} {rest}"
        )?;
        if let Some(before) = u32::checked_sub(number, 1) {
            writeln!(text, "after = \"fuzz-{before}\"")?;
        }
    }
    Ok(text)
}

/// Runs machines, one when the guests of the other are over, until they have done enough.
fn attend(options: &Options, folder: &Path) -> Result<u8> {
    let wanted = match options.seed {
        Some(_) => u64::MAX,
        None => options.seeds.saturating_mul(options.rounds),
    };
    let limit = START + options.seeds.saturating_mul(options.rounds) / SLOWEST;
    let mut machine = Session::start(options, folder, limit)?;
    let mut tally = Tally::default();
    let (start, mut told) = (Instant::now(), Instant::now());
    let mut silent = false;
    loop {
        let line = match machine.lines.recv_timeout(SILENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) if tally.over == GUESTS => {
                tally.over = 0;
                machine.end()?;
                machine = Session::start(options, folder, limit)?;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if silent => {
                tally.failure = Some("the hypervisor does not answer".into());
                break;
            }
            Err(RecvTimeoutError::Timeout) => {
                silent = true;
                tally.resets += 1;
                machine.reset(tally.vm.as_deref().unwrap_or_default())?;
                continue;
            }
        };
        silent &= !line.contains("fuzz: ") && !line.contains(PREFIX);
        tally.take(&line);
        if options.seed.is_some() {
            println!("{}", line.trim_end());
        } else if told.elapsed() > TOLD {
            told = Instant::now();
            println!("fuzz: {}", tally.summary(start.elapsed()));
        }
        let is_panic = tally
            .failure
            .as_ref()
            .is_some_and(|text| text.contains("panicked"));
        // What a panic says comes behind it.
        if tally.total() >= wanted || tally.failure.is_some() && !is_panic {
            break;
        }
    }
    machine.end()?;
    println!("fuzz: {}", tally.summary(start.elapsed()));
    let unfinished = || {
        let folder = folder.display();
        format!("the machine has ended before its guests had done enough: its logs are in {folder}")
    };
    let missing = tally.total() < wanted && options.seed.is_none();
    let Some(failure) = tally.failure.or_else(|| missing.then(unfinished)) else {
        return Ok(0);
    };
    let seed = tally.seed.map_or_else(String::new, |seed| {
        format!(
            "; again with: cargo xtask fuzz --rounds {} --seed {seed}",
            options.rounds
        )
    });
    bail!("{failure}{seed}")
}

/// `cargo xtask run` on a terminal of its own, on which the operator's commands are typed.
struct Session {
    child: Child,
    keys: ChildStdin,
    lines: Receiver<String>,
}

impl Session {
    fn start(options: &Options, folder: &Path, limit: u64) -> Result<Self> {
        fs::write(folder.join("vireo.toml"), configuration(options)?)?;
        let quoted = |path: &Path| format!("'{}'", path.display());
        let mut line = format!(
            "{} run --smp {} --timeout {limit} --config {} --folder {}",
            quoted(&std::env::current_exe()?),
            options.smp,
            quoted(&folder.join("vireo.toml")),
            quoted(&folder.join("machine"))
        );
        if let Some(platform) = options.platform.to_possible_value() {
            write!(line, " --platform {}", platform.get_name())?;
        }
        if let Some(model) = &options.cpu {
            write!(line, " --cpu '{model}'")?;
        }
        let mut child = bound_command(Path::new("script"))
            .args(["-qefc", &line, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start xtask")?;
        let (Some(keys), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("xtask has no output");
        };
        Ok(Self {
            child,
            keys,
            lines: lines(output),
        })
    }

    /// Has the operator reset the guest, and show its console again.
    fn reset(&mut self, vm: &str) -> io::Result<()> {
        for typed in ["\x14p", &format!("vm {vm} reset\r"), "\x14n"] {
            self.keys.write_all(typed.as_bytes())?;
            thread::sleep(COMMAND);
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let _ = kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM);
        self.child.wait()?;
        Ok(())
    }
}

/// The lines of an output, as they come.
fn lines(output: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_add_up_over_lives() {
        let mut tally = Tally::default();
        for line in [
            "fuzz: seed 5",
            "fuzz: round 0",
            "fuzz: round 256\r",
            "noise vireo: vm fuzz-0: stopped: triple fault at 0x10, and is started again",
            "fuzz: seed 6",
            "fuzz: round 512",
            "fuzz: round 768",
            "fuzz: done",
            "vireo: vm fuzz-0: reset, and is started again",
        ] {
            tally.take(line);
        }
        assert_eq!((tally.total(), tally.seeds, tally.seed), (512, 2, Some(6)));
        assert_eq!(tally.ends, BTreeMap::from([(HARMLESS[0], 1)]));
        assert_eq!(tally.failure, None);
        tally.take("vireo: vm fuzz-0: stopped: VM entry failed, and is started again");
        assert!(tally.failure.is_some());
    }

    #[test]
    fn a_panic_is_a_failure() {
        let mut tally = Tally::default();
        tally.take("vireo: panic: here");
        assert_eq!(
            tally.failure.as_deref(),
            Some("the hypervisor has panicked: here")
        );
    }
}
