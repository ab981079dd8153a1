//! QEMU with KVM where there is no VT-x: Linux in Bochs runs it, so that Bochs
//! lends its VT-x to the real KVM, and KVM nests ours in its own.
//!
//! Slow, but KVM is stricter than Bochs about VM entries, MSRs and
//! translations that were not invalidated, and offers another selection of
//! VT-x. The Linux in between ([`INIT`]) has no other task than QEMU; it boots
//! from a disk of its own as a unified kernel image, and QEMU gets Bochs's
//! second disk and Bochs's serial port. So the console of the machine under
//! test is the console here.

use super::{Bochs, Machine, MachineConfig, Platform};
use crate::cpio::Archive;
use crate::image::{self, Entry, LOADER};
use crate::{paths, uki};
use anyhow::{Result, ensure};
use std::path::PathBuf;

/// Where the parts of the archive that [`Rig::archive`] names lie in it.
pub mod inside {
    /// The modules, by [`super::MODULES`].
    pub const MODULES: &str = "modules";
    /// QEMU.
    pub const QEMU: &str = "bin/qemu";
    /// The shared libraries that QEMU needs.
    pub const LIBRARIES: &str = "lib";
    /// QEMU's option ROMs.
    pub const ROMS: &str = "roms";
    /// The firmware of the machine under test.
    pub const FIRMWARE: &str = "firmware.fd";
}

/// The disk of the Linux in between, in the machine's folder.
pub const DISK: &str = "linux.img";

/// The kernel modules in the order in which they are loaded, by their path
/// below the folder `kernel` of the modules: KVM, and Bochs's disks.
pub const MODULES: [&str; 8] = [
    "virt/lib/irqbypass",
    "arch/x86/kvm/kvm",
    "arch/x86/kvm/kvm-intel",
    "drivers/scsi/scsi_common",
    "drivers/scsi/scsi_mod",
    "drivers/ata/libata",
    "drivers/scsi/sd_mod",
    "drivers/ata/ata_piix",
];

/// The busybox applets that [`INIT`] uses.
pub const APPLETS: [&str; 8] = [
    "sh", "mount", "stty", "insmod", "usleep", "tail", "reboot", "cat",
];

/// MiB for the Linux in between: its kernel, its files (which are in memory),
/// QEMU.
const OWN_MEMORY: u64 = 320;

/// Instructions in an emulated second. With fewer, the three kernels' periodic
/// ticks take most of them.
const LEAST_IPS: u64 = 100_000_000;

/// First process of the Linux in between. What goes wrong is said as the
/// hypervisor would say it, so that it is found on the console. `stty` returns
/// when the serial port has sent everything.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin LD_LIBRARY_PATH=/@LIBRARIES@
finish() {
    [ -z "$1" ] || echo "vireo: error: no QEMU with KVM in Bochs: $1: $(tail -n 1 /errors)"
    stty raw -echo
    reboot -f
}
mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS0 >/dev/ttyS0 2>/errors
for module in @MODULES@; do
    insmod "/modules/${module##*/}.ko" || finish "the module $module"
done
tries=0
until [ -b /dev/sdb ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || finish 'the second disk has not appeared'
    usleep 100000
done
@RUN@ || finish 'QEMU has failed'
finish
"#;

/// How [`INIT`] runs QEMU.
const RUN: &str = "@QEMU@ -serial /dev/ttyS0";

/// The same with KVM's exits so far behind each line of the console.
const RUN_AND_COUNT: &str = r#"set -o pipefail
mount -t debugfs debugfs /debug
@QEMU@ -serial stdio </dev/null | while IFS= read -r line; do
    read -r exits </debug/kvm/exits
    echo "$line"
    echo "@COUNT@$exits"
done"#;

/// What [`Rig::counts`] puts in front of a count, on a line of its own.
pub const COUNT: &str = "kvm: exits: ";

/// The command line of the Linux in between.
///
/// * What Bochs's CPU model gets wrong is hidden (`clearcpuid`: fast short
///   moves without fast strings, save areas whose sizes do not add up), and its
///   false frequency is overruled (`tsc_early_khz`).
/// * There are no ACPI tables to power off by: `reboot=t` is a triple fault,
///   which ends Bochs. So does a panic (`panic=-1`).
/// * The rest saves time.
const CMDLINE: &str = "console=ttyS0,115200 quiet loglevel=1 reboot=t panic=-1 \
     clearcpuid=fsrm,pku,xsaves,xsavec tsc=reliable no_timer_check nokaslr mitigations=off \
     random.trust_cpu=on lsm=capability cryptomgr.notests \
     initcall_blacklist=load_system_certificate_list,init_blk_tracer,init_kprobe_trace,i8042_init";

/// The parts of a nested machine.
#[derive(Clone, Debug)]
pub struct Rig {
    /// The emulator.
    pub bochs: Bochs,
    /// systemd's stub for unified kernel images.
    pub stub: PathBuf,
    /// The kernel of the Linux in between.
    pub kernel: PathBuf,
    /// Its initramfs but for the first process: busybox, the modules, and QEMU
    /// with all that it needs, see [`inside`].
    pub archive: PathBuf,
    /// Each line of the console is followed by KVM's exits so far, see [`COUNT`].
    pub counts: bool,
}

impl Platform for Rig {
    fn name(&self) -> &'static str {
        "QEMU with KVM in Bochs"
    }

    fn time(&self) -> u64 {
        self.bochs.time()
    }

    fn start(&self, config: &MachineConfig) -> Result<Machine> {
        let ips = config.ips.max(LEAST_IPS);
        let mut initramfs = Archive::new();
        initramfs.file("init", 0o755, init(config, self.counts)?.as_bytes());
        initramfs.directory("debug");
        let mut initramfs = initramfs.finish();
        // Behind ours: what follows an LZ4 archive is taken for a chunk of it.
        initramfs.extend(paths::read(&self.archive)?);
        let cmdline = format!("{CMDLINE} tsc_early_khz={}", ips / 1000);
        let application = uki::build(
            &paths::read(&self.stub)?,
            &[
                (".cmdline", cmdline.as_bytes()),
                (".initrd", &initramfs),
                (".linux", &paths::read(&self.kernel)?),
            ],
        )?;
        let disk = config.folder.join(DISK);
        let path = LOADER.into();
        let contents = application;
        image::write(&disk, &[Entry { path, contents }])?;
        self.bochs.start(&MachineConfig {
            disk,
            com2: None,
            second_disk: Some(config.disk.clone()),
            folder: config.folder.clone(),
            memory_mib: config.memory_mib + OWN_MEMORY,
            cpus: 1,
            cpu_model: None,
            ips,
        })
    }
}

fn init(config: &MachineConfig, counts: bool) -> Result<String> {
    let model = config.cpu_model.as_deref().unwrap_or("host");
    let plain = |c: char| c.is_ascii_alphanumeric() || ",.-_+=".contains(c);
    ensure!(
        model.chars().all(plain),
        "{model} is no CPU model of QEMU's"
    );
    let qemu = format!(
        "/{} -L /{} -bios /{} -nodefaults -display none -no-reboot -machine pc -accel kvm \
         -cpu {model} -smp {} -m {}M -drive file=/dev/sdb,format=raw,if=none,id=disk \
         -device virtio-blk-pci,drive=disk,bootindex=0",
        inside::QEMU,
        inside::ROMS,
        inside::FIRMWARE,
        config.cpus,
        config.memory_mib
    );
    Ok(INIT
        .replace("@LIBRARIES@", inside::LIBRARIES)
        .replace("@MODULES@", &MODULES.join(" "))
        .replace("@RUN@", if counts { RUN_AND_COUNT } else { RUN })
        .replace("@COUNT@", COUNT)
        .replace("@QEMU@", &qemu))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(model: &str) -> MachineConfig {
        MachineConfig {
            cpu_model: Some(model.into()),
            ..MachineConfig::new(Path::new("disk.img"), Path::new(""), 256 << 20)
        }
    }

    #[test]
    fn the_first_process_starts_the_machine_that_is_wanted() {
        for counts in [false, true] {
            let script = init(&config("host,-vmx-vpid,level=0x16"), counts).unwrap();
            assert!(script.contains("-cpu host,-vmx-vpid,level=0x16 -smp 1 -m 416M"));
            assert!(script.contains("for module in virt/lib/irqbypass arch/x86/kvm/kvm "));
            assert_eq!(script.contains("debugfs"), counts);
            for placeholder in ["@LIBRARIES@", "@MODULES@", "@RUN@", "@COUNT@", "@QEMU@"] {
                assert!(!script.contains(placeholder));
            }
        }
    }

    #[test]
    fn a_cpu_model_does_not_reach_the_shell() {
        let error = init(&config("host; reboot"), false).unwrap_err();
        assert!(error.to_string().contains("no CPU model"), "{error}");
    }
}
