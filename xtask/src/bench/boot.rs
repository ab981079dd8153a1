//! The machines that the benchmark boots.

use crate::machine::{MachineConfig, Platform};
use crate::progress::Progress;
use crate::run::{DISK, Disk, RunFolder, System, power_on};
use crate::session::{End, Limit, Session, Streams};
use crate::volume::Volume;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

/// Instructions in an emulated second: what the figures in time are for.
pub const IPS: u64 = MachineConfig::TIMED_IPS;

/// How long a machine may take.
const LIMIT: Duration = Duration::from_secs(900);

/// A machine to boot.
pub struct Boot<'a> {
    /// Its folder in that of the run.
    pub name: &'static str,
    pub system: &'a System,
    pub platform: &'a (dyn Platform + Sync),
    pub volume: Volume,
    /// The nonce of a guest that has a job, see [`crate::framing`].
    pub job: Option<&'a str>,
    /// The emulator's CPU model.
    pub cpu: Option<&'a str>,
    /// How many CPUs it has.
    pub cpus: u32,
}

/// What was seen of it.
pub struct Seen {
    /// A job's output, or the console from the loader's first line on.
    pub output: String,
    /// All of the console.
    pub console: String,
    /// Ticks from the kernel's first instruction to the first process.
    pub init: Option<u64>,
    /// How it ended.
    pub end: Result<End>,
}

impl Boot<'_> {
    fn run(self, folder: &Path) -> Result<Seen> {
        let folder = RunFolder::create(Some(&folder.join(self.name)))?;
        let progress = Progress::silent();
        let disk = Disk::Volume(self.volume);
        let mut config = MachineConfig {
            cpu_model: self.cpu.map(str::to_owned),
            ips: IPS,
            cpus: self.cpus,
            ..MachineConfig::new(&folder.path.join(DISK), &folder.path, disk.memory())
        };
        self.system.write_disk(disk, &mut config)?;
        let log = folder.path.join("serial.log");
        let mut output = Vec::new();
        let report = Session {
            machine: power_on(self.platform, &config, &progress)?,
            vireo: self.system.built().is_some(),
            streams: match self.job {
                Some(nonce) => Streams::Job {
                    nonce,
                    input: false,
                    console: None,
                },
                None => Streams::Console,
            },
            output: &mut output,
            log: log.clone(),
            limit: Limit::Total(LIMIT),
            progress: &progress,
        }
        .run();
        folder.close();
        let console = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        Ok(Seen {
            output: String::from_utf8_lossy(&output).into_owned(),
            console: String::from_utf8_lossy(&console).into_owned(),
            init: report.init,
            end: report.end,
        })
    }
}

/// Boots them, as many at once as there are CPUs, and returns what was seen in
/// the same order.
///
/// # Errors
/// When one of them cannot be started.
pub fn run_all(boots: Vec<Boot>, folder: &Path, progress: &Progress) -> Result<Vec<Seen>> {
    let names: Vec<&str> = boots.iter().map(|boot| boot.name).collect();
    let total = boots.len();
    progress.stage(&format!("measuring: {}", names.join(", ")));
    let mut seen: Vec<Option<Result<Seen>>> = Vec::new();
    seen.resize_with(total, || None);
    let (seen, queue) = (Mutex::new(seen), Mutex::new(boots.into_iter().enumerate()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(total) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.next());
                    let Some((index, boot)) = next else { break };
                    let name = boot.name;
                    let result = boot.run(folder);
                    progress.note(&format!("{name}: done"));
                    if let Ok(mut seen) = seen.lock() {
                        seen[index] = Some(result);
                    }
                }
            });
        }
    });
    let seen = seen
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    seen.into_iter()
        .map(|one| one.context("a machine was not measured")?)
        .collect()
}
