//! `cargo xtask run`: from nothing to a guest's shell.

use crate::build::Built;
use crate::figures::{Baseline, Boot, Figures};
use crate::machine::{Bare, Machine, MachineConfig, Platform, nested_vmx, rig};
use crate::progress::Progress;
use crate::provision::Provisioner;
use crate::session::{End, Limit, Report, Session, Streams, input_is_terminal};
use crate::verdict::Verdict;
use crate::volume::{Job, OneConsole, Single, Volume};
use crate::{build, image, paths, symbols};
use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vireo_handoff::config::{ApicMode, Protocol, Statistics, parse_size};

/// How long a machine may be silent where nobody is there to notice it.
const UNATTENDED: Duration = Duration::from_secs(600);

/// The disk image in the folder of a run.
pub(crate) const DISK: &str = "disk.img";

/// Which guests are put on the boot volume.
#[derive(Args, Debug, Default)]
pub struct GuestOptions {
    /// The configuration file; the files that it names stand below its folder
    #[arg(long, value_name = "FILE", conflicts_with_all = ["image", "firmware", "modules", "initrd", "cmdline", "memory", "vcpus", "apic", "statistics", "test_device", "no_x2apic"])]
    pub config: Option<PathBuf>,
    /// The guest's kernel, instead of Debian's; how it is started is seen from the file
    #[arg(long, value_name = "FILE", group = "image")]
    pub kernel: Option<PathBuf>,
    /// A kernel to start by multiboot
    #[arg(long, value_name = "FILE", group = "image")]
    pub multiboot: Option<PathBuf>,
    /// A kernel to start by PVH
    #[arg(long, value_name = "FILE", group = "image")]
    pub pvh: Option<PathBuf>,
    /// Firmware to start at the reset vector; --kernel and --initrd are what it is given
    #[arg(long, value_name = "FILE", conflicts_with_all = ["multiboot", "pvh", "modules"])]
    pub firmware: Option<PathBuf>,
    /// A file for a kernel that is started by multiboot or PVH, and what it is told about it
    #[arg(long = "module", value_name = "FILE[=CMDLINE]", value_parser = module)]
    pub modules: Vec<(PathBuf, String)>,
    /// The guest's initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// The guest's memory, for example 256M or 1G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<u64>,
    /// The number of the guest's virtual CPUs
    #[arg(long, value_name = "NUMBER")]
    pub vcpus: Option<u32>,
    /// How much of the guest's local APIC the CPU is
    #[arg(long, value_name = "TIER", value_parser = apic_mode())]
    pub apic: Option<ApicMode>,
    /// Record how long the guest's exits take, and show a table of them at its end
    #[arg(long)]
    pub statistics: bool,
    /// Give the guest the device that test suites expect
    #[arg(long)]
    pub test_device: bool,
    /// Give the guest's local APICs no x2APIC mode
    #[arg(long)]
    pub no_x2apic: bool,
}

/// `cargo xtask run`
#[derive(Args, Debug)]
pub struct Options {
    #[command(flatten)]
    guest: GuestOptions,
    /// Boot this disk image, as `image` makes them, instead of making one
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "image", "firmware", "modules", "initrd", "cmdline", "memory", "vcpus", "apic", "statistics", "test_device", "no_x2apic", "exec"])]
    disk: Option<PathBuf>,
    /// Run COMMAND in the guest's shell, print its output, power off, and exit with its status
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// The guest of --config whose shell runs the command or reads the input; else its first
    #[arg(long, value_name = "NAME", requires = "config")]
    vm: Option<String>,
    /// What the machine runs on; auto is QEMU where KVM offers VMX, else Bochs
    #[arg(long, value_enum, default_value_t = PlatformChoice::Auto)]
    platform: PlatformChoice,
    /// The emulator's CPU model, by the emulator's name for it
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// The machine's CPUs; left out, as many as the guests' `cpus` name
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=64))]
    smp: Option<u32>,
    /// The whole machine's memory; what is left out is what the guests and Vireo need
    #[arg(long, value_name = "SIZE", value_parser = size)]
    machine_memory: Option<u64>,
    /// Keep what the emulator writes, and the console's log, in this folder
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// End a machine that takes longer; without a terminal, one is ended that says nothing for 600
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// What the machine's second serial port is: a terminal's device, or a file for what is sent there; left out, com2.log in the folder where a guest has that port
    #[arg(long, value_name = "FILE")]
    com2: Option<PathBuf>,
    /// Bochs: executed instructions that make an emulated second; figures in time need 400000000
    #[arg(long, value_name = "NUMBER", default_value_t = MachineConfig::FUNCTIONAL_IPS)]
    ips: u64,
}

/// `--platform`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlatformChoice {
    /// QEMU where KVM offers VMX, else Bochs
    Auto,
    /// Bochs, which emulates VT-x
    Bochs,
    /// QEMU, with KVM or without VT-x
    Qemu,
    /// QEMU with KVM on Linux in Bochs: slow, and as strict as KVM where there is no VT-x
    Nested,
    /// The guest's kernel on Bochs itself, without Vireo: the baseline for what Vireo costs
    Bare,
}

impl PlatformChoice {
    /// The platform, provisioned. `auto` does not take a QEMU that is missing.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn provision(self, provisioner: &Provisioner) -> Result<Box<dyn Platform>> {
        match self {
            Self::Nested => return Ok(Box::new(provisioner.rig()?)),
            Self::Bare => return Ok(Box::new(provisioner.bare()?)),
            _ => {}
        }
        let qemu = match self {
            Self::Auto if nested_vmx() => provisioner.qemu().ok(),
            Self::Qemu => Some(provisioner.qemu()?),
            _ => None,
        };
        Ok(match qemu {
            Some(qemu) => Box::new(qemu),
            None => Box::new(provisioner.bochs()?),
        })
    }
}

impl GuestOptions {
    /// The boot volume for these guests.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn volume(
        &self,
        job: Option<&Job>,
        terminal: bool,
        provisioner: &Provisioner,
    ) -> Result<Volume> {
        if let Some(config) = &self.config {
            return Volume::from_config(config, job, provisioner);
        }
        let (kernel, protocol) = match (&self.kernel, &self.multiboot, &self.pvh) {
            (_, Some(file), _) => (Some(file), Protocol::Multiboot),
            (_, _, Some(file)) => (Some(file), Protocol::Pvh),
            (kernel, ..) => (kernel.as_ref(), Protocol::Auto),
        };
        let single = Single {
            kernel: kernel.map(PathBuf::as_path),
            protocol,
            firmware: self.firmware.as_deref(),
            modules: &self.modules,
            initrd: self.initrd.as_deref(),
            cmdline: self.cmdline.as_deref(),
            memory: self.memory,
            vcpus: self.vcpus,
            apic: self.apic,
            test_device: self.test_device,
            x2apic: !self.no_x2apic,
            statistics: if self.statistics {
                Statistics::Times
            } else {
                Statistics::default()
            },
        };
        let (rows, columns) = console::Term::stdout().size();
        let name = std::env::var("TERM").unwrap_or_default();
        let terminal = terminal.then_some((columns, rows, name.as_str()));
        Volume::single(&single, job, terminal, provisioner)
    }
}

/// Runs the command, and returns the exit code.
///
/// # Errors
/// One sentence for whatever went wrong.
pub fn run(options: &Options) -> Result<u8> {
    let start = Instant::now();
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let terminal = options.exec.is_none() && input_is_terminal();
    let nonce = nonce()?;
    let job = Job {
        nonce: &nonce,
        command: options.exec.as_deref(),
        programs: &[],
        vm: options.vm.as_deref(),
    };
    let disk = match &options.disk {
        Some(given) => Disk::Given(given),
        None => Disk::Volume(options.guest.volume(
            (!terminal).then_some(&job),
            terminal,
            &provisioner,
        )?),
    };
    let platform = options.platform.provision(&provisioner)?;
    let bare = match options.platform {
        PlatformChoice::Bare => Some(provisioner.bare()?),
        _ => None,
    };
    progress.clear();
    let system = match bare {
        Some(bare) => System::Guest(bare),
        None => System::Vireo(build::all()?),
    };

    let folder = RunFolder::create(options.folder.as_deref())?;
    progress.stage("disk image");
    let com2 = options.com2.clone();
    let com2 = com2.or_else(|| disk.has_com2().then(|| folder.path.join("com2.log")));
    let mut config = MachineConfig {
        cpu_model: options.cpu.clone(),
        ips: options.ips,
        cpus: options.smp.unwrap_or_else(|| disk.cpus()),
        com2,
        ..MachineConfig::new(&folder.path.join(DISK), &folder.path, disk.memory())
    };
    let fingerprint = disk.fingerprint();
    let console = disk.console();
    let has_job = matches!(&disk, Disk::Volume(volume) if volume.has_job);
    system.write_disk(disk, &mut config)?;
    if let Some(bytes) = options.machine_memory {
        config.memory_mib = bytes.div_ceil(1 << 20);
    }
    let machine = power_on(platform.as_ref(), &config, &progress)?;
    let streams = if terminal {
        Streams::Terminal
    } else if !has_job {
        Streams::Console
    } else {
        Streams::Job {
            nonce: &nonce,
            input: !input_is_terminal(),
            console: console.as_ref(),
        }
    };
    let limit = match options.timeout {
        Some(seconds) => Limit::Total(Duration::from_secs(seconds)),
        None if terminal => Limit::None,
        None => Limit::Silence(UNATTENDED),
    };
    let log = folder.path.join("serial.log");
    let report = Session {
        machine,
        vireo: matches!(system, System::Vireo(_)),
        streams,
        output: &mut io::stdout(),
        log,
        limit,
        progress: &progress,
    }
    .run();
    progress.clear();
    folder.close();
    if report.prompt.is_some() {
        let baseline = fingerprint
            .map(|guest| Baseline::new(guest, options.ips, options.cpu.as_deref()))
            .filter(|_| platform.counts_instructions());
        let figures = Figures {
            boot: system.boot(report.init, baseline)?,
            kernel: system.built().map(|built| built.size),
            memory: report.watcher.memory,
            prompt: report.prompt.map(|prompt| prompt - start),
            exits: &report.watcher.exits,
        };
        eprint!("{figures}");
    }
    if let Some(built) = system.built() {
        show_backtrace(&report, &built.kernel);
    }
    Ok(match report.end? {
        End::Status(status) => u8::try_from(status).unwrap_or(1),
        End::Left => 0,
        End::Signal(number) => u8::try_from(128 + number).unwrap_or(1),
    })
}

/// What a machine boots.
pub(crate) enum Disk<'a> {
    /// An image is made of it.
    Volume(Volume),
    /// An image that exists.
    Given(&'a Path),
}

impl Disk<'_> {
    /// Bytes of memory of the guests; assumed where only they know.
    pub(crate) fn memory(&self) -> u64 {
        match self {
            Self::Volume(volume) => volume.memory(),
            Self::Given(_) => 256 << 20,
        }
    }

    /// CPUs that the guests need; assumed where only they know.
    fn cpus(&self) -> u32 {
        match self {
            Self::Volume(volume) => volume.cpus(),
            Self::Given(_) => 1,
        }
    }

    /// Whether a guest has the second serial port.
    fn has_com2(&self) -> bool {
        match self {
            Self::Volume(volume) => volume.has_com2(),
            Self::Given(_) => false,
        }
    }

    /// See [`Volume::console`].
    fn console(&self) -> Option<OneConsole> {
        match self {
            Self::Volume(volume) => volume.console.clone(),
            Self::Given(_) => None,
        }
    }

    /// See [`Volume::fingerprint`].
    fn fingerprint(&self) -> Option<u64> {
        match self {
            Self::Volume(volume) => volume.fingerprint,
            Self::Given(_) => None,
        }
    }
}

/// What runs on the machine.
pub(crate) enum System {
    /// Vireo, and guests in it.
    Vireo(Built),
    /// The guest itself, without Vireo.
    Guest(Bare),
}

impl System {
    /// Writes the disk of a machine, and completes its configuration.
    pub(crate) fn write_disk(&self, disk: Disk, config: &mut MachineConfig) -> Result<()> {
        match (self, disk) {
            (Self::Vireo(built), Disk::Volume(volume)) => image::write(
                &config.disk,
                &volume.into_files(paths::read(&built.loader)?),
            ),
            // A copy: machines write too.
            (Self::Vireo(_), Disk::Given(given)) => fs::copy(given, &config.disk)
                .map(drop)
                .with_context(|| format!("cannot read the disk image {}", given.display())),
            (Self::Guest(bare), Disk::Volume(volume)) => {
                let guest = volume.only_guest()?;
                config.memory_mib = volume.memory().div_ceil(1 << 20);
                config.cpus = guest.vm.vcpus;
                bare.write_disk(&config.disk, &guest, config.ips)
            }
            (Self::Guest(_), Disk::Given(_)) => {
                bail!("--disk is for machines with Vireo: leave --platform bare or --disk away")
            }
        }
    }

    /// What is built for it.
    pub(crate) fn built(&self) -> Option<&Built> {
        match self {
            Self::Vireo(built) => Some(built),
            Self::Guest(_) => None,
        }
    }

    /// What the boot took. It is kept where it is the `baseline`, which exists
    /// where ticks are instructions.
    fn boot(&self, ticks: Option<u64>, baseline: Option<Baseline>) -> Result<Option<Boot>> {
        Ok(match (self, ticks, baseline) {
            (_, None, _) => None,
            (Self::Guest(_), Some(count), baseline) => {
                baseline.map_or(Ok(()), |baseline| baseline.write(count))?;
                Some(Boot::Bare(count))
            }
            (Self::Vireo(_), Some(count), Some(baseline)) => {
                Some(Boot::Instructions(count, baseline.read()))
            }
            (Self::Vireo(_), Some(ticks), None) => Some(Boot::Ticks(ticks)),
        })
    }
}

/// `cargo xtask image`
///
/// # Errors
/// One sentence for whatever went wrong.
pub fn make_image(output: &Path, guest: &GuestOptions) -> Result<()> {
    let progress = Progress::new();
    let volume = guest.volume(None, false, &Provisioner::new(&progress))?;
    progress.clear();
    let built = build::all()?;
    image::write(output, &volume.into_files(paths::read(&built.loader)?))?;
    eprintln!(
        "{}: write it to a whole disk or USB stick, and boot that with UEFI",
        output.display()
    );
    Ok(())
}

pub(crate) fn power_on(
    platform: &dyn Platform,
    config: &MachineConfig,
    progress: &Progress,
) -> Result<Machine> {
    progress.stage(&format!(
        "starting {} with {} MiB",
        platform.name(),
        config.memory_mib
    ));
    platform.start(config)
}

/// The hypervisor prints addresses; the functions are known here.
fn show_backtrace(report: &Report, kernel: &Path) {
    let panicked = report
        .watcher
        .verdicts
        .iter()
        .any(|verdict| matches!(verdict, Verdict::Panic(_)));
    if !panicked {
        return;
    }
    for line in &report.watcher.aftermath {
        eprintln!("{line}");
    }
    match symbols::backtrace(kernel, &report.watcher.aftermath) {
        Ok(lines) => lines.iter().for_each(|line| eprintln!("  {line}")),
        Err(error) => eprintln!("{error:#}"),
    }
}

/// Sixteen random hexadecimal digits.
pub(crate) fn nonce() -> Result<String> {
    let mut bytes = [0; 8];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(format!("{:016x}", u64::from_le_bytes(bytes)))
}

/// A folder for one run.
pub(crate) struct RunFolder {
    pub(crate) path: PathBuf,
}

impl RunFolder {
    /// Creates it: `given`, or one named by our process id, after removing
    /// those of processes that are gone.
    pub(crate) fn create(given: Option<&Path>) -> Result<Self> {
        let path = match given {
            Some(given) => std::path::absolute(given).context("no such folder is possible")?,
            None => {
                let all = paths::target().join("run");
                for entry in fs::read_dir(&all).into_iter().flatten().flatten() {
                    if !Path::new("/proc").join(entry.file_name()).exists() {
                        let _ = fs::remove_dir_all(entry.path());
                    }
                }
                all.join(std::process::id().to_string())
            }
        };
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path })
    }

    /// The logs stay: in a folder of ours until the next run.
    pub(crate) fn close(self) {
        for image in [DISK, rig::DISK] {
            let _ = fs::remove_file(self.path.join(image));
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "expected a size such as 256M or 1G".into())
}

/// `FILE[=CMDLINE]`; a name with = in it is taken as a whole where there is such a file.
fn module(text: &str) -> Result<(PathBuf, String), String> {
    match text.split_once('=') {
        Some((file, cmdline)) if !Path::new(text).exists() => Ok((file.into(), cmdline.to_owned())),
        _ => Ok((text.into(), String::new())),
    }
}

/// The names of the configuration.
fn apic_mode() -> impl TypedValueParser<Value = ApicMode> {
    PossibleValuesParser::new(ApicMode::ALL.map(ApicMode::name)).map(|name| {
        let mode = ApicMode::ALL.into_iter().find(|mode| mode.name() == name);
        mode.unwrap_or_default()
    })
}
