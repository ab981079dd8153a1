//! A machine that is run by `cargo xtask run`, and how it ended.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use xtask::image::{self, Entry, LOADER};
use xtask::machine::bound_command;
use xtask::{build, paths};

/// How long a machine may take where a test says nothing else.
const LIMIT: Duration = Duration::from_secs(300);
/// How long xtask may take beside its machine's limit.
const MARGIN: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// From one look at a screen to the next.
const BETWEEN_LOOKS: Duration = Duration::from_secs(2);
/// What leaves a terminal, and ends the machine.
const LEAVE: &[u8] = b"\x1dq";

/// What xtask gets as standard input.
pub enum Input {
    /// Nothing: its end comes at once.
    Nothing,
    /// These bytes.
    Bytes(Vec<u8>),
    /// A terminal on which somebody types: pairs of what is waited for on the
    /// console, and what is typed then.
    Typed(Vec<(&'static str, &'static str)>),
    /// A terminal on which somebody asks for the screen of the guest with this name, again and
    /// again, until all these words are on it, and leaves then.
    Watched(&'static str, Vec<&'static str>),
}

/// A machine about to run.
pub struct Machine {
    folder: PathBuf,
    arguments: Vec<String>,
    input: Input,
    limit: Duration,
    /// A signal for xtask when the console has said this.
    signal: Option<(String, Signal)>,
}

/// How a machine ended, as xtask tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The machine is off, or its user has left; the exit status.
    Status(i32),
    /// It was ended when its time was over.
    Hang,
    /// It went off without a word.
    Crash,
    /// It restarted without a word.
    Restart,
    /// Something was said about it, and the exit status was not zero.
    Refused(String),
    /// A signal has ended xtask.
    Killed,
}

/// What was seen of a machine.
pub struct Outcome {
    pub ending: Ending,
    /// xtask's standard output.
    pub output: String,
    /// xtask's standard error.
    pub errors: String,
    /// Everything on the serial console.
    pub console: String,
    /// Wall-clock time from the start of xtask to its end.
    pub time: Duration,
}

impl Machine {
    /// One whose logs go into `folder`.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            arguments: Vec::new(),
            input: Input::Nothing,
            limit: LIMIT,
            signal: None,
        }
    }

    /// Adds options of `cargo xtask run`.
    pub fn options<const N: usize>(mut self, options: [&str; N]) -> Self {
        self.arguments.extend(options.map(str::to_owned));
        self
    }

    /// The command that the guest runs.
    pub fn exec(self, command: &str) -> Self {
        self.options(["--exec", command])
    }

    /// Boots a volume with the loader, the configuration and `files` (name and
    /// contents), all below the folder of the configuration.
    ///
    /// # Errors
    /// When the image cannot be written.
    pub fn volume(self, config: &str, files: &[(&str, &[u8])]) -> Result<Self> {
        let files = [("vireo.toml", config.as_bytes())]
            .iter()
            .chain(files)
            .map(|(name, contents)| (format!("vireo/{name}"), contents.to_vec()))
            .collect();
        self.raw_volume(files)
    }

    /// Boots a volume with the loader and `files`, by their paths on the volume.
    ///
    /// # Errors
    /// When the image cannot be written.
    pub fn raw_volume(self, files: Vec<(String, Vec<u8>)>) -> Result<Self> {
        fs::create_dir_all(&self.folder)?;
        let loader = (LOADER.to_owned(), paths::read(&build::all()?.loader)?);
        let entries: Vec<Entry> = [loader]
            .into_iter()
            .chain(files)
            .map(|(path, contents)| Entry { path, contents })
            .collect();
        let disk = self.folder.join("given.img");
        image::write(&disk, &entries)?;
        let disk = disk.display().to_string();
        Ok(self.options(["--disk", &disk]))
    }

    /// What it gets as input.
    pub fn input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// How long it may take before it is said to hang.
    pub fn limit(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Sends `signal` to xtask when the console has said `word`.
    pub fn signal_at(mut self, word: &str, signal: Signal) -> Self {
        self.signal = Some((word.into(), signal));
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When xtask does not start or does not end.
    pub fn run(self) -> Result<Outcome> {
        fs::create_dir_all(&self.folder)?;
        let start = Instant::now();
        let mut child = self.command()?.spawn().context("cannot start xtask")?;
        let status = self.attend(&mut child, start)?;
        let time = start.elapsed();
        let text = |name: &str| {
            let bytes = fs::read(self.folder.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let _ = fs::remove_file(self.folder.join("given.img"));
        let output = text("stdout");
        let errors = match self.input {
            // Both go to the terminal.
            Input::Typed(_) | Input::Watched(..) => output.clone(),
            Input::Nothing | Input::Bytes(_) => text("stderr"),
        };
        Ok(Outcome {
            ending: Ending::of(status, &errors),
            output,
            errors,
            console: text("serial.log"),
            time,
        })
    }

    /// The command, with its output going to files. A terminal is made by
    /// `script` (package bsdutils, which is essential in Debian).
    fn command(&self) -> Result<Command> {
        let limit = self.limit.as_secs().to_string();
        let folder = self.folder.display().to_string();
        let mut words = vec![xtask_program()?.display().to_string()];
        words.extend(["run", "--folder", &folder, "--timeout", &limit].map(str::to_owned));
        words.extend(self.arguments.iter().cloned());
        let file = |name: &str| File::create(self.folder.join(name));
        let mut command = match self.input {
            Input::Typed(_) | Input::Watched(..) => {
                let line: Vec<String> = words.iter().map(|word| quoted(word)).collect();
                let mut command = bound_command(Path::new("script"));
                command.args([
                    OsStr::new("-qefc"),
                    OsStr::new(&line.join(" ")),
                    OsStr::new("/dev/null"),
                ]);
                command.stdin(Stdio::piped());
                command
            }
            Input::Nothing | Input::Bytes(_) => {
                let mut command = bound_command(Path::new(&words[0]));
                command.args(&words[1..]);
                match &self.input {
                    Input::Bytes(bytes) => {
                        fs::write(self.folder.join("stdin"), bytes)?;
                        command.stdin(File::open(self.folder.join("stdin"))?)
                    }
                    _ => command.stdin(Stdio::null()),
                };
                command
            }
        };
        command
            .stdout(file("stdout")?)
            .stderr(file("stderr")?)
            .process_group(0);
        Ok(command)
    }

    /// Waits for the end, and types and signals what there is to.
    fn attend(&self, child: &mut Child, start: Instant) -> Result<ExitStatus> {
        let typed: &[_] = match &self.input {
            Input::Typed(typed) => typed,
            _ => &[],
        };
        let mut typed = typed.iter().peekable();
        let mut signal = self.signal.as_ref();
        let mut seen = 0;
        let mut asked = start;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            let output = fs::read(self.folder.join("stdout")).unwrap_or_default();
            let recent = String::from_utf8_lossy(&output[seen.min(output.len())..]).into_owned();
            if let Some((word, keys)) = typed.peek()
                && recent.contains(word)
                && let Some(input) = &mut child.stdin
            {
                seen = output.len();
                input.write_all(keys.as_bytes())?;
                typed.next();
            }
            if let Input::Watched(guest, words) = &self.input
                && let Some(input) = &mut child.stdin
                && recent.contains("started")
                && asked.elapsed() > BETWEEN_LOOKS
            {
                asked = Instant::now();
                // The last answer alone.
                let shown = recent.rsplit("screen ").next().unwrap_or_default();
                let leaves = words.iter().all(|word| shown.contains(word));
                let ask = format!("\x14pscreen {guest}\r");
                input.write_all(if leaves { LEAVE } else { ask.as_bytes() })?;
            }
            let console = fs::read(self.folder.join("serial.log")).unwrap_or_default();
            if let Some((word, number)) = signal
                && String::from_utf8_lossy(&console).contains(word)
            {
                kill(Pid::from_raw(child.id().try_into()?), *number)?;
                signal = None;
            }
            if start.elapsed() > self.limit + MARGIN {
                let _ = killpg(Pid::from_raw(child.id().try_into()?), Signal::SIGKILL);
                child.wait()?;
                bail!("xtask has not ended within {:?}", self.limit + MARGIN);
            }
            sleep(POLL);
        }
    }
}

impl Outcome {
    /// The text between two marks on standard output.
    pub fn section(&self, name: &str) -> &str {
        let start = format!("== {name}\n");
        let Some(at) = self.output.find(&start) else {
            return "";
        };
        let text = &self.output[at + start.len()..];
        text.split("\n== ").next().unwrap_or_default()
    }

    /// Whether a process still has this machine's folder on its command line.
    pub fn leftover(folder: &Path) -> Option<String> {
        let folder = folder.display().to_string();
        fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
            let line = fs::read(process.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(&folder).then_some(line)
        })
    }
}

impl Ending {
    /// The ending that xtask's exit status and standard error tell.
    fn of(status: ExitStatus, errors: &str) -> Self {
        let sentence = errors
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("error: "))
            .unwrap_or_default();
        match status.code() {
            None => Self::Killed,
            Some(1) if sentence.contains("has not ended within") => Self::Hang,
            Some(1) if sentence.contains("has ended without a word") => Self::Crash,
            Some(1) if sentence.contains("has restarted without a word") => Self::Restart,
            Some(1) if !sentence.is_empty() => Self::Refused(sentence.into()),
            Some(code) => Self::Status(code),
        }
    }

    /// The sentence of a refusal.
    pub fn sentence(&self) -> &str {
        match self {
            Self::Refused(sentence) => sentence,
            _ => "",
        }
    }
}

/// The program behind `cargo xtask`: the one that started us, or our neighbour.
pub fn xtask_program() -> Result<PathBuf> {
    if let Some(program) = std::env::var_os("VIREO_XTASK") {
        return Ok(program.into());
    }
    let program = std::env::current_exe()?.with_file_name("xtask");
    if !program.exists() {
        bail!(
            "there is no {}: start the tests by `cargo xtask test`",
            program.display()
        );
    }
    Ok(program)
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn ending(code: i32, errors: &str) -> Ending {
        Ending::of(ExitStatus::from_raw(code << 8), errors)
    }

    #[test]
    fn endings_are_told_apart() {
        assert_eq!(ending(0, "kernel: 1 KiB\n"), Ending::Status(0));
        assert_eq!(ending(42, ""), Ending::Status(42));
        assert_eq!(ending(1, ""), Ending::Status(1));
        let hang = "error: the machine has not ended within 5 s (--timeout), it was\n";
        assert_eq!(ending(1, hang), Ending::Hang);
        let crash = "error: the machine has ended without a word: its console\n";
        assert_eq!(ending(1, crash), Ending::Crash);
        let restart = "error: the machine has restarted without a word: its\n";
        assert_eq!(ending(1, restart), Ending::Restart);
        assert_eq!(ending(1, "noise\nerror: no VT-x\n").sentence(), "no VT-x");
        assert_eq!(Ending::of(ExitStatus::from_raw(9), ""), Ending::Killed);
    }

    #[test]
    fn a_word_survives_the_shell() {
        let word = "it's $HOME; \"x\"";
        let output = Command::new("sh")
            .args(["-c", &format!("printf %s {}", quoted(word))])
            .output()
            .unwrap();
        assert_eq!(output.stdout, word.as_bytes());
    }
}
