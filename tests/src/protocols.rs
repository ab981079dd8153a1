//! Boot protocols other than the default guest's, and images that ask for too much.

use crate::harness::{Case, Ending, Input, Suite};
use anyhow::{Context, Result};
use object::{Object, ObjectSegment};
use std::path::PathBuf;
use std::process::Command;
use xtask::progress::Progress;
use xtask::provision::Provisioner;
use xtask::{build, paths};

pub fn add(suite: &mut Suite) {
    suite.add("protocols::multiboot_flat", multiboot_flat);
    suite.add("protocols::multiboot_elf", multiboot_elf);
    suite.add("protocols::multiboot_refused", multiboot_refused);
    suite.add("protocols::seabios", seabios);
    suite.add("protocols::efi_stub", efi_stub);
    suite.add("protocols::memtest86", memtest86);
    suite.add("protocols::grub", grub);
    suite.add("protocols::ipxe", ipxe);
    suite.add("protocols::floppy", floppy);
    suite.add("protocols::u_boot", u_boot);
    suite.add("protocols::xen", xen);
    suite.add("protocols::firmware_refused", firmware_refused);
    suite.add("protocols::linux_i386", |case| {
        linux(case, "linux-image-686", "i686", "0")
    });
    suite.add("protocols::linux_i386_pae", |case| {
        linux(case, "linux-image-686-pae", "i686", "0")
    });
    suite.add("protocols::linux_real_time", |case| {
        linux(case, "linux-image-rt-amd64", "x86_64", "1")
    });
}

/// The multiboot guest as a flat file, its header first.
fn flat() -> Result<Vec<u8>> {
    let file = paths::read(&build::guest("multiboot")?)?;
    let elf = object::File::parse(&*file)?;
    let segment = elf.segments().next().context("it has no segment")?;
    Ok(segment.data()?.to_vec())
}

/// A 32-bit ELF file with `flat` at 2 MiB, and `more` segments as (address, size).
fn elf32(flat: &[u8], entry: u32, more: &[(u32, u32)]) -> Vec<u8> {
    let words =
        |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let count = 1 + more.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    file.extend(words(&[1, entry, 52, 0, 0, 52 | 32 << 16, count, 0]));
    let (offset, len) = (52 + 32 * count, flat.len() as u32);
    let start = 0x20_0000;
    file.extend(words(&[1, offset, start, start, len, 0x10_0000, 7, 4096]));
    for &(start, size) in more {
        file.extend(words(&[1, offset, start, start, 0, size, 7, 4096]));
    }
    file.extend(flat);
    file
}

/// The same without the address fields, and its entry point.
fn without_addresses(mut flat: Vec<u8>) -> (Vec<u8>, u32) {
    let entry = u32::from_le_bytes([flat[28], flat[29], flat[30], flat[31]]);
    flat[4..8].copy_from_slice(&3u32.to_le_bytes());
    flat[8..12].copy_from_slice(&0u32.wrapping_sub(0x1bad_b002 + 3).to_le_bytes());
    (flat, entry)
}

/// Boots `kernel` with two modules.
fn checks(case: &mut Case, option: &str, kernel: &[u8]) -> Result<()> {
    let file = |name: &str, contents: &[u8]| -> Result<PathBuf> {
        let path = case.folder().join(name);
        std::fs::write(&path, contents)?;
        Ok(path)
    };
    let kernel = file("multiboot", kernel)?;
    let first = format!("{}=x=y", file("first", &[b'1'; 5000])?.display());
    let second = file("second", b"222")?;
    let seen = case
        .machine()
        .options([option, &kernel.display().to_string(), "--cmdline", "a=b c"])
        .options([
            "--module",
            &first,
            "--module",
            &second.display().to_string(),
        ])
        .options(["--memory", "64M"])
        .limit(120)
        .run()?;
    let failed = seen
        .console
        .lines()
        .find(|line| line.contains(": failed: "));
    case.check(
        "no check fails",
        failed.is_none(),
        failed.unwrap_or_default(),
    );
    case.check(
        "all checks are done",
        seen.output.contains("checks: 20 passed, 0 failed"),
        &seen.console,
    );
    case.check_equal("it powers off", seen.ending, Ending::Status(0));
    Ok(())
}

fn multiboot_flat(case: &mut Case) -> Result<()> {
    let flat = flat()?;
    checks(case, "--kernel", &flat)
}

fn multiboot_elf(case: &mut Case) -> Result<()> {
    let (flat, entry) = without_addresses(flat()?);
    checks(case, "--multiboot", &elf32(&flat, entry, &[]))
}

/// What only the hypervisor sees, and what the loader sees already.
fn multiboot_refused(case: &mut Case) -> Result<()> {
    let config =
        "[[vm]]\nname = \"a\"\nmemory = \"64M\"\nkernel = \"kernel\"\nprotocol = \"multiboot\"\n";
    let (flat, entry) = without_addresses(flat()?);
    let overlapping = elf32(&flat, entry, &[(0x20_1000, 0x1000)]);
    let machine = case.machine().volume(config, &[("kernel", &overlapping)])?;
    case.refusal(
        machine,
        &[
            "vm a: ",
            "segment at 0x200000 that ends at 0x300000, behind the start of another at 0x201000",
        ],
    )?;
    let machine = case.machine().volume(config, &[("kernel", &flat[..8])])?;
    case.refusal(machine, &["kernel: ", "multiboot header at 0x0 is cut off"])
}

/// Debian's other kernels as packaged: those of 32 bits have no 64-bit entry point.
fn linux(case: &mut Case, package: &str, machine: &str, real_time: &str) -> Result<()> {
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let kernel = match machine {
        "i686" => provisioner.i386().kernel(package)?,
        _ => provisioner.kernel(package)?,
    };
    let seen = case
        .machine()
        .options(["--kernel", &kernel.display().to_string()])
        .exec(
            "uname -m; cat /sys/kernel/realtime 2>/dev/null || echo 0; \
            dmesg | grep -c 'BUG:\\|WARNING:'; grep MemTotal /proc/meminfo; exit 3",
        )
        .run()?;
    let mut lines = seen.output.lines();
    case.check_equal("the machine", lines.next(), Some(machine));
    case.check_equal(
        "whether it is a real-time kernel",
        lines.next(),
        Some(real_time),
    );
    case.check_equal("complaints of the kernel", lines.next(), Some("0"));
    case.check("memory", seen.output.contains("MemTotal:"), &seen.output);
    case.check_equal("the status", &seen.ending, &Ending::Status(3));
    Ok(())
}

/// A BIOS without anything to boot: it says so, and resets the machine after a minute of its own.
fn seabios(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let bios = Provisioner::new(&progress).seabios()?;
    let seen = case
        .machine()
        .options(["--firmware", &bios.display().to_string(), "--memory", "64M"])
        .run()?;
    for line in [
        "SeaBIOS (version ",
        "Booting from Hard Disk...",
        "No bootable device.",
    ] {
        case.check(line, seen.output.contains(line), &seen.console);
    }
    case.check_equal(
        "the sentence",
        seen.ending.sentence(),
        "the guest guest has reset its machine",
    );
    Ok(())
}

/// UEFI starts the default kernel, which it is given by `fw_cfg`, as an EFI application.
fn efi_stub(case: &mut Case) -> Result<()> {
    const SCRIPT: &str = "cat /sys/firmware/efi/fw_platform_size; ls /sys/firmware/acpi/tables | head -6; \
        cat /proc/cmdline; exit 6";
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let (firmware, kernel) = (provisioner.ovmf()?, provisioner.default_guest()?.kernel);
    let seen = case
        .machine()
        .options(["--firmware", &firmware.display().to_string()])
        .options(["--kernel", &kernel.display().to_string()])
        .exec(SCRIPT)
        .limit(600)
        .run()?;
    let told = "64\nAPIC\nDSDT\nFACP\nFACS\nSPCR\n";
    case.check(
        "UEFI and its tables",
        seen.output.starts_with(told),
        &seen.output,
    );
    case.check(
        "the command line",
        seen.output.contains("console=ttyS0,115200") && seen.output.contains("initrd=initrd"),
        &seen.output,
    );
    case.check_equal("the status", seen.ending, Ending::Status(6));
    Ok(())
}

/// Boots what `options` say until all `words` are on the screen of the guest called `name`.
fn shows<const N: usize>(
    case: &mut Case,
    options: [&str; N],
    name: &'static str,
    words: &[&'static str],
) -> Result<()> {
    let seen = case
        .machine()
        .options(options)
        .input(Input::Watched(name, words.to_vec()))
        .limit(240)
        .run()?;
    case.check_equal(
        &format!("it shows {}", words.join(", ")),
        seen.ending,
        Ending::Status(0),
    );
    Ok(())
}

/// A tester of memory starts its tests, and finds no error until then.
fn memtest86(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let kernel = Provisioner::new(&progress).memtest86()?;
    let kernel = kernel.display().to_string();
    shows(
        case,
        ["--kernel", &kernel, "--cmdline", "", "--memory", "64M"],
        "linux",
        &["Memtest86+ v", "#3  [Moving inversions", "Errors: 0"],
    )
}

/// GRUB as firmware: it finds VGA and PCI bus as after a reset, and shows its menu.
fn grub(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let firmware = Provisioner::new(&progress).grub()?;
    let firmware = firmware.display().to_string();
    shows(
        case,
        ["--firmware", &firmware, "--memory", "64M"],
        "guest",
        &["GNU GRUB  version ", "┌──", "│ Reboot  "],
    )
}

/// A BIOS starts a kernel in real mode; this one lives on the BIOS.
fn ipxe(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let (bios, kernel) = (provisioner.seabios()?, provisioner.ipxe()?);
    let seen = case
        .machine()
        .options(["--firmware", &bios.display().to_string()])
        .options(["--kernel", &kernel.display().to_string()])
        .options(["--cmdline", "", "--memory", "64M"])
        .input(Input::Typed(vec![
            ("Booting from ROM", ""),
            ("Press Ctrl-B", "\x02"),
            ("iPXE> ", "help\r"),
            ("Available commands", "\x1dq"),
        ]))
        .limit(180)
        .run()?;
    case.check_equal("its shell answers", seen.ending, Ending::Status(0));
    Ok(())
}

/// Firmware whose descriptors are in ROM, where the CPU cannot mark them, comes to its prompt.
fn u_boot(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let firmware = Provisioner::new(&progress).u_boot()?;
    let seen = case
        .machine()
        .options(["--firmware", &firmware.display().to_string()])
        .options(["--memory", "256M"])
        .input(Input::Typed(vec![
            ("Hit any key", "\r"),
            ("=> ", "echo a b\r"),
            ("\na b", "\x1dq"),
        ]))
        .limit(180)
        .run()?;
    case.check_equal("its prompt answers", seen.ending, Ending::Status(0));
    Ok(())
}

/// A boot sector that says the text behind its code, reads the next sector to 0x7e00 by the BIOS,
/// and says what is there.
fn boot_sector(text: &[u8]) -> Vec<u8> {
    /// Offset of the text.
    const TEXT: u8 = 0x60;
    const CODE: [&[u8]; 6] = [
        // xor ax, ax; mov ds, ax; mov es, ax; mov si, 0x7c00 + TEXT
        &[0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0xbe, TEXT, 0x7c],
        SAY,
        // mov ax, 0x0201; mov cx, 2; mov dx, 0; mov bx, 0x7e00; int 0x13
        &[
            0xb8, 1, 2, 0xb9, 2, 0, 0xba, 0, 0, 0xbb, 0, 0x7e, 0xcd, 0x13,
        ],
        // mov si, 0x7e00
        &[0xbe, 0, 0x7e],
        SAY,
        // jmp itself
        &[0xeb, 0xfe],
    ];
    // lodsb; or al, al; jz behind; mov ah, 0x0e; int 0x10; jmp lodsb
    const SAY: &[u8] = &[
        0xac, 0x08, 0xc0, 0x74, 6, 0xb4, 0x0e, 0xcd, 0x10, 0xeb, 0xf5,
    ];
    let mut sector = CODE.concat();
    sector.resize(TEXT.into(), 0);
    sector.extend(text);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

/// A BIOS boots a floppy disk that is in memory: all in real mode.
fn floppy(case: &mut Case) -> Result<()> {
    /// Bytes of a disk.
    const DISK: usize = 1440 << 10;
    let mut disk = boot_sector(b"the first sector\r\n");
    disk.extend(b"and the second one\r\n");
    disk.resize(DISK, 0);
    let image = case.folder().join("disk");
    std::fs::write(&image, disk)?;
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let (bios, kernel) = (provisioner.seabios()?, provisioner.memdisk()?);
    let seen = case
        .machine()
        .options(["--firmware", &bios.display().to_string()])
        .options(["--kernel", &kernel.display().to_string()])
        .options(["--initrd", &image.display().to_string()])
        .options(["--cmdline", "floppy", "--memory", "64M"])
        .input(Input::Typed(vec![("and the second", "\x1dq")]))
        .limit(120)
        .run()?;
    case.check_equal("both sectors are read", seen.ending, Ending::Status(0));
    Ok(())
}

/// Another hypervisor, which finds memory below 1 MiB by what a BIOS has written there.
fn xen(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let package = Provisioner::new(&progress).xen()?;
    let unpacked = Command::new("gzip").arg("-dc").arg(&package).output()?;
    let kernel = case.folder().join("xen");
    std::fs::write(&kernel, unpacked.stdout)?;
    let seen = case
        .machine()
        .options(["--multiboot", &kernel.display().to_string()])
        .options(["--cmdline", "com1=115200 console=com1 noreboot"])
        .options(["--memory", "256M"])
        .run()?;
    for line in ["Bootloader: Vireo", "dom0 kernel not specified"] {
        case.check(line, seen.output.contains(line), &seen.console);
    }
    case.check_equal(
        "the sentence",
        seen.ending.sentence(),
        "the guest guest was stopped: halted with interrupts off",
    );
    Ok(())
}

fn firmware_refused(case: &mut Case) -> Result<()> {
    let config = "[[vm]]\nname = \"a\"\nmemory = \"64M\"\nfirmware = \"bios\"\n";
    let machine = case.machine().volume(config, &[("bios", &[0; 6000])])?;
    case.refusal(
        machine,
        &["bios: the firmware has 6000 bytes; expected a multiple of 4096"],
    )
}
