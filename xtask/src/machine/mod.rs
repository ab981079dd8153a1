//! Machines that boot a disk image: a started emulator and its serial line.
//!
//! Each platform makes its emulator connect COM1 to a listener of ours, so a
//! machine is a process and a TCP stream, whatever runs it.

pub mod bare;
mod bochs;
mod qemu;
pub mod rig;

pub use bare::Bare;
pub use bochs::Bochs;
pub use qemu::{Qemu, nested_vmx};
pub use rig::Rig;

use crate::paths;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long an emulator may take to connect its serial port.
const CONNECT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// A program that emulates a PC, installed or unpacked from its package.
#[derive(Clone, Debug)]
pub struct Emulator {
    /// The program.
    pub program: PathBuf,
    /// What it needs in its environment.
    pub environment: Vec<(String, String)>,
}

impl Emulator {
    /// One that the system knows.
    pub const fn installed(program: PathBuf) -> Self {
        Self {
            program,
            environment: Vec::new(),
        }
    }

    /// A command that ends with us, as [`bound_command`].
    fn command(&self) -> Command {
        let mut command = bound_command(&self.program);
        command.envs(self.environment.iter().cloned());
        command
    }

    /// What it says when it is asked for help.
    ///
    /// # Errors
    /// When it does not start.
    pub fn help(&self) -> Result<String> {
        let help = self
            .command()
            .arg("--help")
            .output()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let text = [help.stdout, help.stderr].concat();
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Whether `path` is a device, such as a terminal.
fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.file_type().is_char_device())
}

/// What kind of machine is wanted.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The disk image to boot.
    pub disk: PathBuf,
    /// What the second serial port is: a terminal's device, or a file for what is sent.
    pub com2: Option<PathBuf>,
    /// Bochs only: another disk, for a system that does not boot from it.
    pub second_disk: Option<PathBuf>,
    /// An existing folder for what the emulator writes: configuration and log.
    pub folder: PathBuf,
    /// Memory of the whole machine, in MiB.
    pub memory_mib: u64,
    /// Number of CPUs.
    pub cpus: u32,
    /// The emulator's name of the CPU model; `None` is the platform's default.
    pub cpu_model: Option<String>,
    /// Bochs only: executed instructions that make an emulated second.
    pub ips: u64,
}

impl MachineConfig {
    /// Fewer instructions in an emulated second make waiting for emulated
    /// devices (disk, UART) cheaper; figures in time need more.
    pub const FUNCTIONAL_IPS: u64 = 50_000_000;
    /// Those that figures in time need.
    pub const TIMED_IPS: u64 = 400_000_000;

    /// A machine with one CPU for guests of `guests` bytes in total.
    pub fn new(disk: &Path, folder: &Path, guests: u64) -> Self {
        Self {
            disk: disk.to_owned(),
            com2: None,
            second_disk: None,
            folder: folder.to_owned(),
            memory_mib: memory_for(guests),
            cpus: 1,
            cpu_model: None,
            ips: Self::FUNCTIONAL_IPS,
        }
    }

    /// Where the emulator's own output goes.
    pub fn log(&self) -> PathBuf {
        self.folder.join("emulator.log")
    }

    /// Bochs refuses an image whose lock is there, and leaves it there when killed.
    fn remove_locks(&self) {
        for disk in [Some(&self.disk), self.second_disk.as_ref()]
            .into_iter()
            .flatten()
        {
            let mut lock = disk.as_os_str().to_owned();
            lock.push(".lock");
            let _ = fs::remove_file(lock);
        }
    }
}

/// Memory in MiB for guests of `guests` bytes: what firmware, loader (with the
/// guest's images in memory) and hypervisor need comes on top.
pub fn memory_for(guests: u64) -> u64 {
    (guests.div_ceil(1 << 20) + 160).next_multiple_of(32)
}

/// Something that machines run on.
pub trait Platform: Sync {
    /// Its name for the user.
    fn name(&self) -> &'static str;

    /// Whether the time-stamp counter counts instructions, comparable with
    /// those on [`Bare`].
    fn counts_instructions(&self) -> bool {
        false
    }

    /// What the clock of a machine says that is started now, in seconds since 1970 (UTC).
    fn time(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs())
    }

    /// Starts a machine. It ends with the thread that started it at the
    /// latest, if the tool `setpriv` is there.
    ///
    /// # Errors
    /// When the emulator does not start; the reason is the emulator's.
    fn start(&self, config: &MachineConfig) -> Result<Machine>;
}

/// A machine that is running. Dropping it ends the machine.
pub struct Machine {
    child: Child,
    serial: TcpStream,
    config: MachineConfig,
    ended: bool,
}

impl Machine {
    /// The first serial port, both ways. It reads as ended when the machine
    /// is off.
    pub fn serial(&self) -> &TcpStream {
        &self.serial
    }

    /// Whether the emulator has ended.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn has_ended(&mut self) -> Result<bool> {
        self.ended = self.ended || self.child.try_wait()?.is_some();
        Ok(self.ended)
    }

    /// Waits for the end, for no longer than `limit`; says whether it came.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn wait(&mut self, limit: Duration) -> Result<bool> {
        let start = Instant::now();
        while !self.has_ended()? {
            if start.elapsed() > limit {
                return Ok(false);
            }
            sleep(POLL);
        }
        Ok(true)
    }

    /// Ends the machine now, with all its processes.
    pub fn stop(&mut self) {
        kill_group(&mut self.child);
        self.ended = true;
        self.config.remove_locks();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn kill_group(child: &mut Child) {
    // Until it is waited for, the process keeps its id, so the group is ours.
    if let (Ok(None), Ok(pid)) = (child.try_wait(), i32::try_from(child.id())) {
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = child.wait();
}

impl Machine {
    /// Starts an emulator in a process group of its own, and waits until it
    /// connects its first serial port. `command` makes the command for the
    /// TCP port on 127.0.0.1 that it is to connect to; what it prints goes
    /// into [`MachineConfig::log`].
    ///
    /// # Errors
    /// When it does not start, ends at once or does not connect.
    pub fn start(
        config: &MachineConfig,
        command: impl FnOnce(u16) -> Result<Command>,
    ) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .context("cannot open a port for the serial line")?;
        let mut command = command(listener.local_addr()?.port())?;
        config.remove_locks();
        let log = config.log();
        let output =
            File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command
            .current_dir(&config.folder)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0);
        let name = program_of(&command);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        match accept(&listener, &mut child) {
            Ok(serial) => Ok(Self {
                child,
                serial,
                config: config.clone(),
                ended: false,
            }),
            Err(error) => {
                kill_group(&mut child);
                config.remove_locks();
                Err(error)
            }
        }
    }
}

fn accept(listener: &TcpListener, child: &mut Child) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let start = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if child.try_wait()?.is_some() {
            bail!("the emulator has ended before it connected its serial port");
        }
        if start.elapsed() > CONNECT {
            bail!(
                "the emulator has not connected its serial port within {} s",
                CONNECT.as_secs()
            );
        }
        sleep(POLL);
    }
}

/// A command for `program` that the kernel ends together with us, even when we
/// are killed. Without `setpriv` (package util-linux) only [`Machine`]'s own
/// ends remain.
pub fn bound_command(program: &Path) -> Command {
    match paths::find_program("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// The program that a command runs, also where [`bound_command`] made it.
pub fn program_of(command: &Command) -> String {
    let mut arguments = command.get_args().skip_while(|argument| *argument != "--");
    let program = arguments.nth(1).unwrap_or(command.get_program());
    program.to_string_lossy().into_owned()
}

/// The last lines of a log that say why something failed.
fn last_words(log: &Path, wanted: impl Fn(&str) -> bool) -> String {
    let mut bytes = Vec::new();
    let _ = File::open(log).and_then(|mut file| file.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| wanted(line))
        .collect();
    let first = lines.len().saturating_sub(3);
    lines.drain(..first);
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str) -> MachineConfig {
        let folder = std::env::temp_dir().join(format!("vireo-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        MachineConfig::new(&folder.join("disk.img"), &folder, 256 << 20)
    }

    #[test]
    fn a_machine_has_room_beside_its_guests() {
        assert_eq!(memory_for(256 << 20), 416);
        assert_eq!(memory_for(1), 192);
    }

    #[test]
    fn an_emulator_that_ends_at_once_is_reported() {
        let config = config("ends");
        let error = Machine::start(&config, |_| Ok(Command::new("true")))
            .err()
            .unwrap();
        assert!(error.to_string().contains("ended before"), "{error}");
        fs::remove_dir_all(config.folder).unwrap();
    }

    #[test]
    fn the_end_of_a_machine_is_the_end_of_all_its_processes() {
        let config = config("group");
        let mut machine = Machine::start(&config, |port| {
            let mut command = bound_command(Path::new("/bin/bash"));
            // A child of the "emulator" holds the line open too.
            let script =
                format!("exec 3<>/dev/tcp/127.0.0.1/{port}; sleep 100 & echo ready >&3; wait");
            command.args(["-c", &script]);
            Ok(command)
        })
        .unwrap();
        let mut line = [0; 6];
        machine.serial().read_exact(&mut line).unwrap();
        assert!(!machine.wait(Duration::ZERO).unwrap());
        machine.stop();
        machine
            .serial()
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        assert_eq!(machine.serial().read(&mut line).unwrap(), 0);
        fs::remove_dir_all(config.folder).unwrap();
    }
}
