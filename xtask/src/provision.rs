//! What a machine needs beside our own code: an emulator, its firmware, and
//! the default guest.
//!
//! What is installed is used. What is missing comes from Debian's packages,
//! which are unpacked under `target/provision/NAME/`, so nothing on the system
//! changes and no privilege is needed. Such a folder appears by a rename when
//! it is complete and is never fetched again; a lock keeps concurrent
//! invocations from fetching twice.

mod emulator;
mod rig;

use crate::machine::{Bare, Bochs, bound_command, program_of};
use crate::paths;
use crate::progress::Progress;
use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The package whose dependency names the current kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
/// The libraries of Debian's architecture, inside an unpacked package.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
/// Ends of the names of library packages without a shared library in them.
const NO_LIBRARY: [&str; 4] = ["-data", "-common", "-bin", "-dev"];

/// The default guest's parts.
pub struct DefaultGuest {
    /// The kernel as packaged, a bzImage.
    pub kernel: PathBuf,
    /// A statically linked busybox.
    pub busybox: Vec<u8>,
    /// The names of its applets.
    pub applets: Vec<String>,
}

/// Finds things, and fetches what is not there.
pub struct Provisioner<'a> {
    folder: PathBuf,
    /// The search path for programs.
    path: OsString,
    /// Packages may be installed.
    root: bool,
    /// The architecture of the packages, where it is not the system's.
    architecture: Option<&'static str>,
    progress: &'a Progress,
}

impl<'a> Provisioner<'a> {
    /// A provisioner that reports what it does to `progress`.
    pub fn new(progress: &'a Progress) -> Self {
        Self {
            folder: paths::target().join("provision"),
            path: std::env::var_os("PATH").unwrap_or_default(),
            root: Uid::effective().is_root(),
            architecture: None,
            progress,
        }
    }

    /// One for packages of 32-bit PCs, which guests need.
    pub fn i386(&self) -> Self {
        Self {
            folder: self.folder.join("i386"),
            path: self.path.clone(),
            root: false,
            architecture: Some("i386"),
            progress: self.progress,
        }
    }

    fn find(&self, program: &str) -> Option<PathBuf> {
        paths::find_in(&self.path, program)
    }

    /// What boots a guest's kernel without Vireo.
    ///
    /// # Errors
    /// When a part of it is not there and cannot be fetched.
    pub fn bare(&self) -> Result<Bare> {
        let firmware = self.file("bochsbios", "usr/share/bochs/BIOS-bochs-latest")?;
        let mtools = match self.find("mcopy") {
            Some(_) => None,
            None => Some(self.package("mtools")?.join("usr/bin")),
        };
        Ok(Bare {
            bochs: Bochs {
                firmware,
                ..self.bochs()?
            },
            syslinux: self.file("syslinux", "usr/bin/syslinux")?,
            modules: self.folder("syslinux-common", "usr/lib/syslinux/modules/bios")?,
            mtools,
        })
    }

    /// The kernel and busybox of the default guest.
    ///
    /// # Errors
    /// When they cannot be fetched.
    pub fn default_guest(&self) -> Result<DefaultGuest> {
        let kernel = self.kernel(KERNEL)?;
        let (busybox, applets) = self.busybox()?;
        Ok(DefaultGuest {
            kernel,
            busybox,
            applets,
        })
    }

    /// The kernel that this meta-package stands for, a bzImage as packaged.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn kernel(&self, meta: &str) -> Result<PathBuf> {
        let boot = self.current_kernel(meta)?.join("boot");
        fs::read_dir(&boot)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
            })
            .with_context(|| format!("there is no kernel in {}", boot.display()))
    }

    /// The folder of the unpacked package of the current kernel of a meta-package.
    fn current_kernel(&self, meta: &str) -> Result<PathBuf> {
        let record = self.folder.join(if meta == KERNEL {
            "default-kernel"
        } else {
            meta
        });
        let package = match fs::read_to_string(&record) {
            Ok(package) => package.trim().to_owned(),
            Err(_) => {
                let _lock = self.lock()?;
                let package = dependency(&self.apt_cache(&["show", meta])?, "linux-image-")
                    .with_context(|| format!("the package {meta} names no kernel"))?;
                paths::write(&record, package.as_bytes())?;
                package
            }
        };
        self.package(&package)
    }

    /// A statically linked busybox and the names of its applets.
    ///
    /// # Errors
    /// When it cannot be fetched or does not run.
    pub fn busybox(&self) -> Result<(Vec<u8>, Vec<String>)> {
        let program = self.busybox_program()?;
        let list = output(Command::new(&program).arg("--list"))?;
        let applets = String::from_utf8_lossy(&list.stdout)
            .lines()
            .map(str::to_owned)
            .collect();
        Ok((paths::read(&program)?, applets))
    }

    /// The same for 32-bit guests: its applets are those of ours.
    ///
    /// # Errors
    /// As [`Provisioner::busybox`].
    pub fn busybox_i386(&self) -> Result<(Vec<u8>, Vec<String>)> {
        let (_, applets) = self.busybox()?;
        Ok((paths::read(&self.i386().busybox_program()?)?, applets))
    }

    fn busybox_program(&self) -> Result<PathBuf> {
        let folder = self.package("busybox-static")?;
        ["usr/bin/busybox", "bin/busybox"]
            .map(|path| folder.join(path))
            .into_iter()
            .find(|path| path.is_file())
            .context("the package busybox-static has no busybox")
    }

    /// Firmware of a PC with a BIOS.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn seabios(&self) -> Result<PathBuf> {
        self.file("seabios", "usr/share/seabios/bios.bin")
    }

    /// Firmware of a PC with UEFI.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn ovmf(&self) -> Result<PathBuf> {
        self.file("ovmf", "usr/share/ovmf/OVMF.fd")
    }

    /// A tester of memory, a bzImage.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn memtest86(&self) -> Result<PathBuf> {
        self.file("memtest86+", "boot/memtest86+x64.bin")
    }

    /// A boot loader as firmware.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn grub(&self) -> Result<PathBuf> {
        self.file("grub-firmware-qemu", "usr/share/qemu/grub.bin")
    }

    /// A network boot loader, a bzImage that needs a BIOS.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn ipxe(&self) -> Result<PathBuf> {
        self.file("ipxe", "boot/ipxe.lkrn")
    }

    /// What makes a BIOS take an image of a floppy disk, a bzImage's initrd, for the disk.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn memdisk(&self) -> Result<PathBuf> {
        self.file("syslinux-common", "usr/lib/syslinux/memdisk")
    }

    /// A hypervisor, a multiboot kernel, as packaged: compressed.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn xen(&self) -> Result<PathBuf> {
        self.file("xen-hypervisor-4.17-amd64", "boot/xen-4.17-amd64.gz")
    }

    /// Firmware that goes to 64-bit code by descriptors in its ROM.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn u_boot(&self) -> Result<PathBuf> {
        self.file("u-boot-qemu", "usr/lib/u-boot/qemu-x86_64/u-boot.rom")
    }

    /// A file of a package, installed or unpacked.
    fn file(&self, package: &str, path: &str) -> Result<PathBuf> {
        let installed = Path::new("/").join(path);
        if installed.is_file() {
            return Ok(installed);
        }
        let unpacked = self.package(package)?.join(path);
        ensure!(unpacked.is_file(), "the package {package} has no {path}");
        Ok(unpacked)
    }

    /// The same for a folder.
    fn folder(&self, package: &str, path: &str) -> Result<PathBuf> {
        let installed = Path::new("/").join(path);
        if installed.is_dir() {
            return Ok(installed);
        }
        Ok(self.package(package)?.join(path))
    }

    /// The folder of an unpacked package, fetched when it is missing.
    fn package(&self, name: &str) -> Result<PathBuf> {
        self.unpack(name, &[name.to_owned()])
    }

    /// The folder `name`, with `packages` unpacked into it.
    fn unpack(&self, name: &str, packages: &[String]) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        if folder.is_dir() {
            return Ok(folder);
        }
        let _lock = self.lock()?;
        if folder.is_dir() {
            return Ok(folder);
        }
        let archives = self.fresh(&format!("{name}.archives"))?;
        let fresh = self.fresh(&format!("{name}.new"))?;
        self.progress
            .stage(&format!("fetching {}", packages.join(" ")));
        let mut arguments = vec!["download"];
        arguments.extend(packages.iter().map(String::as_str));
        self.apt_get(&arguments, &archives).with_context(|| {
            format!("cannot fetch the Debian package {name}: is this machine online?")
        })?;
        for archive in fs::read_dir(&archives)? {
            let archive = archive?.path();
            output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&fresh))?;
        }
        fs::rename(&fresh, &folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        fs::remove_dir_all(&archives)?;
        self.progress
            .note(&format!("{name}: unpacked into {}", folder.display()));
        Ok(folder)
    }

    /// The folder named like the first of `packages`, with all of them and the
    /// libraries for them that the system lacks.
    fn unpacked_with_libraries(&self, packages: &[&str]) -> Result<PathBuf> {
        let name = packages.first().context("no package is wanted")?;
        let folder = self.folder.join(name);
        if folder.is_dir() {
            return Ok(folder);
        }
        let mut wanted = vec!["install", "-s", "--no-install-recommends"];
        wanted.extend(packages);
        let missing = {
            let _lock = self.lock()?;
            self.apt_get(&wanted, &self.folder)?
        };
        let mut wanted: Vec<String> = packages.iter().map(|&name| name.to_owned()).collect();
        wanted.extend(libraries(&missing));
        self.unpack(name, &wanted)
    }

    /// An empty folder of this name.
    fn fresh(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(folder)
    }

    fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot create {}", self.folder.display()))?;
        let lock = File::create(self.folder.join("lock"))?;
        lock.lock()
            .context("cannot lock the folder of fetched packages")?;
        Ok(lock)
    }

    /// `apt-cache` with the system's package lists, else with our own.
    fn apt_cache(&self, arguments: &[&str]) -> Result<String> {
        self.apt("apt-cache", arguments, &self.folder)
    }

    /// `apt-get`, likewise, in `folder`.
    fn apt_get(&self, arguments: &[&str], folder: &Path) -> Result<String> {
        self.apt("apt-get", arguments, folder)
    }

    /// Runs an apt tool and, where it fails with the system's lists (there are
    /// none on a fresh machine, and old ones name packages that are gone),
    /// once more with current lists of our own.
    fn apt(&self, tool: &str, arguments: &[&str], folder: &Path) -> Result<String> {
        let program = self.find(tool).with_context(|| {
            format!("there is no {tool}: on a system other than Debian, install bochs, OVMF, vgabios and busybox by hand")
        })?;
        let own = self.folder.join("apt");
        let installing = arguments.first() == Some(&"install") && !arguments.contains(&"-s");
        let run = |options: &[String]| {
            let user = if self.root { "root" } else { "" };
            // An installation is not to be ended in the middle, all else with us.
            let mut command = if installing {
                Command::new(&program)
            } else {
                bound_command(&program)
            };
            command
                .current_dir(folder)
                .env("DEBIAN_FRONTEND", "noninteractive")
                .env("LC_ALL", "C");
            command
                .arg("-q")
                .args(["-o", &format!("APT::Sandbox::User={user}")]);
            command.args(options).args(arguments);
            output(&mut command)
        };
        let mut options = vec![
            "-o".into(),
            format!("Dir::State={}", own.join("state").display()),
            "-o".into(),
            format!("Dir::Cache={}", own.join("cache").display()),
            "-o".into(),
            "Dir::State::status=/var/lib/dpkg/status".into(),
        ];
        if let Some(architecture) = self.architecture {
            // Nothing of this architecture is installed, or ever will be.
            for option in [
                format!("APT::Architecture={architecture}"),
                format!("APT::Architectures={architecture}"),
                "Dir::State::status=/dev/null".into(),
            ] {
                options.extend(["-o".into(), option]);
            }
        }
        let foreign = self.architecture.is_some();
        let with_system = if foreign || own.join("updated").exists() && !installing {
            None
        } else {
            run(&[]).ok()
        };
        let text = match with_system {
            Some(text) => text,
            None => {
                if !own.join("updated").exists() {
                    self.progress.stage("fetching the lists of Debian packages");
                    fs::create_dir_all(own.join("state/lists/partial"))?;
                    fs::create_dir_all(own.join("cache/archives/partial"))?;
                    let mut update = bound_command(&program.with_file_name("apt-get"));
                    update
                        .args(["-q", "-o", "APT::Sandbox::User=root"])
                        .args(&options)
                        .arg("update");
                    // A foreign source that fails does not matter, as long as
                    // the package is found afterwards.
                    let _ = update.env("LC_ALL", "C").output();
                    fs::write(own.join("updated"), "")?;
                }
                run(&options).inspect_err(|_| {
                    let _ = fs::remove_file(own.join("updated"));
                })?
            }
        };
        Ok(String::from_utf8_lossy(&text.stdout).into_owned())
    }
}

/// The program that an environment variable names, which must be there.
fn named_by(variable: &str) -> Result<Option<PathBuf>> {
    let Some(value) = std::env::var_os(variable) else {
        return Ok(None);
    };
    let path = PathBuf::from(value);
    if path.is_file() {
        return Ok(Some(std::path::absolute(path)?));
    }
    match path.to_str().and_then(paths::find_program) {
        Some(program) => Ok(Some(program)),
        None => bail!(
            "{variable} names {}, which is not there: correct or unset it",
            path.display()
        ),
    }
}

/// The packages with libraries in what a simulated installation lists
/// (`Inst NAME ...`).
fn libraries(simulation: &str) -> impl Iterator<Item = String> {
    simulation
        .lines()
        .filter_map(|line| line.strip_prefix("Inst ")?.split_whitespace().next())
        .filter(|name| name.starts_with("lib") && !NO_LIBRARY.iter().any(|end| name.ends_with(end)))
        .map(str::to_owned)
}

/// The first dependency with this prefix in a package's description, without
/// version and alternatives.
fn dependency(description: &str, prefix: &str) -> Option<String> {
    description
        .lines()
        .filter_map(|line| line.strip_prefix("Depends:"))
        .flat_map(|list| list.split(','))
        .filter_map(|item| item.split(['|', '(']).next())
        .map(str::trim)
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

/// Runs a command to its end, which must be a good one.
fn output(command: &mut Command) -> Result<Output> {
    let name = program_of(command);
    let output = command
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let reason = text
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("it gives no reason");
        bail!("{name} has failed: {reason}");
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// An `apt-get` whose `download` makes the package `thing` with the file `whole`.
    const DOWNLOADS: &str = r#"#!/bin/sh
case "$*" in *download*) ;; *) exit ;; esac
mkdir -p thing/DEBIAN && echo whole >thing/whole
printf 'Package: thing\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n' >thing/DEBIAN/control
dpkg-deb --build thing >/dev/null && rm -r thing
"#;

    /// Lets `body` provide things with this `apt-get`.
    fn with_apt<R>(name: &str, script: &str, body: impl FnOnce(&Provisioner) -> R) -> R {
        let folder = std::env::temp_dir().join(format!("vireo-apt-{name}-{}", std::process::id()));
        let programs = folder.join("bin");
        fs::create_dir_all(&programs).unwrap();
        let result = {
            let progress = Progress::new();
            let provisioner = Provisioner {
                folder: folder.join("provision"),
                path: programs.into(),
                root: false,
                architecture: None,
                progress: &progress,
            };
            set_apt(&provisioner, script);
            body(&provisioner)
        };
        fs::remove_dir_all(folder).unwrap();
        result
    }

    fn set_apt(provisioner: &Provisioner, script: &str) {
        let program = Path::new(&provisioner.path).join("apt-get");
        fs::write(&program, script).unwrap();
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What an emulator's source would be that nothing else names.
    const NOTHING: emulator::Source = emulator::Source {
        variable: "VIREO_NOTHING",
        programs: &["nothing"],
        packages: &["thing", "thing-data"],
        usage: "usage: nothing",
        environment: |_| Vec::new(),
    };

    #[test]
    fn without_network_and_root_a_sentence_says_what_to_install() {
        let script = "#!/bin/sh\necho 'E: Could not resolve the mirror' >&2\nexit 100\n";
        let error = with_apt("offline", script, |provisioner| {
            provisioner.emulator(&NOTHING).unwrap_err()
        });
        let text = format!("{error:#}");
        assert!(
            text.contains("install it (apt-get install thing thing-data)"),
            "{text}"
        );
        assert!(
            text.ends_with("Could not resolve the mirror") && !text.contains('\n'),
            "{text}"
        );
    }

    #[test]
    fn an_unpacked_program_that_does_not_run_is_not_taken() {
        let error = with_apt("useless", DOWNLOADS, |provisioner| {
            provisioner.emulator(&NOTHING).unwrap_err()
        });
        let text = format!("{error:#}");
        assert!(
            text.contains("install it (apt-get install thing thing-data)"),
            "{text}"
        );
    }

    #[test]
    fn what_is_cut_off_is_not_taken_for_whole() {
        let cut = DOWNLOADS.to_owned() + "truncate -s 300 thing.deb\n";
        with_apt("cut", &cut, |provisioner| {
            let error = provisioner.package("thing").unwrap_err();
            assert!(
                format!("{error:#}").contains("dpkg-deb has failed"),
                "{error:#}"
            );
            assert!(!provisioner.folder.join("thing").exists());
            // As an invocation leaves it that was killed.
            for name in ["thing.archives/half.deb", "thing.new/half"] {
                let file = provisioner.folder.join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, "half").unwrap();
            }
            set_apt(provisioner, DOWNLOADS);
            let folder = provisioner.package("thing").unwrap();
            let files: Vec<_> = fs::read_dir(folder).unwrap().collect();
            assert_eq!(files.len(), 1);
            assert_eq!(files[0].as_ref().unwrap().file_name(), "whole");
        });
    }

    #[test]
    fn the_kernel_is_read_from_the_meta_package() {
        let description = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nProvides: linux-image\n\
             Depends: foo (>= 1) | bar, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nDescription: x\n";
        let found = dependency(description, "linux-image-");
        assert_eq!(found.as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(
            dependency("Package: a\nRecommends: linux-image-1\n", "linux-image-"),
            None
        );
    }

    #[test]
    fn of_what_an_emulator_needs_only_libraries_are_unpacked() {
        let simulation = "Inst libltdl7 (2.4.7-7 Debian:12 [amd64])\nInst libgtk-3-common (3.24 [all])\n\
             Inst adwaita-icon-theme (43 [all])\nInst bochs (2.7 [amd64]) []\nConf bochs (2.7 [amd64])\n";
        assert!(libraries(simulation).eq(["libltdl7"]));
    }
}
