//! The figures of a run with a job: what the guest's boot took beside the same
//! boot without Vireo, what Vireo takes up, and how long the user waited.
//!
//! The boot without Vireo is measured by `--platform bare` and kept under
//! `target/baseline/`, in a file named by what the figure depends on.

use crate::machine::bare;
use crate::paths;
use anyhow::{Context, Result};
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::Duration;

/// What is known at the end of a run; what is not known is not shown.
#[derive(Debug, Default)]
pub struct Figures<'a> {
    /// What the boot took, from the kernel's first instruction to the first process.
    pub boot: Option<Boot>,
    /// Bytes of the kernel's image.
    pub kernel: Option<u64>,
    /// Memory, as the hypervisor says it.
    pub memory: Option<Memory>,
    /// From the start of the command to the guest's shell.
    pub prompt: Option<Duration>,
    /// What the hypervisor says of exits whose times it has recorded.
    pub exits: &'a [String],
}

/// What a boot took.
#[derive(Clone, Copy, Debug)]
pub enum Boot {
    /// Ticks of a time-stamp counter that does not count instructions.
    Ticks(u64),
    /// Instructions on the emulator without Vireo.
    Bare(u64),
    /// Instructions, and those on the emulator without Vireo.
    Instructions(u64, Option<u64>),
}

/// Memory in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The hypervisor's own.
    pub hypervisor: u64,
    /// The guests'.
    pub guests: u64,
}

impl Memory {
    /// From the hypervisor's line: `vireo: memory: N KiB hypervisor, M KiB guests`.
    pub fn parse(line: &str) -> Option<Self> {
        let text = line.trim_end().strip_prefix("vireo: memory: ")?;
        let (hypervisor, guests) = text.split_once(", ")?;
        Some(Self {
            hypervisor: hypervisor.strip_suffix(" KiB hypervisor")?.parse().ok()?,
            guests: guests.strip_suffix(" KiB guests")?.parse().ok()?,
        })
    }
}

impl Display for Boot {
    fn fmt(&self, out: &mut Formatter) -> fmt::Result {
        let millions = |count: u64| count as f64 / 1e6;
        match *self {
            Self::Ticks(ticks) => write!(out, "{:.1} million ticks to /init", millions(ticks)),
            Self::Bare(count) => write!(
                out,
                "{:.1} million instructions to /init on the bare emulator",
                millions(count)
            ),
            Self::Instructions(count, Some(bare)) => write!(
                out,
                "{:.1} million instructions to /init, {:.2} of the bare emulator's {:.1} million",
                millions(count),
                count as f64 / bare as f64,
                millions(bare)
            ),
            Self::Instructions(count, None) => write!(
                out,
                "{:.1} million instructions to /init (--platform bare measures the bare emulator's)",
                millions(count)
            ),
        }
    }
}

impl Display for Figures<'_> {
    fn fmt(&self, out: &mut Formatter) -> fmt::Result {
        if let Some(boot) = &self.boot {
            writeln!(out, "boot: {boot}")?;
        }
        if let Some(bytes) = self.kernel {
            writeln!(out, "kernel image: {} KiB", bytes.div_ceil(1024))?;
        }
        if let Some(memory) = self.memory {
            writeln!(
                out,
                "hypervisor memory: {} KiB beside {} KiB of guests",
                memory.hypervisor, memory.guests
            )?;
        }
        if let Some(time) = self.prompt {
            writeln!(out, "prompt: after {:.1} s", time.as_secs_f64())?;
        }
        self.exits
            .iter()
            .try_for_each(|line| writeln!(out, "{line}"))
    }
}

/// Where the figure of a boot without Vireo is kept.
pub struct Baseline {
    file: PathBuf,
}

impl Baseline {
    /// For the guest with this `fingerprint` (see [`crate::volume::Volume`])
    /// on a machine with `ips` and this CPU model.
    pub fn new(fingerprint: u64, ips: u64, cpu_model: Option<&str>) -> Self {
        let mut hasher = DefaultHasher::new();
        (fingerprint, ips, cpu_model, bare::OPTIONS).hash(&mut hasher);
        let name = format!("{:016x}", hasher.finish());
        Self {
            file: paths::target().join("baseline").join(name),
        }
    }

    /// The instructions, where they were measured.
    pub fn read(&self) -> Option<u64> {
        let count = self.read_text()?.trim().parse().ok()?;
        (count > 0).then_some(count)
    }

    /// Keeps what was measured.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, count: u64) -> Result<()> {
        self.write_text(&format!("{count}\n"))
    }

    /// What was measured, where it is more than a number.
    pub fn read_text(&self) -> Option<String> {
        fs::read_to_string(&self.file).ok()
    }

    /// Keeps more than a number.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_text(&self, text: &str) -> Result<()> {
        let folder = self.file.parent().context("no folder for baselines")?;
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&self.file, text))
            .with_context(|| format!("cannot write {}", self.file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_lines_and_what_is_unknown_is_left_out() {
        let mut figures = Figures {
            boot: Some(Boot::Instructions(502_700_000, Some(510_749_999))),
            kernel: Some(453 * 1024 - 5),
            memory: Memory::parse("vireo: memory: 9216 KiB hypervisor, 262144 KiB guests\r"),
            prompt: Some(Duration::from_millis(41_234)),
            exits: &["vm a: 7 ticks".to_owned(), "HLT  1".to_owned()],
        };
        assert_eq!(
            figures.to_string(),
            "boot: 502.7 million instructions to /init, 0.98 of the bare emulator's 510.7 million\n\
             kernel image: 453 KiB\n\
             hypervisor memory: 9216 KiB beside 262144 KiB of guests\n\
             prompt: after 41.2 s\n\
             vm a: 7 ticks\n\
             HLT  1\n"
        );
        figures.boot = Some(Boot::Instructions(1, None));
        assert!(figures.to_string().contains("--platform bare"));
        assert_eq!(Figures::default().to_string(), "");
    }

    #[test]
    fn only_the_memory_line_is_taken_for_one() {
        for line in [
            "vireo: memory: 9 KiB hypervisor",
            "vireo: memory: 9 MiB hypervisor, 1 KiB guests",
            "vireo: memory: 9 KiB hypervisor, 1 KiB guests and more",
            "memory: 9 KiB hypervisor, 1 KiB guests",
        ] {
            assert_eq!(Memory::parse(line), None, "{line}");
        }
    }

    #[test]
    fn baselines_differ_by_what_they_depend_on() {
        let file = |fingerprint, ips, model| Baseline::new(fingerprint, ips, model).file;
        let one = file(1, 2, None);
        assert_eq!(file(1, 2, None), one);
        for other in [file(2, 2, None), file(1, 3, None), file(1, 2, Some("x"))] {
            assert_ne!(other, one);
        }
    }
}
