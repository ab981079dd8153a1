//! QEMU: with KVM where that offers VMX to its guests, else its own emulator,
//! which has no VT-x at all and so shows what the hypervisor says then.

use super::{Emulator, Machine, MachineConfig, Platform, is_device, last_words};
use anyhow::Result;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

/// A QEMU and the firmware for its machines.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program.
    pub emulator: Emulator,
    /// OVMF.
    pub firmware: PathBuf,
}

/// Whether KVM is usable here and offers VMX to its guests.
pub fn nested_vmx() -> bool {
    let nested = fs::read_to_string("/sys/module/kvm_intel/parameters/nested");
    let nested = nested.is_ok_and(|value| matches!(value.trim(), "Y" | "1"));
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    nested
        && has_flag(&flags, "vmx")
        && File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .any(|(key, flags)| {
            key.trim() == "flags" && flags.split_whitespace().any(|word| word == flag)
        })
}

impl Platform for Qemu {
    fn name(&self) -> &'static str {
        if nested_vmx() {
            "QEMU with KVM"
        } else {
            "QEMU without VT-x"
        }
    }

    fn start(&self, config: &MachineConfig) -> Result<Machine> {
        Machine::start(config, |port| Ok(self.command(config, port))).map_err(|error| {
            let words = last_words(&config.log(), |line| !line.is_empty());
            error.context(format!(
                "QEMU ({}) does not start: {words}",
                self.emulator.program.display()
            ))
        })
    }
}

impl Qemu {
    fn command(&self, config: &MachineConfig, port: u16) -> Command {
        let kvm = nested_vmx();
        let model = config
            .cpu_model
            .as_deref()
            .unwrap_or(if kvm { "host,+vmx" } else { "max" });
        let mut command = self.emulator.command();
        command
            .args([
                "-machine",
                "pc",
                "-accel",
                if kvm { "kvm" } else { "tcg" },
                "-cpu",
                model,
            ])
            .args([
                "-smp",
                &config.cpus.to_string(),
                "-m",
                &format!("{}M", config.memory_mib),
            ])
            .arg("-bios")
            .arg(&self.firmware)
            // In an option's value, a comma is written twice.
            .args([
                "-drive",
                &format!(
                    "format=raw,file={}",
                    config.disk.display().to_string().replace(',', ",,")
                ),
            ])
            .args([
                "-chardev",
                &format!("socket,id=com1,host=127.0.0.1,port={port}"),
                "-serial",
                "chardev:com1",
            ])
            .args(config.com2.iter().flat_map(|path| {
                let kind = if is_device(path) { "serial" } else { "file" };
                let path = path.display().to_string().replace(',', ",,");
                let device = format!("{kind},id=com2,path={path}");
                ["-chardev", &device, "-serial", "chardev:com2"].map(str::to_owned)
            }))
            .args([
                "-display",
                "none",
                "-monitor",
                "none",
                "-nic",
                "none",
                "-no-reboot",
            ]);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::has_flag;

    #[test]
    fn a_flag_is_a_whole_word_of_the_flags_line() {
        let text = "model name\t: vmx\nflags\t\t: fpu vmx_like sse\nvmx flags\t: vmx vnmi\n";
        assert!(!has_flag(text, "vmx"));
        assert!(has_flag("flags\t\t: fpu vmx sse\n", "vmx"));
    }
}
