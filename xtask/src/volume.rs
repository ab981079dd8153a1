//! What stands on the boot volume: the loader, `\vireo\vireo.toml`, and the
//! files that it names.

use crate::guest::{self, Exec};
use crate::image::{Entry, LOADER};
use crate::provision::Provisioner;
use crate::{build, paths};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Component, Path};
use toml::{Table, Value};
use vireo_handoff::Config;

/// The configuration's name on the volume.
const CONFIG: &str = "vireo.toml";
/// The folder of the configuration on the volume.
const FOLDER: &str = "vireo";
/// The memory that is assumed where the configuration names none; the loader
/// then says what is wrong with it.
const ASSUMED: u64 = 256 << 20;

/// One guest, given on the command line. What is left out is the default
/// guest's; a guest with a kernel of its own has only what it is given.
#[derive(Clone, Debug, Default)]
pub struct Single<'a> {
    /// The kernel.
    pub kernel: Option<&'a Path>,
    /// The initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// The kernel's command line.
    pub cmdline: Option<&'a str>,
    /// Memory, such as `256M`.
    pub memory: Option<&'a str>,
    /// Number of virtual CPUs.
    pub vcpus: Option<u32>,
    /// The key `apic` of the configuration.
    pub apic: Option<&'a str>,
}

/// What a guest's shell is to do instead of taking the terminal.
pub struct Job<'a> {
    /// See [`crate::framing`].
    pub nonce: &'a str,
    /// The script, or `None` for a shell that reads the input.
    pub command: Option<&'a str>,
    /// Programs for it, by name.
    pub programs: &'a [(&'a str, &'a [u8])],
}

/// The configuration and its files.
pub struct Volume {
    config: String,
    files: Vec<Entry>,
    /// Bytes of memory of all guests together.
    pub memory: u64,
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
    /// The kernel's command line.
    pub cmdline: String,
    /// Number of CPUs.
    pub vcpus: u32,
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
        let default_initrd = single.kernel.is_none() && single.initrd.is_none();
        let mut kernel = single.kernel.map(paths::read).transpose()?;
        let mut initrd = single.initrd.map(paths::read).transpose()?;
        if kernel.is_none() {
            let default = provisioner.default_guest()?;
            kernel = Some(paths::read(&default.kernel)?);
            if initrd.is_none() {
                initrd = Some(guest::initramfs(&default.busybox, &default.applets));
            }
        }
        if let (true, Some((columns, rows, name)), Some(initrd)) =
            (default_initrd, terminal, &mut initrd)
        {
            initrd.splice(..0, guest::terminal_overlay(columns, rows, name));
        }
        let mut cmdline = single.cmdline.unwrap_or(guest::CMDLINE).to_owned();
        let memory = single.memory.unwrap_or(guest::MEMORY);
        let vcpus = i64::from(single.vcpus.unwrap_or(1));
        let fingerprint = fingerprint(&(&kernel, &initrd, &cmdline, memory, vcpus));
        if let Some(job) = job {
            cmdline = guest::exec_cmdline(&cmdline);
            initrd = Some(with_job(job, initrd, default_initrd, provisioner)?);
        }
        let mut vm = Table::new();
        vm.insert("name".into(), "linux".into());
        vm.insert("memory".into(), memory.into());
        vm.insert("vcpus".into(), vcpus.into());
        vm.insert("kernel".into(), "kernel".into());
        vm.insert("cmdline".into(), cmdline.into());
        if let Some(apic) = single.apic {
            vm.insert("apic".into(), apic.into());
        }
        let mut files = vec![entry("kernel", kernel.unwrap_or_default())];
        if let Some(initrd) = initrd {
            vm.insert("initrd".into(), "initrd".into());
            files.push(entry("initrd", initrd));
        }
        let config = Table::from_iter([("vm".to_owned(), Value::Array(vec![Value::Table(vm)]))]);
        Ok(Self {
            config: config.to_string(),
            files,
            memory: parse_memory(memory).unwrap_or(ASSUMED),
            fingerprint: Some(fingerprint),
        })
    }

    /// The volume for a configuration file, whose paths are relative to its
    /// folder. The first guest gets the job.
    ///
    /// # Errors
    /// When the file is not text, or a file that it names cannot be read.
    /// Anything else that is wrong with it is the loader's to say: it gets the
    /// text as it is, so that line and column are those of the file.
    pub fn from_config(path: &Path, job: Option<&Job>, provisioner: &Provisioner) -> Result<Self> {
        let text = String::from_utf8(paths::read(path)?).map_err(|_| {
            anyhow!(
                "{} is not UTF-8 text: it must be a TOML file",
                path.display()
            )
        })?;
        if Config::parse(CONFIG, &text).is_err() {
            return Ok(Self {
                config: text,
                files: Vec::new(),
                memory: ASSUMED,
                fingerprint: None,
            });
        }
        let mut config: Table = text.parse()?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut files: Vec<Entry> = Vec::new();
        let mut memory = 0;
        let mut only = None;
        let guests = config.get_mut("vm").and_then(Value::as_array_mut);
        for (index, vm) in guests
            .into_iter()
            .flatten()
            .filter_map(Value::as_table_mut)
            .enumerate()
        {
            memory += vm.get("memory").and_then(memory_of).unwrap_or(ASSUMED);
            let contents = |key| {
                let name = vm.get(key)?.as_str()?;
                paths::read(&folder.join(name)).ok()
            };
            only =
                (index == 0).then(|| fingerprint(&(&text, contents("kernel"), contents("initrd"))));
            if let (0, Some(job)) = (index, job) {
                let given = vm.get("initrd").and_then(Value::as_str);
                let given = given
                    .map(|name| paths::read(&folder.join(name)))
                    .transpose()?;
                let initrd = with_job(job, given, false, provisioner)?;
                files.push(entry("initrd-with-job", initrd));
                vm.insert("initrd".into(), "initrd-with-job".into());
                let cmdline = vm
                    .get("cmdline")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                vm.insert("cmdline".into(), guest::exec_cmdline(cmdline).into());
            }
            for name in ["kernel", "initrd"]
                .iter()
                .filter_map(|key| vm.get(*key)?.as_str())
            {
                let place = format!("{FOLDER}/{name}");
                if files.iter().any(|file| file.path == place) {
                    continue;
                }
                let plain = Path::new(name)
                    .components()
                    .all(|part| matches!(part, Component::Normal(_)));
                ensure!(
                    plain && !name.contains('\\'),
                    "{} names {name}: a path must lie below the folder of the configuration, with / between its parts",
                    path.display()
                );
                let contents = paths::read(&folder.join(name))
                    .with_context(|| format!("{} names it", path.display()))?;
                files.push(entry(name, contents));
            }
        }
        let config = if job.is_some() {
            config.to_string()
        } else {
            text
        };
        Ok(Self {
            config,
            files,
            memory,
            fingerprint: only,
        })
    }

    /// The guest, where there is just one.
    ///
    /// # Errors
    /// When there are more or none, or it has no kernel.
    pub fn only_guest(&self) -> Result<Guest<'_>> {
        let config: Table = self.config.parse()?;
        let guests = config.get("vm").and_then(Value::as_array);
        let guests = guests.map_or(&[][..], Vec::as_slice);
        let [vm] = guests else {
            bail!(
                "without Vireo a machine runs one guest, and the configuration has {}",
                guests.len()
            );
        };
        let file = |key| {
            let place = format!("{FOLDER}/{}", vm.get(key)?.as_str()?);
            let file = self.files.iter().find(|file| file.path == place)?;
            Some(file.contents.as_slice())
        };
        let text = vm.get("cmdline").and_then(Value::as_str);
        let vcpus = vm.get("vcpus").and_then(Value::as_integer).unwrap_or(1);
        Ok(Guest {
            kernel: file("kernel").context("the configuration names no kernel")?,
            initrd: file("initrd"),
            cmdline: text.unwrap_or_default().to_owned(),
            vcpus: u32::try_from(vcpus).context("the number of vCPUs is not possible")?,
        })
    }

    /// All files of the volume, with the loader `application`.
    pub fn into_files(self, application: Vec<u8>) -> Vec<Entry> {
        let mut files = vec![
            Entry {
                path: LOADER.into(),
                contents: application,
            },
            entry(CONFIG, self.config.into_bytes()),
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

/// The initrd with the job's archive in front of it.
fn with_job(
    job: &Job,
    initrd: Option<Vec<u8>>,
    has_busybox: bool,
    provisioner: &Provisioner,
) -> Result<Vec<u8>> {
    let busybox = if has_busybox {
        None
    } else {
        Some(provisioner.busybox()?)
    };
    let busybox = busybox
        .as_ref()
        .map(|(program, applets)| (program.as_slice(), applets.as_slice()));
    let mut archive = guest::exec_overlay(&Exec {
        nonce: job.nonce,
        command: job.command,
        programs: job.programs,
        stopwatch: &paths::read(&build::stopwatch()?)?,
        busybox,
    });
    archive.extend(initrd.unwrap_or_default());
    Ok(archive)
}

fn fingerprint(basis: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    basis.hash(&mut hasher);
    hasher.finish()
}

fn memory_of(value: &Value) -> Option<u64> {
    match value {
        Value::Integer(bytes) => u64::try_from(*bytes).ok(),
        Value::String(text) => parse_memory(text),
        _ => None,
    }
}

/// Bytes in a size such as `256M`, `1G`, `65536K` or `1048576`.
pub fn parse_memory(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
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
    fn sizes_are_read_as_the_loader_reads_them() {
        assert_eq!(parse_memory("256M"), Some(256 << 20));
        assert_eq!(parse_memory("1G"), Some(1 << 30));
        assert_eq!(parse_memory("4096"), Some(4096));
        for wrong in ["", "M", "1T", "-1M", "1 M", "99999999999999G"] {
            assert_eq!(parse_memory(wrong), None, "{wrong}");
        }
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
    fn a_wrong_configuration_is_left_as_it_is_for_the_loader() {
        for text in ["[[vm]]\nname = 'a'\nmemory 5\n", "colour = 1\n"] {
            let files = config(text, &[]).unwrap();
            assert_eq!(files[1], ("vireo/vireo.toml".into(), text.into()));
            assert_eq!(files.len(), 2);
        }
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
