//! Bochs, which has VT-x without any hardware for it.

use super::{Emulator, Machine, MachineConfig, Platform, is_device, last_words};
use crate::image::{CYLINDER, HEADS, SECTORS};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The CPU model without another wish: the one with the most of VT-x.
const CPU_MODEL: &str = "corei7_icelake_u";

/// The emulated clock starts here (2026-01-01 00:00 UTC), so that runs can be
/// compared to the tick.
const TIME: u64 = 1_767_225_600;

/// The displays to try: builds have different ones, and none is needed.
const DISPLAYS: [&str; 2] = ["rfb, options=\"timeout=0\"", "nogui"];

/// The most memory in MiB that Bochs takes from the system at once; it puts
/// what the machine uses beyond into a file.
const LARGEST_HOST_MEMORY: u64 = 2048;

/// A Bochs and the firmware for its machines.
#[derive(Clone, Debug)]
pub struct Bochs {
    /// The program.
    pub emulator: Emulator,
    /// The firmware, which ends at 4 GiB: OVMF, or Bochs's own BIOS.
    pub firmware: PathBuf,
    /// The VGA BIOS, without which the firmware does not start.
    pub vga_bios: PathBuf,
}

impl Platform for Bochs {
    fn name(&self) -> &'static str {
        "Bochs"
    }

    fn counts_instructions(&self) -> bool {
        true
    }

    fn time(&self) -> u64 {
        TIME
    }

    fn start(&self, config: &MachineConfig) -> Result<Machine> {
        let debugger = self.emulator.help()?.contains("-rc filename");
        for display in DISPLAYS {
            let error = match Machine::start(config, |port| {
                self.command(config, display, debugger, port)
            }) {
                Ok(machine) => return Ok(machine),
                Err(error) => error,
            };
            let words = last_words(&config.log(), |line| line.contains("PANIC"));
            if !(words.contains("display library") && words.contains("not available")) {
                return Err(error.context(format!(
                    "Bochs ({}) does not start: {words}",
                    self.emulator.program.display()
                )));
            }
        }
        bail!(
            "Bochs ({}) has none of the displays that need no screen, rfb and nogui",
            self.emulator.program.display()
        )
    }
}

impl Bochs {
    fn command(
        &self,
        config: &MachineConfig,
        display: &str,
        debugger: bool,
        port: u16,
    ) -> Result<Command> {
        let file = config.folder.join("bochsrc");
        let text = self.configuration(config, display, port)?;
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = self.emulator.command();
        command.args(["-q", "-f"]).arg(&file);
        if debugger {
            // The debugger waits for a command: "continue".
            let script = config.folder.join("debugger.rc");
            fs::write(&script, "c\n")
                .with_context(|| format!("cannot write {}", script.display()))?;
            command.arg("-rc").arg(script);
        }
        Ok(command)
    }

    fn configuration(&self, config: &MachineConfig, display: &str, port: u16) -> Result<String> {
        let mut disks = disk("master", &config.disk)?;
        if let Some(second) = &config.second_disk {
            disks += &disk("slave", second)?;
        }
        let com2 = config.com2.as_ref().map_or_else(String::new, |path| {
            let mode = if is_device(path) { "term" } else { "file" };
            format!("com2: enabled=1, mode={mode}, dev={}\n", path.display())
        });
        let model = config.cpu_model.as_deref().unwrap_or(CPU_MODEL);
        // `ignore_bad_msrs=1`: the firmware reads MSRs that this CPU lacks.
        // `extension=none`: the firmware keeps to the serial console.
        // `sync=none`: HLT skips to the next event, so idle time costs nothing.
        Ok(format!(
            "cpu: model={model}, count={cpus}, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
             memory: guest={memory}, host={host}\n\
             romimage: file={firmware}, options=fastboot\n\
             vgaromimage: file={vga_bios}\n\
             pci: enabled=1, chipset=i440fx\n\
             vga: extension=none\n\
             {disks}\
             com1: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n\
             {com2}\
             display_library: {display}\n\
             log: bochs.log\n\
             panic: action=fatal\n\
             error: action=report\n\
             info: action=ignore\n\
             clock: sync=none, time0={TIME}\n\
             boot: disk\n",
            cpus = config.cpus,
            ips = config.ips,
            memory = config.memory_mib,
            host = config.memory_mib.min(LARGEST_HOST_MEMORY),
            firmware = self.firmware.display(),
            vga_bios = self.vga_bios.display(),
        ))
    }
}

/// The line for a disk at this place of the first channel.
fn disk(place: &str, path: &Path) -> Result<String> {
    let image = fs::metadata(path)
        .with_context(|| format!("cannot read the disk image {}", path.display()))?;
    let cylinders = image.len() / CYLINDER;
    ensure!(
        cylinders > 0,
        "the disk image {} has {} bytes: a disk that Vireo boots from has more",
        path.display(),
        image.len()
    );
    Ok(format!(
        "ata0-{place}: type=disk, path={}, mode=flat, cylinders={cylinders}, heads={HEADS}, spt={SECTORS}\n",
        path.display(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    /// A Bochs of which only the start is real: it has `display`, connects its
    /// serial port and sends a word.
    const FAKE: &str = r#"#!/bin/bash
[ "$1" = --help ] && exit
[ "$*" = "-q -f $3" ] || { echo ">>PANIC<< unexpected $*"; exit 1; }
display=$(sed -n 's/display_library: \([a-z]*\).*/\1/p' $3)
[ $display = DISPLAY ] || { echo ">>PANIC<< $3:9: display library '$display' not available"; exit 1; }
port=$(sed -n 's/^com1: .*dev=127.0.0.1://p' $3)
exec 3<>/dev/tcp/127.0.0.1/$port
echo hello >&3
"#;

    fn start(name: &str, display: &str) -> Result<String> {
        let folder =
            std::env::temp_dir().join(format!("vireo-bochs-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let program = folder.join("bochs");
        fs::write(&program, FAKE.replace("DISPLAY", display))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let disk = folder.join("disk.img");
        fs::write(&disk, vec![0; CYLINDER as usize])?;
        let bochs = Bochs {
            emulator: Emulator::installed(program),
            firmware: disk.clone(),
            vga_bios: disk.clone(),
        };
        let result = bochs
            .start(&MachineConfig::new(&disk, &folder, 1))
            .and_then(|machine| {
                let mut word = String::new();
                machine.serial().read_to_string(&mut word)?;
                Ok(word)
            });
        fs::remove_dir_all(folder)?;
        result
    }

    #[test]
    fn a_build_without_rfb_and_debugger_starts_too() {
        assert_eq!(start("nogui", "nogui").unwrap(), "hello\n");
    }

    #[test]
    fn a_build_without_a_display_is_reported() {
        let error = start("none", "x11").unwrap_err();
        assert!(error.to_string().contains("rfb and nogui"), "{error:#}");
    }
}
