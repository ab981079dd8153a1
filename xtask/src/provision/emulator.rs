//! The emulators: installed ones, else those of Debian's packages, unpacked
//! with the libraries that the system lacks, else those packages installed.

use super::{LIBRARIES, Provisioner, named_by};
use crate::machine::{Bochs, Emulator, Qemu};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// How an emulator is found and fetched.
pub(super) struct Source {
    /// The environment variable that names another program.
    pub variable: &'static str,
    /// The program, in the order of preference.
    pub programs: &'static [&'static str],
    /// The packages; the program is in the first of them.
    pub packages: &'static [&'static str],
    /// What its help says where it runs at all.
    pub usage: &'static str,
    /// What it needs in its environment when it is unpacked into a folder.
    pub environment: fn(&Path) -> Vec<(String, String)>,
}

const BOCHS: Source = Source {
    variable: "VIREO_BOCHS",
    programs: &["bochs-bin", "bochs"],
    packages: &["bochs", "bochs-term"],
    usage: "Usage: bochs",
    environment: |folder| {
        let plugins = folder.join(LIBRARIES[0]).join("bochs/plugins");
        let share = folder.join("usr/share/bochs");
        [("LTDL_LIBRARY_PATH", plugins), ("BXSHARE", share)]
            .map(|(name, value)| (name.to_owned(), value.display().to_string()))
            .to_vec()
    },
};

const QEMU: Source = Source {
    variable: "VIREO_QEMU",
    programs: &["qemu-system-x86_64"],
    packages: &[
        "qemu-system-x86",
        "qemu-system-common",
        "qemu-system-data",
        "seabios",
    ],
    usage: "usage: qemu-system-x86_64",
    // It looks for its modules and ROM images beside itself.
    environment: |_| Vec::new(),
};

impl Provisioner<'_> {
    /// The Bochs that `VIREO_BOCHS` names, else the installed one, else the
    /// package's.
    ///
    /// # Errors
    /// When there is none and it cannot be fetched.
    pub fn bochs(&self) -> Result<Bochs> {
        Ok(Bochs {
            firmware: self.ovmf()?,
            vga_bios: self.file("vgabios", "usr/share/vgabios/vgabios.bin")?,
            emulator: self.emulator(&BOCHS)?,
        })
    }

    /// The QEMU that `VIREO_QEMU` names, else the installed one, else the
    /// package's.
    ///
    /// # Errors
    /// As for [`Self::bochs`].
    pub fn qemu(&self) -> Result<Qemu> {
        Ok(Qemu {
            emulator: self.qemu_emulator()?,
            firmware: self.ovmf()?,
        })
    }

    /// QEMU's program alone.
    pub(super) fn qemu_emulator(&self) -> Result<Emulator> {
        self.emulator(&QEMU)
    }

    pub(super) fn emulator(&self, source: &Source) -> Result<Emulator> {
        let installed = || source.programs.iter().find_map(|name| self.find(name));
        if let Some(program) = named_by(source.variable)?.or_else(installed) {
            return Ok(Emulator::installed(program));
        }
        let error = match self.unpacked_emulator(source) {
            Ok(emulator) => return Ok(emulator),
            Err(error) => error,
        };
        let packages = source.packages.join(" ");
        if !self.root {
            return Err(error.context(format!(
                "cannot run the emulator from its unpacked package: install it (apt-get install {packages})"
            )));
        }
        self.progress.note(&format!(
            "{packages} does not run unpacked ({error:#}): installing it"
        ));
        let mut arguments = vec!["install", "-y", "--no-install-recommends"];
        arguments.extend(source.packages);
        self.apt_get(&arguments, &self.folder)?;
        let program = installed()
            .with_context(|| format!("the package {packages} has no {}", source.programs[0]))?;
        Ok(Emulator::installed(program))
    }

    /// The emulator with the libraries that the system lacks, in one folder.
    fn unpacked_emulator(&self, source: &Source) -> Result<Emulator> {
        let folder = self.unpacked_with_libraries(source.packages)?;
        let program: PathBuf = folder.join("usr/bin").join(source.programs[0]);
        let libraries = LIBRARIES.map(|path| folder.join(path).display().to_string());
        let mut environment = (source.environment)(&folder);
        environment.push(("LD_LIBRARY_PATH".into(), libraries.join(":")));
        let emulator = Emulator {
            program,
            environment,
        };
        let help = emulator.help()?;
        ensure!(
            help.to_lowercase().contains(&source.usage.to_lowercase()),
            "{}",
            help.lines().next().unwrap_or("it says nothing")
        );
        Ok(emulator)
    }
}
