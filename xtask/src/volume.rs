//! What stands on the boot volume: the loader, `\vireo\vireo.toml`, and the
//! files that it names.

use crate::guest::{self, Exec};
use crate::image::{Entry, LOADER};
use crate::provision::Provisioner;
use crate::{build, paths};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Component, Path, PathBuf};
use vireo_handoff::Config;
use vireo_handoff::config::{ApicMode, Module, Policy, Protocol, SLICE_US, Serial, Statistics, Vm};
use vireo_handoff::image::{self, Kind};

/// The configuration's name on the volume.
const CONFIG: &str = "vireo.toml";
/// The initrd of a guest of the command line.
const INITRD: &str = "initrd";
/// The first guest's initrd when it has a job.
const WITH_JOB: &str = "initrd-with-job";
/// The folder of the configuration on the volume.
const FOLDER: &str = "vireo";

/// One guest, given on the command line. What is left out is the default
/// guest's; a guest with a kernel of its own has only what it is given.
#[derive(Clone, Debug, Default)]
pub struct Single<'a> {
    /// The kernel.
    pub kernel: Option<&'a Path>,
    /// How it is started.
    pub protocol: Protocol,
    /// Firmware, which is started instead, and given the kernel.
    pub firmware: Option<&'a Path>,
    /// Files beside it, and what it is told about them.
    pub modules: &'a [(PathBuf, String)],
    /// The initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// The kernel's command line.
    pub cmdline: Option<&'a str>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Number of virtual CPUs.
    pub vcpus: Option<u32>,
    /// How much of its local APIC the CPU is.
    pub apic: Option<ApicMode>,
    /// What is recorded about its exits.
    pub statistics: Statistics,
    /// Whether it has the device that test suites expect.
    pub test_device: bool,
    /// Its local APICs have the x2APIC mode.
    pub x2apic: bool,
}

/// What a guest's shell is to do instead of taking the terminal.
pub struct Job<'a> {
    /// See [`crate::framing`].
    pub nonce: &'a str,
    /// The script, or `None` for a shell that reads the input.
    pub command: Option<&'a str>,
    /// Programs for it, by name.
    pub programs: &'a [(&'a str, &'a [u8])],
    /// The guest that does it, by name; else the configuration's first.
    pub vm: Option<&'a str>,
}

/// One guest's console among those of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OneConsole {
    /// The guest's name.
    pub vm: String,
    /// The key behind the hypervisor's escape that shows its console.
    pub key: u8,
    /// The other guests' names.
    pub others: Vec<String>,
}

/// The configuration and its files.
pub struct Volume {
    config: Config,
    /// The configuration as a file.
    text: String,
    files: Vec<Entry>,
    /// A guest has the job.
    pub has_job: bool,
    /// The console of the guest that has the job, where there are several guests.
    pub console: Option<OneConsole>,
    /// Stands for everything but the job that the boot of the only guest
    /// depends on; equal for equal guests.
    pub fingerprint: Option<u64>,
}

/// The one guest of a volume, for what starts its kernel without Vireo.
#[derive(Debug)]
pub struct Guest<'a> {
    /// The kernel.
    pub kernel: &'a [u8],
    /// The initial RAM disk.
    pub initrd: Option<&'a [u8]>,
    /// Other files for it, each with its command line.
    pub modules: Vec<(&'a [u8], &'a str)>,
    /// The rest of its configuration.
    pub vm: &'a Vm,
}

impl Volume {
    /// The volume for one guest. A `terminal` (columns, rows, name) is told to
    /// the default guest's shell.
    ///
    /// # Errors
    /// When a file cannot be read or the default guest cannot be fetched.
    pub fn single(
        single: &Single,
        job: Option<&Job>,
        terminal: Option<(u16, u16, &str)>,
        provisioner: &Provisioner,
    ) -> Result<Self> {
        let kernel = match (single.kernel, single.firmware) {
            (Some(path), _) => Some(paths::read(path)?),
            (None, Some(_)) => None,
            (None, None) => Some(paths::read(&provisioner.default_guest()?.kernel)?),
        };
        let linux = kernel
            .as_ref()
            .and_then(|kernel| image::kind(kernel, single.protocol).ok())
            .filter(|kind| !matches!(kind, Kind::Multiboot(_)));
        let mut initrd = single.initrd.map(paths::read).transpose()?;
        // The default guest's shell goes with other kernels too, where nothing else is said.
        let default_initrd = initrd.is_none()
            && linux == Some(Kind::BzImage)
            && (single.kernel.is_none() || single.cmdline.is_none());
        if let (true, Some(kernel)) = (default_initrd, &kernel) {
            let (busybox, applets) = busybox_for(kernel, provisioner)?;
            initrd = Some(guest::initramfs(&busybox, &applets));
        }
        if let (true, Some((columns, rows, name)), Some(initrd)) =
            (default_initrd, terminal, &mut initrd)
        {
            initrd.splice(..0, guest::terminal_overlay(columns, rows, name));
        }
        let job = wanted(job, linux, initrd.is_some())?;
        let default = if linux.is_some() { guest::CMDLINE } else { "" };
        let mut cmdline = single.cmdline.unwrap_or(default).to_owned();
        let memory = single.memory.unwrap_or(guest::MEMORY);
        let vcpus = single.vcpus.unwrap_or(1);
        let fingerprint = fingerprint(&(&kernel, &initrd, &cmdline, memory, vcpus));
        if let Some(job) = job {
            cmdline = guest::exec_cmdline(&cmdline);
            let kernel = kernel.as_deref().unwrap_or_default();
            initrd = Some(with_job(job, kernel, initrd, default_initrd, provisioner)?);
        }
        // Kernels of other protocols are told their names.
        let mut names = Names::default();
        let name = match single.kernel {
            Some(path) if linux.is_none() => names.of(path),
            _ => names.of(Path::new("kernel")),
        };
        let mut files = Vec::new();
        let has_kernel = kernel.is_some();
        files.extend(kernel.map(|kernel| entry(&name, kernel)));
        let mut firmware = None;
        if let Some(path) = single.firmware {
            let name = names.of(path);
            files.push(entry(&name, paths::read(path)?));
            firmware = Some(name);
        }
        let mut modules = Vec::new();
        for (path, cmdline) in single.modules {
            let file = names.of(path);
            files.push(entry(&file, paths::read(path)?));
            modules.push(Module {
                file,
                cmdline: cmdline.clone(),
            });
        }
        let vm = Vm {
            name: if linux.is_some() { "linux" } else { "guest" }.into(),
            memory,
            vcpus,
            cpus: Vec::new(),
            priority: 0,
            slice_us: SLICE_US,
            after: None,
            kernel: has_kernel.then_some(name),
            firmware,
            initrd: initrd.is_some().then(|| INITRD.into()),
            modules,
            cmdline,
            protocol: single.protocol,
            apic: single.apic.unwrap_or_default(),
            statistics: single.statistics,
            test_device: single.test_device,
            x2apic: single.x2apic,
            serial: Serial::default(),
            on_reboot: Policy::default(),
            on_crash: Policy::default(),
        };
        let text = toml::to_string(&Config { vm: vec![vm] })?;
        files.extend(initrd.map(|initrd| entry(INITRD, initrd)));
        Ok(Self {
            config: Config::parse(CONFIG, &text).map_err(|error| anyhow!("{}", error.reason()))?,
            text,
            files,
            has_job: job.is_some(),
            console: None,
            fingerprint: Some(fingerprint),
        })
    }

    /// The volume for a configuration file, whose paths are relative to its
    /// folder.
    ///
    /// # Errors
    /// What the loader would say of the file, when a file that it names cannot be read, or it has
    /// no guest for the job.
    pub fn from_config(path: &Path, job: Option<&Job>, provisioner: &Provisioner) -> Result<Self> {
        let name = path.display();
        let mut text = String::from_utf8(paths::read(path)?)
            .map_err(|_| anyhow!("{name} is not UTF-8 text: it must be a TOML file"))?;
        let mut config = Config::parse(&name.to_string(), &text)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let read = |file: &String| {
            let plain = Path::new(file)
                .components()
                .all(|part| matches!(part, Component::Normal(_)));
            ensure!(
                plain && !file.contains('\\'),
                "{name} names {file}: a path must lie below the folder of the configuration, with / between its parts"
            );
            paths::read(&folder.join(file)).with_context(|| format!("{name} names it"))
        };
        let mut fingerprint = None;
        if let [vm] = config.vm.as_slice() {
            let initrd = vm.initrd.as_ref().map(read).transpose()?;
            let kernel = vm.kernel.as_ref().map(read).transpose()?;
            fingerprint = Some(self::fingerprint(&(&text, kernel, initrd)));
        }
        let mut files = Vec::new();
        let mut console = None;
        let index = job
            .and_then(|job| job.vm)
            .map_or(Ok(0), |wanted| index_of(&config, wanted, path))?;
        let vm = config.vm.get(index).context("there is no vm")?;
        let kernel = match job {
            Some(_) => vm
                .kernel
                .as_ref()
                .map(read)
                .transpose()?
                .unwrap_or_default(),
            None => Vec::new(),
        };
        let kind = image::kind(&kernel, vm.protocol).ok();
        let linux = kind.filter(|kind| !matches!(kind, Kind::Multiboot(_)));
        let job = wanted(job, linux, vm.initrd.is_some())?;
        if let Some(job) = job {
            console = OneConsole::new(&config, index)?;
            let vm = config.vm.get_mut(index).context("there is no vm")?;
            let given = vm.initrd.as_ref().map(read).transpose()?;
            let initrd = with_job(job, &kernel, given, false, provisioner)?;
            files.push(entry(WITH_JOB, initrd));
            vm.initrd = Some(WITH_JOB.into());
            vm.cmdline = guest::exec_cmdline(&vm.cmdline);
            text = toml::to_string(&config)?;
        }
        for file in config.files().into_iter().filter(|file| *file != WITH_JOB) {
            files.push(entry(file, read(&file.to_owned())?));
        }
        Ok(Self {
            config,
            text,
            files,
            has_job: job.is_some(),
            console,
            fingerprint,
        })
    }

    /// Bytes of memory of all guests together.
    pub fn memory(&self) -> u64 {
        let sizes = self.config.vm.iter().map(|vm| vm.memory);
        sizes.fold(0, u64::saturating_add)
    }

    /// CPUs that a machine must have for all guests.
    pub fn cpus(&self) -> u32 {
        let named = self.config.vm.iter().flat_map(|vm| &vm.cpus);
        named.max().map_or(1, |last| last.saturating_add(1))
    }

    /// Whether a guest has the second serial port.
    pub fn has_com2(&self) -> bool {
        self.config.vm.iter().any(|vm| vm.serial == Serial::Com2)
    }

    /// The guest, where there is just one.
    ///
    /// # Errors
    /// When there are more.
    pub fn only_guest(&self) -> Result<Guest<'_>> {
        let [vm] = self.config.vm.as_slice() else {
            bail!(
                "without Vireo a machine runs one guest, and the configuration has {}",
                self.config.vm.len()
            );
        };
        let file = |name: &String| {
            let place = format!("{FOLDER}/{name}");
            let file = self.files.iter().find(|file| file.path == place)?;
            Some(file.contents.as_slice())
        };
        Ok(Guest {
            kernel: vm
                .kernel
                .as_ref()
                .and_then(file)
                .context("the guest has no kernel")?,
            initrd: vm.initrd.as_ref().and_then(file),
            modules: vm
                .modules
                .iter()
                .filter_map(|module| Some((file(&module.file)?, &*module.cmdline)))
                .collect(),
            vm,
        })
    }

    /// All files of the volume, with the loader `application`.
    pub fn into_files(self, application: Vec<u8>) -> Vec<Entry> {
        let mut files = vec![
            Entry {
                path: LOADER.into(),
                contents: application,
            },
            entry(CONFIG, self.text.into_bytes()),
        ];
        files.extend(self.files);
        files
    }
}

fn entry(name: &str, contents: Vec<u8>) -> Entry {
    Entry {
        path: format!("{FOLDER}/{name}"),
        contents,
    }
}

impl OneConsole {
    /// Those of all guests but the one with this index are the others'; none where it is alone.
    fn new(config: &Config, index: usize) -> Result<Option<Self>> {
        let mut others: Vec<String> = config.vm.iter().map(|vm| vm.name.clone()).collect();
        let vm = others.remove(index);
        if others.is_empty() {
            return Ok(None);
        }
        let key = u8::try_from(index + 1)
            .ok()
            .filter(|number| *number < 10)
            .with_context(|| {
                format!("the console of {vm} has no key: only the first nine vms' do")
            })?;
        Ok(Some(Self {
            vm,
            key: b'0' + key,
            others,
        }))
    }
}

/// Where `config` has the guest `wanted`.
fn index_of(config: &Config, wanted: &str, path: &Path) -> Result<usize> {
    let position = config.vm.iter().position(|vm| vm.name == wanted);
    position.with_context(|| {
        let names: Vec<&str> = config.vm.iter().map(|vm| vm.name.as_str()).collect();
        format!(
            "{} has no vm \"{wanted}\": it has {}",
            path.display(),
            names.join(", ")
        )
    })
}

/// The initrd with the job's archive in front of it.
fn with_job(
    job: &Job,
    kernel: &[u8],
    initrd: Option<Vec<u8>>,
    has_busybox: bool,
    provisioner: &Provisioner,
) -> Result<Vec<u8>> {
    let busybox = if has_busybox {
        None
    } else {
        Some(busybox_for(kernel, provisioner)?)
    };
    let busybox = busybox
        .as_ref()
        .map(|(program, applets)| (program.as_slice(), applets.as_slice()));
    let stopwatch = if image::is_32_bit_linux(kernel) {
        None
    } else {
        Some(paths::read(&build::stopwatch()?)?)
    };
    let mut archive = guest::exec_overlay(&Exec {
        nonce: job.nonce,
        command: job.command,
        programs: job.programs,
        stopwatch: stopwatch.as_deref(),
        busybox,
    });
    archive.extend(initrd.unwrap_or_default());
    Ok(archive)
}

/// Busybox and its applets for a guest with this kernel.
fn busybox_for(kernel: &[u8], provisioner: &Provisioner) -> Result<(Vec<u8>, Vec<String>)> {
    if image::is_32_bit_linux(kernel) {
        provisioner.busybox_i386()
    } else {
        provisioner.busybox()
    }
}

/// The job, if the kernel, which is of this kind if it may be Linux, is one to have it.
fn wanted<'a, 'b>(
    job: Option<&'a Job<'b>>,
    linux: Option<Kind>,
    has_initrd: bool,
) -> Result<Option<&'a Job<'b>>> {
    let commanded = job.is_some_and(|job| job.command.is_some());
    ensure!(
        linux.is_some() || !commanded,
        "a command needs the shell of a Linux guest, and this guest has no Linux kernel; leave --exec away"
    );
    // Of other ELF files nobody knows what they do with an initrd.
    let may_have = match linux {
        Some(Kind::Elf) => has_initrd || commanded,
        linux => linux.is_some(),
    };
    Ok(job.filter(|_| may_have))
}

/// Names of files on the volume, no two of them the same.
#[derive(Default)]
struct Names(Vec<String>);

impl Names {
    /// One like that of the file at `path`.
    fn of(&mut self, path: &Path) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut name: String = name.chars().filter(|c| plain(*c)).collect();
        let taken = |name: &str, all: &[String]| {
            let same = |other: &String| other.eq_ignore_ascii_case(name);
            name.trim_matches('.').is_empty()
                || [CONFIG, INITRD]
                    .iter()
                    .any(|own| own.eq_ignore_ascii_case(name))
                || all.iter().any(same)
        };
        if taken(&name, &self.0) {
            name = format!("{}-{name}", self.0.len());
        }
        self.0.push(name.clone());
        name
    }
}

fn fingerprint(basis: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    basis.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;

    fn config(text: &str, files: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let name = format!(
            "vireo-volume-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        );
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(folder.join("images")).unwrap();
        std::fs::write(folder.join("vireo.toml"), text).unwrap();
        for file in files {
            std::fs::write(folder.join(file), file).unwrap();
        }
        let progress = Progress::new();
        let volume = Volume::from_config(
            &folder.join("vireo.toml"),
            None,
            &Provisioner::new(&progress),
        );
        std::fs::remove_dir_all(folder).unwrap();
        Ok(volume?
            .into_files(b"MZ".to_vec())
            .into_iter()
            .map(|file| (file.path, file.contents))
            .collect())
    }

    #[test]
    fn a_configuration_brings_each_file_once() {
        let text = "[[vm]]\nname='a'\nmemory='2M'\nkernel='images/k'\n[[vm]]\nname='b'\nmemory='2M'\nkernel='images/k'\ninitrd='i'\n";
        let files = config(text, &["images/k", "i"]).unwrap();
        let paths: Vec<&str> = files.iter().map(|file| file.0.as_str()).collect();
        assert_eq!(
            paths,
            [LOADER, "vireo/vireo.toml", "vireo/images/k", "vireo/i"]
        );
        assert_eq!(files[1].1, text.as_bytes());
    }

    #[test]
    fn a_wrong_configuration_is_refused_as_by_the_loader() {
        for (text, place) in [
            ("[[vm]]\nname = 'a'\nmemory 5\n", "vireo.toml:3:"),
            (
                "colour = 1\n",
                "vireo.toml:1:1: unknown field `colour`, expected",
            ),
        ] {
            let error = config(text, &[]).unwrap_err().to_string();
            assert!(error.contains(place), "{error}");
        }
    }

    #[test]
    fn options_make_a_configuration_that_the_loader_reads() {
        let kernel = std::env::temp_dir().join(format!("vireo-kernel-{}", std::process::id()));
        std::fs::write(&kernel, "kernel").unwrap();
        let single = Single {
            kernel: Some(&kernel),
            cmdline: Some("a=\"b c\" \\d"),
            memory: Some(64 << 20),
            apic: Some(ApicMode::ApicV),
            statistics: Statistics::Times,
            ..Single::default()
        };
        let progress = Progress::new();
        let volume = |single| Volume::single(single, None, None, &Provisioner::new(&progress));
        let good = volume(&single).unwrap();
        let vm = &good.config.vm[0];
        assert_eq!(
            (vm.cmdline.as_str(), vm.memory),
            ("a=\"b c\" \\d", 64 << 20)
        );
        assert_eq!((vm.apic, &vm.initrd), (ApicMode::ApicV, &None));
        assert_eq!(vm.statistics, Statistics::Times);
        let odd = Single {
            memory: Some(3 << 20),
            ..single
        };
        let error = volume(&odd).err().unwrap().to_string();
        assert!(error.starts_with("memory is wrong; expected"), "{error}");
        std::fs::remove_file(kernel).unwrap();
    }

    #[test]
    fn a_multiboot_kernel_has_its_name_and_its_modules_and_no_job() {
        let folder = std::env::temp_dir().join(format!("vireo-multiboot-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("b")).unwrap();
        let header: Vec<u8> = [0x1bad_b002_u32, 0, 0xe452_4ffe]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        std::fs::write(folder.join("my kernel.bin"), header).unwrap();
        for module in ["m", "b/M", "initrd"] {
            std::fs::write(folder.join(module), module).unwrap();
        }
        let modules = ["m", "b/M", "initrd"].map(|name| (folder.join(name), format!("to {name}")));
        let kernel = folder.join("my kernel.bin");
        let single = Single {
            kernel: Some(&kernel),
            modules: &modules,
            ..Single::default()
        };
        let progress = Progress::new();
        let mut job = Job {
            nonce: "n",
            command: None,
            programs: &[],
            vm: None,
        };
        let volume =
            |job: &Job| Volume::single(&single, Some(job), None, &Provisioner::new(&progress));
        let good = volume(&job).unwrap();
        let vm = &good.config.vm[0];
        assert_eq!(
            (vm.kernel.as_deref(), &*vm.cmdline),
            (Some("mykernel.bin"), "")
        );
        let names: Vec<&str> = vm.modules.iter().map(|module| &*module.file).collect();
        assert_eq!(names, ["m", "2-M", "3-initrd"]);
        assert_eq!(vm.modules[2].cmdline, "to initrd");
        assert!(!good.has_job && vm.initrd.is_none());
        assert_eq!(good.files[2].contents, b"b/M");
        job.command = Some("true");
        let error = volume(&job).err().unwrap().to_string();
        assert!(error.contains("leave --exec away"), "{error}");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_missing_file_and_a_path_outside_are_reported_by_name() {
        let error = config("[[vm]]\nname='a'\nmemory='2M'\nkernel = 'absent'\n", &[]).unwrap_err();
        assert!(format!("{error:#}").contains("absent"), "{error:#}");
        for outside in ["../k", "/etc/hostname", "a\\\\b"] {
            let text = format!("[[vm]]\nname='a'\nmemory='2M'\nkernel = \"{outside}\"\n");
            let error = config(&text, &[]).unwrap_err();
            assert!(error.to_string().contains("below the folder"), "{error:#}");
        }
    }
}
