//! The parts of the nested rig (`machine/rig.rs`): the archive of files with
//! which Linux runs QEMU, from the installed QEMU or the package's.

use super::{Provisioner, output};
use crate::cpio::Archive;
use crate::guest::lz4_legacy;
use crate::machine::Emulator;
use crate::machine::rig::{APPLETS, MODULES, Rig, inside};
use crate::paths;
use anyhow::{Context, Result, bail};
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::UNIX_EPOCH;

/// A file of the archive: its path there, its mode, and where it comes from.
type Item = (String, u32, PathBuf);

impl Provisioner<'_> {
    /// The nested rig.
    ///
    /// # Errors
    /// When a part of it is not there and cannot be fetched.
    pub fn rig(&self) -> Result<Rig> {
        Ok(Rig {
            bochs: self.bochs()?,
            stub: self.file(
                "systemd-boot-efi",
                "usr/lib/systemd/boot/efi/linuxx64.efi.stub",
            )?,
            kernel: self.default_guest()?.kernel,
            archive: self.rig_archive()?,
            counts: false,
        })
    }

    /// The archive, made again when one of its files has changed.
    fn rig_archive(&self) -> Result<PathBuf> {
        let items = self.rig_items()?;
        let mut contents = String::new();
        for (name, _, source) in &items {
            let data = fs::metadata(source)
                .with_context(|| format!("cannot read {}", source.display()))?;
            let time = data.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
            writeln!(
                contents,
                "{name} {} {} {time}",
                source.display(),
                data.len()
            )?;
        }
        let archive = self.folder.join("rig.cpio.lz4");
        let record = self.folder.join("rig.contents");
        let _lock = self.lock()?;
        if archive.is_file() && fs::read_to_string(&record).is_ok_and(|text| text == contents) {
            return Ok(archive);
        }
        self.progress.stage("packing QEMU for the nested rig");
        let _ = fs::remove_file(&record);
        paths::write(&archive, &lz4_legacy(&pack(&items)?))?;
        paths::write(&record, contents.as_bytes())?;
        Ok(archive)
    }

    fn rig_items(&self) -> Result<Vec<Item>> {
        let busybox = self.busybox_program()?;
        let kernel = self.current_kernel(super::KERNEL)?;
        let modules = ["lib/modules", "usr/lib/modules"]
            .iter()
            .filter_map(|path| fs::read_dir(kernel.join(path)).ok()?.next()?.ok())
            .map(|folder| folder.path().join("kernel"))
            .next()
            .with_context(|| format!("there are no modules in {}", kernel.display()))?;
        let mut items = vec![("bin/busybox".to_owned(), 0o755, busybox)];
        for module in MODULES {
            let source = modules.join(module).with_extension("ko");
            let name = module.rsplit('/').next().unwrap_or(module);
            items.push((format!("{}/{name}.ko", inside::MODULES), 0o644, source));
        }
        let qemu = self.qemu_emulator()?;
        items.extend(libraries(&qemu)?);
        items.push((inside::QEMU.into(), 0o755, qemu.program));
        let rom = self.file("qemu-system-data", "usr/share/qemu/kvmvapic.bin")?;
        items.push((format!("{}/kvmvapic.bin", inside::ROMS), 0o644, rom));
        items.push((inside::FIRMWARE.into(), 0o644, self.ovmf()?));
        Ok(items)
    }
}

/// The shared libraries of a program, as its loader finds them.
fn libraries(emulator: &Emulator) -> Result<Vec<Item>> {
    let mut command = Command::new("ldd");
    command.arg(&emulator.program);
    command.envs(emulator.environment.iter().cloned());
    let list = output(&mut command)?;
    parse_libraries(&String::from_utf8_lossy(&list.stdout))
        .with_context(|| format!("cannot pack {}", emulator.program.display()))
}

/// From the lines of `ldd`: `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` for
/// the loader itself, which is wanted where the program names it.
fn parse_libraries(list: &str) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for line in list.lines().map(str::trim) {
        let (name, rest) = match line.split_once(" => ") {
            Some((name, rest)) => (format!("{}/{name}", inside::LIBRARIES), rest),
            None => match line.split_once(" (") {
                Some((path, _)) if path.starts_with('/') => {
                    (path.trim_start_matches('/').to_owned(), line)
                }
                _ => continue,
            },
        };
        if rest.contains("not found") {
            bail!("the library {name} is missing");
        }
        let path = rest.split(" (").next().unwrap_or(rest);
        items.push((name, 0o755, PathBuf::from(path)));
    }
    Ok(items)
}

/// The archive with these files and the folders above them.
fn pack(items: &[Item]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    let mut folders = vec!["dev".to_owned()];
    for (name, ..) in items {
        let parts: Vec<&str> = name.split('/').collect();
        for depth in 1..parts.len() {
            folders.push(parts[..depth].join("/"));
        }
    }
    folders.sort_unstable();
    folders.dedup();
    folders.iter().for_each(|folder| archive.directory(folder));
    for (name, mode, source) in items {
        archive.file(name, *mode, &paths::read(source)?);
    }
    for applet in APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_where_the_loader_looks() {
        let list = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
             \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let items = parse_libraries(list).unwrap();
        let expected = [
            ("lib/libc.so.6", "/lib/x86_64-linux-gnu/libc.so.6"),
            ("lib64/ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2"),
        ]
        .map(|(name, path)| (name.to_owned(), 0o755, PathBuf::from(path)));
        assert_eq!(items, expected);
        let error = parse_libraries("\tlibx.so.1 => not found\n").unwrap_err();
        assert!(error.to_string().contains("lib/libx.so.1"), "{error}");
    }
}
