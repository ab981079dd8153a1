//! Bochs without Vireo: a guest's kernel on the machine itself, the baseline
//! for what Vireo costs.
//!
//! Bochs's own BIOS, which unlike OVMF there has ACPI tables, starts SYSLINUX
//! from a disk without partitions, and that the kernel: one of Linux, or a
//! multiboot kernel with its modules. The first process of a Linux guest
//! counts instructions from the kernel's first one (`stopwatch`). The
//! machine's time-stamp counter runs from power-on, and cannot be set: Bochs
//! would not move the local APIC's deadline with it. So a few instructions in
//! front of the kernel ([`start_stub`]) leave its value in the archive.

use super::{Bochs, Machine, MachineConfig, Platform};
use crate::image::{self, Entry};
use crate::paths;
use crate::volume::Guest;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use vireo_handoff::config::Protocol;

/// What a stock kernel needs on Bochs's CPU models, and what Vireo hides from
/// its guests.
///
/// * `clearcpuid`: fast short moves without fast strings, save areas whose
///   sizes do not add up.
/// * `tsc=reliable`, and `tsc_early_khz` (see [`Bare::write_disk`]): the
///   frequency that CPUID names is not the counter's.
/// * `idle=halt`: MWAIT does not wake on another CPU's store.
/// * `reboot=t`: a reboot or panic ends the machine by a triple fault.
pub const OPTIONS: &str =
    "clearcpuid=fsrm,pku,xsaves,xsavec tsc=reliable idle=halt reboot=t tsc_early_khz=";

/// The files of SYSLINUX's disk.
const KERNEL: &str = "vireo/kernel";
const INITRD: &str = "vireo/initrd";
const CONFIG: &str = "syslinux.cfg";
/// The module of SYSLINUX that starts multiboot kernels, and the one that this needs.
const MULTIBOOT: [&str; 2] = ["mboot.c32", "libcom32.c32"];

/// Fields of the Linux boot protocol's header (Linux, "The Linux/x86 Boot
/// Protocol"), which stand at the same place in the kernel's file and in the
/// boot parameters.
mod header {
    /// Sectors of the real-mode part behind the first; 0 is 4.
    pub const SETUP_SECTS: usize = 0x1f1;
    /// "HdrS", which starts the fields of protocol 2.00 and later.
    pub const MAGIC: usize = 0x202;
    /// Bit 0: the kernel stands at 1 MiB.
    pub const LOADFLAGS: usize = 0x211;
    /// Where the real-mode part jumps to: a boot loader may put a hook there.
    pub const CODE32_START: usize = 0x214;
    /// Where the initrd is in memory.
    pub const RAMDISK_IMAGE: u32 = 0x218;
}

/// Where the kernel's protected-mode part is loaded, and its first instruction.
const LOADED_AT: u32 = 0x10_0000;

/// What stands in the first process's file before the eight bytes that are to
/// hold the time-stamp counter at the kernel's first instruction.
const MARKER: &[u8] = b"vireo-stopwatch-start-->";

/// A Bochs with its own BIOS, and SYSLINUX.
#[derive(Clone, Debug)]
pub struct Bare {
    /// The emulator.
    pub bochs: Bochs,
    /// SYSLINUX's installer, the one that uses mtools.
    pub syslinux: PathBuf,
    /// The folder of SYSLINUX's modules.
    pub modules: PathBuf,
    /// A folder with mtools, where they are not on the search path.
    pub mtools: Option<PathBuf>,
}

impl Platform for Bare {
    fn name(&self) -> &'static str {
        "Bochs without Vireo"
    }

    fn counts_instructions(&self) -> bool {
        true
    }

    fn time(&self) -> u64 {
        self.bochs.time()
    }

    fn start(&self, config: &MachineConfig) -> Result<Machine> {
        self.bochs.start(config)
    }
}

impl Bare {
    /// Writes the disk that boots `guest`, on a machine with `ips`
    /// instructions in an emulated second.
    ///
    /// # Errors
    /// When the kernel is none that SYSLINUX starts, or the disk cannot be
    /// written.
    pub fn write_disk(&self, path: &Path, guest: &Guest, ips: u64) -> Result<()> {
        let (mut files, lines) = if guest.vm.protocol == Protocol::Multiboot {
            self.multiboot(guest)?
        } else {
            linux(guest, ips)?
        };
        let config = format!("SERIAL 0 115200\nDEFAULT guest\nLABEL guest\n{lines}");
        files.push(file(CONFIG, config.into_bytes()));
        // The installer adds its own files, within the margin of FAT32.
        image::write_unpartitioned(path, &files)?;
        self.install(path)
    }

    /// The files for a multiboot kernel, and the lines of the configuration.
    fn multiboot(&self, guest: &Guest) -> Result<(Vec<Entry>, String)> {
        let mut files = vec![file(KERNEL, guest.kernel.to_vec())];
        let mut line = format!("/{KERNEL} {}", guest.vm.cmdline);
        for (index, (contents, cmdline)) in guest.modules.iter().enumerate() {
            let name = format!("vireo/module{index}");
            line += &format!(" --- /{name} {cmdline}");
            files.push(file(&name, contents.to_vec()));
        }
        for name in MULTIBOOT {
            files.push(file(name, paths::read(&self.modules.join(name))?));
        }
        Ok((files, format!("KERNEL {}\nAPPEND {line}\n", MULTIBOOT[0])))
    }

    /// Puts SYSLINUX on the disk.
    fn install(&self, disk: &Path) -> Result<()> {
        let mut command = Command::new(&self.syslinux);
        command.arg("--install").arg(disk);
        if let Some(folder) = &self.mtools {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let paths = std::iter::once(folder.clone()).chain(std::env::split_paths(&path));
            command.env("PATH", std::env::join_paths(paths)?);
        }
        let output = command
            .output()
            .with_context(|| format!("cannot start {}", self.syslinux.display()))?;
        ensure!(
            output.status.success(),
            "SYSLINUX cannot be put on the disk: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

/// The files for a bzImage, and the lines of the configuration.
fn linux(guest: &Guest, ips: u64) -> Result<(Vec<Entry>, String)> {
    let clock = guest.initrd.and_then(|initrd| {
        let at = initrd
            .windows(MARKER.len())
            .position(|word| word == MARKER)?;
        u32::try_from(at + MARKER.len()).ok()
    });
    let mut files = vec![file(KERNEL, with_stub(guest.kernel, clock)?)];
    let mut lines = format!(
        "LINUX /{KERNEL}\nAPPEND {}\n",
        cmdline(&guest.vm.cmdline, ips)
    );
    if let Some(initrd) = guest.initrd {
        files.push(file(INITRD, initrd.to_vec()));
        lines += &format!("INITRD /{INITRD}\n");
    }
    Ok((files, lines))
}

fn file(path: &str, contents: Vec<u8>) -> Entry {
    Entry {
        path: path.into(),
        contents,
    }
}

/// The guest's command line in one line, with [`OPTIONS`] before what follows
/// `--` (that belongs to the first process).
fn cmdline(given: &str, ips: u64) -> String {
    let mut words: Vec<&str> = given.split_whitespace().collect();
    let end = words.iter().position(|word| *word == "--");
    let options = format!("{OPTIONS}{}", ips / 1000);
    words.insert(end.unwrap_or(words.len()), &options);
    words.join(" ")
}

/// The kernel with [`start_stub`] behind it, where its real-mode part jumps to.
fn with_stub(kernel: &[u8], clock: Option<u32>) -> Result<Vec<u8>> {
    if kernel.starts_with(b"\x7fELF") {
        bail!(
            "SYSLINUX cannot start an ELF kernel: without Vireo, --kernel must be a bzImage (vmlinuz); a multiboot kernel is for --multiboot"
        );
    }
    let byte = |at: usize| kernel.get(at).copied().unwrap_or_default();
    ensure!(
        kernel.get(header::MAGIC..header::MAGIC + 4) == Some(b"HdrS")
            && byte(header::LOADFLAGS) & 1 == 1,
        "SYSLINUX cannot start this kernel: without Vireo, --kernel must be a bzImage (vmlinuz)"
    );
    let setup = match byte(header::SETUP_SECTS) {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let code = (setup + 1) * 512;
    ensure!(kernel.len() > code, "the kernel's file is cut off");
    let mut image = kernel.to_vec();
    image.resize(image.len().next_multiple_of(16), 0);
    let stub_at = u32::try_from(image.len() - code)
        .ok()
        .and_then(|length| LOADED_AT.checked_add(length))
        .context("the kernel is too large")?;
    image.extend(start_stub(stub_at, clock));
    image[header::CODE32_START..][..4].copy_from_slice(&stub_at.to_le_bytes());
    Ok(image)
}

/// The instructions at `at` that write the time-stamp counter to the byte
/// `clock` of the initrd, and go on to the kernel. The protocol wants ESI with
/// the boot parameters' address, and EBX, EBP and EDI zero.
fn start_stub(at: u32, clock: Option<u32>) -> Vec<u8> {
    let mut code = Vec::new();
    if let Some(clock) = clock {
        code.extend([0x8b, 0xbe]); // mov edi, [esi + RAMDISK_IMAGE]
        code.extend(header::RAMDISK_IMAGE.to_le_bytes());
        code.extend([0x0f, 0x31]); // rdtsc
        code.extend([0x89, 0x87]); // mov [edi + clock], eax
        code.extend(clock.to_le_bytes());
        code.extend([0x89, 0x97]); // mov [edi + clock + 4], edx
        code.extend((clock + 4).to_le_bytes());
        code.extend([0x31, 0xff]); // xor edi, edi
    }
    code.push(0xe9); // jmp LOADED_AT
    let next = at + code.len() as u32 + 4;
    code.extend(LOADED_AT.wrapping_sub(next).to_le_bytes());
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, Register};

    fn bzimage() -> Vec<u8> {
        let mut kernel = vec![0x90; 1024 + 100];
        kernel[header::SETUP_SECTS] = 1;
        kernel[header::MAGIC..][..4].copy_from_slice(b"HdrS");
        kernel[header::LOADFLAGS] = 1;
        kernel
    }

    #[test]
    fn the_kernel_is_entered_behind_the_stub_that_stores_the_counter() {
        let image = with_stub(&bzimage(), Some(0x1234)).unwrap();
        let entry = u32::from_le_bytes(image[header::CODE32_START..][..4].try_into().unwrap());
        assert_eq!(entry, LOADED_AT + (1136 - 1024));
        let place = (entry - LOADED_AT) as usize + 1024;
        let decoder = Decoder::with_ip(32, &image[place..], entry.into(), DecoderOptions::NONE);
        let code: Vec<_> = decoder.into_iter().collect();
        let names: Vec<Code> = code.iter().map(|instruction| instruction.code()).collect();
        assert_eq!(
            names,
            [
                Code::Mov_r32_rm32,
                Code::Rdtsc,
                Code::Mov_rm32_r32,
                Code::Mov_rm32_r32,
                Code::Xor_rm32_r32,
                Code::Jmp_rel32_32
            ]
        );
        let operand = |index: usize| {
            let instruction = code[index];
            (
                instruction.memory_base(),
                instruction.memory_displacement32(),
            )
        };
        assert_eq!(operand(0), (Register::ESI, header::RAMDISK_IMAGE));
        assert_eq!(operand(2), (Register::EDI, 0x1234));
        assert_eq!(operand(3), (Register::EDI, 0x1238));
        assert_eq!(code[5].near_branch_target(), u64::from(LOADED_AT));
    }

    #[test]
    fn a_kernel_that_syslinux_does_not_start_is_refused() {
        for (kernel, reason) in [
            (&b"\x7fELF\x02\x01"[..], "ELF"),
            (b"MZ", "bzImage"),
            (&bzimage()[..1000], "cut off"),
        ] {
            let error = with_stub(kernel, None).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }

    #[test]
    fn options_go_before_those_of_the_first_process() {
        let line = cmdline("quiet\n a -- b", 50_000_000);
        assert!(line.starts_with("quiet a clearcpuid="), "{line}");
        assert!(line.ends_with(" tsc_early_khz=50000 -- b"), "{line}");
    }
}
