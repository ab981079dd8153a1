//! The configuration: which guests there are and what each is given.
//!
//! The file is `\vireo\vireo.toml` on the boot volume. Paths in it are relative
//! to its folder.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The guests, in the order of the file.
    pub vm: Vec<Vm>,
}

/// What [`Vm::slice_us`] is where nothing is said.
pub const SLICE_US: u32 = 5000;

/// One `[[vm]]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// 1 to 31 letters, digits, `-` or `_`; unique.
    pub name: String,
    /// Bytes of RAM, a multiple of 2 MiB.
    pub memory: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The CPUs that it has for itself, one for each virtual CPU, by their numbers in the
    /// firmware's list; without any its virtual CPUs share those that are nobody's.
    pub cpus: Vec<u32>,
    /// On shared CPUs: the higher goes first.
    pub priority: u8,
    /// Microseconds of a turn on a shared CPU while a virtual CPU of the same priority is ready.
    pub slice_us: u32,
    /// It starts when the guest with this name, which is one before it, has ended for good.
    pub after: Option<String>,
    /// What is booted; with firmware, what that is given.
    pub kernel: Option<String>,
    /// Firmware, to start instead of the kernel.
    pub firmware: Option<String>,
    /// Initial RAM disk.
    pub initrd: Option<String>,
    /// What else is put into its memory for it.
    pub modules: Vec<Module>,
    /// Kernel command line.
    pub cmdline: String,
    /// How the kernel is started.
    pub protocol: Protocol,
    /// Who is the guest's local APIC.
    pub apic: ApicMode,
    /// Its local APICs have the x2APIC mode. Those without it let software change their
    /// identifiers.
    pub x2apic: bool,
    /// What is recorded about its VM exits.
    pub statistics: Statistics,
    /// It has the device that test suites expect.
    pub test_device: bool,
    /// Where its first serial port leads.
    pub serial: Serial,
    /// What follows when it resets its machine.
    pub on_reboot: Policy,
    /// What follows when it stops in any other way than by switching off.
    pub on_crash: Policy,
}

/// A file for a kernel, beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    pub file: String,
    /// What the kernel is told about it, behind its name.
    #[serde(default)]
    pub cmdline: String,
}

/// How a kernel is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// As its file looks: Linux's if it is a bzImage, PVH if it is an ELF file with its note,
    /// else multiboot.
    #[default]
    Auto,
    Linux,
    Multiboot,
    Pvh,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Linux => "linux",
            Self::Multiboot => "multiboot",
            Self::Pvh => "pvh",
        })
    }
}

/// Where a guest's first serial port leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Serial {
    /// To the operator's console, which all guests share.
    #[default]
    Console,
    /// To the machine's second serial port, which it has for itself.
    Com2,
}

/// What follows an end of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Nothing.
    #[default]
    Stop,
    /// It is started again, as it was first.
    Restart,
}

/// What is recorded about the VM exits of a guest, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Statistics {
    /// How many there were.
    #[default]
    Counts,
    /// How long each took, too.
    Times,
}

/// How much of a guest's local APIC the CPU is (SDM 3, 30).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApicMode {
    /// As much as it can be.
    #[default]
    Auto,
    /// Nothing: each access that has an effect is an exit.
    Emulated,
    /// The task-priority register and the decoding of accesses: virtual-APIC page, TPR
    /// shadow and APIC-access page.
    FlexPriority,
    /// Its registers and the delivery of interrupts too.
    ApicV,
}

impl ApicMode {
    /// All of them, the least first behind [`ApicMode::Auto`].
    pub const ALL: [Self; 4] = [Self::Auto, Self::Emulated, Self::FlexPriority, Self::ApicV];

    /// The name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Emulated => "emulated",
            Self::FlexPriority => "flexpriority",
            Self::ApicV => "apicv",
        }
    }
}

impl fmt::Display for ApicMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Config {
    /// The names of the files that the guests need, once each.
    pub fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = Vec::new();
        for vm in &self.vm {
            for name in vm.files() {
                if !files.contains(&name) {
                    files.push(name);
                }
            }
        }
        files
    }
}

impl Vm {
    /// The names of the files that it needs.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        let modules = self.modules.iter().map(|module| &module.file);
        self.kernel
            .iter()
            .chain(&self.firmware)
            .chain(&self.initrd)
            .chain(modules)
            .map(String::as_str)
    }
}

#[cfg(feature = "toml")]
mod read {
    use super::{ApicMode, Config, Module, Policy, Protocol, SLICE_US, Serial, Statistics, Vm};
    use alloc::format;
    use alloc::string::{String, ToString};
    use alloc::vec::Vec;
    use core::fmt;
    use core::ops::{Range, RangeInclusive};
    use serde::Deserialize;
    use toml::Spanned;

    /// What is wrong with a configuration file, and where.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct ConfigError {
        file: String,
        line: usize,
        column: usize,
        reason: String,
    }

    impl fmt::Display for ConfigError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let Self {
                file,
                line,
                column,
                reason,
            } = self;
            write!(f, "{file}:{line}:{column}: {reason}")
        }
    }

    impl core::error::Error for ConfigError {}

    impl ConfigError {
        /// What is wrong, without the place.
        pub fn reason(&self) -> &str {
            &self.reason
        }
    }

    /// Bytes in a size such as `256M`, `1G`, `65536K` or `1048576`.
    pub fn parse_size(text: &str) -> Option<u64> {
        let (digits, shift) = match text.char_indices().last()? {
            (end, 'K') => (text.get(..end)?, 10),
            (end, 'M') => (text.get(..end)?, 20),
            (end, 'G') => (text.get(..end)?, 30),
            _ => (text, 0),
        };
        digits.parse::<u64>().ok()?.checked_mul(1 << shift)
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct RawConfig {
        #[serde(default)]
        vm: Vec<RawVm>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct RawVm {
        name: Spanned<String>,
        memory: Spanned<Memory>,
        #[serde(default = "one")]
        vcpus: Spanned<u32>,
        #[serde(default = "shared")]
        cpus: Spanned<Cpus>,
        priority: Option<Spanned<u8>>,
        slice_us: Option<Spanned<u32>>,
        after: Option<Spanned<String>>,
        kernel: Option<String>,
        firmware: Option<String>,
        initrd: Option<String>,
        #[serde(default)]
        modules: Vec<Module>,
        #[serde(default)]
        cmdline: String,
        #[serde(default)]
        protocol: Protocol,
        #[serde(default)]
        apic: ApicMode,
        #[serde(default = "yes")]
        x2apic: bool,
        #[serde(default)]
        statistics: Statistics,
        #[serde(default)]
        test_device: bool,
        #[serde(default = "console")]
        serial: Spanned<Serial>,
        #[serde(default)]
        on_reboot: Policy,
        #[serde(default)]
        on_crash: Policy,
    }

    fn yes() -> bool {
        true
    }

    fn one() -> Spanned<u32> {
        Spanned::new(0..0, 1)
    }

    fn console() -> Spanned<Serial> {
        Spanned::new(0..0, Serial::Console)
    }

    fn shared() -> Spanned<Cpus> {
        Spanned::new(0..0, Cpus::Word(SHARED.to_string()))
    }

    /// The word for no CPUs of one's own.
    const SHARED: &str = "shared";
    /// The most virtual CPUs of a guest.
    const MOST_VCPUS: u32 = 64;
    /// What [`Vm::slice_us`] may be.
    const SLICES: RangeInclusive<u32> = 100..=1_000_000;

    /// CPUs of its own, or [`SHARED`].
    #[derive(Deserialize)]
    #[serde(
        untagged,
        expecting = "cpus is wrong; expected numbers of CPUs as in [1, 2], or \"shared\""
    )]
    enum Cpus {
        Own(Vec<u32>),
        Word(String),
    }

    /// Bytes, or a number with K, M or G.
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Memory {
        Bytes(u64),
        Text(String),
    }

    impl Memory {
        fn bytes(&self) -> Option<u64> {
            match self {
                Self::Bytes(bytes) => Some(*bytes),
                Self::Text(text) => parse_size(text),
            }
        }
    }

    /// Smallest step of a guest's memory.
    const STEP: u64 = 2 << 20;

    impl Config {
        /// Reads `text`, the content of `file`.
        ///
        /// # Errors
        /// The first thing that is wrong, with its line and column.
        pub fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
            let error = |span: Range<usize>, reason: String| {
                let before = text.get(..span.start).unwrap_or(text);
                ConfigError {
                    file: file.to_string(),
                    line: before.matches('\n').count() + 1,
                    column: before.chars().rev().take_while(|c| *c != '\n').count() + 1,
                    reason,
                }
            };
            let raw: RawConfig = toml::from_str(text).map_err(|problem| {
                let reason = problem.message().replace('\n', ", ");
                error(problem.span().unwrap_or_default(), reason)
            })?;
            let mut config = Self { vm: Vec::new() };
            for vm in raw.vm {
                let name = vm.name.get_ref();
                let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                if name.is_empty() || name.len() > 31 || !name.chars().all(legal) {
                    let reason = format!(
                        "\"{name}\" is no name for a vm; expected 1 to 31 letters, digits, '-' or '_'"
                    );
                    return Err(error(vm.name.span(), reason));
                }
                if config.vm.iter().any(|other| other.name == *name) {
                    let reason = format!("a second vm is called \"{name}\"; names must differ");
                    return Err(error(vm.name.span(), reason));
                }
                let memory = vm
                    .memory
                    .get_ref()
                    .bytes()
                    .filter(|bytes| *bytes > 0 && bytes % STEP == 0)
                    .ok_or_else(|| {
                        let reason = "memory is wrong; expected a multiple of 2 MiB such as \"256M\" or \"1G\"";
                        error(vm.memory.span(), reason.to_string())
                    })?;
                if vm.kernel.is_none() && vm.firmware.is_none() {
                    let reason = format!(
                        "the vm \"{name}\" has neither `kernel` nor `firmware`; expected one of them"
                    );
                    return Err(error(vm.name.span(), reason));
                }
                let vcpus = *vm.vcpus.get_ref();
                if !(1..=MOST_VCPUS).contains(&vcpus) {
                    let reason = format!("vcpus is {vcpus}; expected 1 to {MOST_VCPUS}");
                    return Err(error(vm.vcpus.span(), reason));
                }
                let cpus = match vm.cpus.get_ref() {
                    Cpus::Own(cpus) => cpus.clone(),
                    Cpus::Word(word) if word == SHARED => Vec::new(),
                    Cpus::Word(word) => {
                        let reason = format!(
                            "cpus is \"{word}\"; expected numbers of CPUs as in [1, 2], or \"{SHARED}\""
                        );
                        return Err(error(vm.cpus.span(), reason));
                    }
                };
                if !cpus.is_empty() && cpus.len() != vcpus as usize {
                    let reason = format!(
                        "cpus names {} CPUs; expected one for each of its vcpus, which are {vcpus}",
                        cpus.len()
                    );
                    return Err(error(vm.cpus.span(), reason));
                }
                let sharing = [
                    vm.priority
                        .as_ref()
                        .filter(|key| *key.get_ref() != 0)
                        .map(|key| ("priority", key.span())),
                    vm.slice_us
                        .as_ref()
                        .filter(|key| *key.get_ref() != SLICE_US)
                        .map(|key| ("slice_us", key.span())),
                ];
                if !cpus.is_empty()
                    && let Some((key, span)) = sharing.into_iter().flatten().next()
                {
                    let reason = format!(
                        "{key} is for guests that share CPUs, and this one has its own; leave it out"
                    );
                    return Err(error(span, reason));
                }
                let slice_us = match &vm.slice_us {
                    None => SLICE_US,
                    Some(slice) if SLICES.contains(slice.get_ref()) => *slice.get_ref(),
                    Some(slice) => {
                        let (least, most) = (SLICES.start(), SLICES.end());
                        let reason = format!(
                            "slice_us is {}; expected {least} to {most} microseconds",
                            slice.get_ref()
                        );
                        return Err(error(slice.span(), reason));
                    }
                };
                if let Some(after) = &vm.after
                    && !config.vm.iter().any(|other| other.name == *after.get_ref())
                {
                    let reason = format!(
                        "after is \"{}\"; expected the name of a vm before this one",
                        after.get_ref()
                    );
                    return Err(error(after.span(), reason));
                }
                let owner = |cpu: &u32| config.vm.iter().find(|other| other.cpus.contains(cpu));
                if let Some((cpu, other)) = cpus.iter().find_map(|cpu| Some((cpu, owner(cpu)?))) {
                    let reason =
                        format!("CPU {cpu} is the vm \"{}\"'s; expected others", other.name);
                    return Err(error(vm.cpus.span(), reason));
                }
                let serial = *vm.serial.get_ref();
                let mut others = config.vm.iter();
                if serial == Serial::Com2
                    && let Some(other) = others.find(|other| other.serial == serial)
                {
                    let reason = format!(
                        "the second serial port is the vm \"{}\"'s; expected \"console\"",
                        other.name
                    );
                    return Err(error(vm.serial.span(), reason));
                }
                let own = |cpu: &&u32| cpus.iter().filter(|other| other == cpu).count() > 1;
                if let Some(cpu) = cpus.iter().find(own) {
                    let reason = format!("cpus names CPU {cpu} twice; expected different ones");
                    return Err(error(vm.cpus.span(), reason));
                }
                config.vm.push(Vm {
                    name: name.clone(),
                    memory,
                    vcpus,
                    cpus,
                    priority: vm.priority.map_or(0, Spanned::into_inner),
                    slice_us,
                    after: vm.after.map(Spanned::into_inner),
                    kernel: vm.kernel,
                    firmware: vm.firmware,
                    initrd: vm.initrd,
                    modules: vm.modules,
                    cmdline: vm.cmdline,
                    protocol: vm.protocol,
                    apic: vm.apic,
                    statistics: vm.statistics,
                    x2apic: vm.x2apic,
                    test_device: vm.test_device,
                    serial,
                    on_reboot: vm.on_reboot,
                    on_crash: vm.on_crash,
                });
            }
            if config.vm.is_empty() {
                return Err(error(
                    0..0,
                    "there is no vm; expected a [[vm]] section".to_string(),
                ));
            }
            Ok(config)
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use proptest::prelude::*;

        fn reason(text: &str) -> String {
            Config::parse("vireo.toml", text).unwrap_err().to_string()
        }

        const GOOD: &str = "[[vm]]\nname = \"a\"\nmemory = \"256M\"\nkernel = \"vmlinuz\"\n";

        #[test]
        fn a_small_configuration() {
            let config = Config::parse("vireo.toml", GOOD).unwrap();
            assert_eq!(config.vm[0].memory, 256 << 20);
            assert_eq!((config.vm[0].vcpus, &*config.vm[0].cmdline), (1, ""));
            assert_eq!(config.files(), ["vmlinuz"]);
            let bytes = postcard::to_allocvec(&config).unwrap();
            assert_eq!(postcard::from_bytes::<Config>(&bytes).unwrap(), config);
        }

        #[test]
        fn modules_and_a_protocol() {
            let parse = |lines| Config::parse("vireo.toml", &alloc::format!("{GOOD}{lines}\n"));
            let vm = parse("").unwrap().vm.remove(0);
            assert_eq!((vm.modules, vm.protocol), (Vec::new(), Protocol::Auto));
            let config = parse(
                "protocol = \"multiboot\"\nmodules = [{file = \"m\", cmdline = \"a b\"}, {file = \"vmlinuz\"}]",
            )
            .unwrap();
            assert_eq!(config.files(), ["vmlinuz", "m"]);
            let vm = &config.vm[0];
            assert_eq!(vm.protocol, Protocol::Multiboot);
            assert_eq!(
                (&*vm.modules[0].cmdline, &*vm.modules[1].cmdline),
                ("a b", "")
            );
            for (line, expected) in [
                ("protocol = \"grub\"", "5:12: unknown variant `grub`"),
                ("modules = [{name = \"m\"}]", "5:13: unknown field `name`"),
                ("modules = [{}]", "5:12: missing field `file`"),
            ] {
                let wrong = parse(line).unwrap_err().to_string();
                assert!(
                    wrong.starts_with(&alloc::format!("vireo.toml:{expected}")),
                    "{wrong}"
                );
            }
        }

        #[test]
        fn firmware_may_have_a_kernel() {
            let text = GOOD.replace("kernel = \"vmlinuz\"", "firmware = \"bios.bin\"");
            let config = Config::parse("vireo.toml", &text).unwrap();
            assert_eq!(config.files(), ["bios.bin"]);
            assert_eq!(config.vm[0].kernel, None);
            let text = alloc::format!("{GOOD}firmware = \"bios.bin\"\n");
            let config = Config::parse("vireo.toml", &text).unwrap();
            assert_eq!(config.files(), ["vmlinuz", "bios.bin"]);
        }

        #[test]
        fn an_apic_without_x2apic_mode() {
            let x2apic = |text: &str| Config::parse("vireo.toml", text).unwrap().vm[0].x2apic;
            assert!(x2apic(GOOD));
            assert!(!x2apic(&alloc::format!("{GOOD}x2apic = false\n")));
        }

        #[test]
        fn an_apic_of_each_kind() {
            for mode in ApicMode::ALL {
                let text = alloc::format!("{GOOD}apic = \"{mode}\"\n");
                let config = Config::parse("vireo.toml", &text).unwrap();
                assert_eq!(config.vm[0].apic, mode);
            }
            let config = Config::parse("vireo.toml", GOOD).unwrap();
            assert_eq!(config.vm[0].apic, ApicMode::Auto);
            let wrong = reason(&alloc::format!("{GOOD}apic = \"x2apic\"\n"));
            assert!(
                wrong.starts_with(
                    "vireo.toml:5:8: unknown variant `x2apic`, expected one of `auto`, `emulated`"
                ),
                "{wrong}"
            );
        }

        #[test]
        fn sizes() {
            assert_eq!(parse_size("256M"), Some(256 << 20));
            assert_eq!(parse_size("1G"), Some(1 << 30));
            assert_eq!(parse_size("4K"), parse_size("4096"));
            for wrong in ["", "M", "1T", "-1M", "1 M", "1MM", "99999999999999G"] {
                assert_eq!(parse_size(wrong), None, "{wrong}");
            }
        }

        #[test]
        fn statistics_are_counts_or_times() {
            let parse = |line| Config::parse("vireo.toml", &alloc::format!("{GOOD}{line}\n"));
            for (line, expected) in [
                ("", Statistics::Counts),
                ("statistics = \"counts\"", Statistics::Counts),
                ("statistics = \"times\"", Statistics::Times),
            ] {
                assert_eq!(parse(line).unwrap().vm[0].statistics, expected);
            }
            let wrong = parse("statistics = true").unwrap_err().to_string();
            assert!(wrong.starts_with("vireo.toml:5:14: "), "{wrong}");
            let wrong = parse("statistics = \"all\"").unwrap_err().to_string();
            assert!(
                wrong.starts_with(
                    "vireo.toml:5:14: unknown variant `all`, expected `counts` or `times`"
                ),
                "{wrong}"
            );
        }

        #[test]
        fn what_follows_an_end() {
            let parse = |lines| Config::parse("vireo.toml", &alloc::format!("{GOOD}{lines}\n"));
            let vm = parse("").unwrap().vm.remove(0);
            assert_eq!((vm.on_reboot, vm.on_crash), (Policy::Stop, Policy::Stop));
            let vm = parse("on_reboot = \"restart\"\non_crash = \"stop\"")
                .unwrap()
                .vm
                .remove(0);
            assert_eq!((vm.on_reboot, vm.on_crash), (Policy::Restart, Policy::Stop));
            let wrong = parse("on_crash = \"again\"").unwrap_err().to_string();
            assert!(
                wrong.starts_with("vireo.toml:5:12: unknown variant `again`"),
                "{wrong}"
            );
        }

        #[test]
        fn the_second_serial_port_has_one_owner() {
            let other = GOOD.replace("\"a\"", "\"b\"");
            let both = |first, second| {
                let text = alloc::format!("{GOOD}serial = {first}\n{other}serial = {second}\n");
                Config::parse("vireo.toml", &text)
            };
            let config = both("\"com2\"", "\"console\"").unwrap();
            assert_eq!(
                (config.vm[0].serial, config.vm[1].serial),
                (Serial::Com2, Serial::Console)
            );
            let wrong = both("\"com2\"", "\"com2\"").unwrap_err().to_string();
            assert_eq!(
                wrong,
                "vireo.toml:10:10: the second serial port is the vm \"a\"'s; expected \"console\""
            );
            let wrong = both("\"com3\"", "\"console\"").unwrap_err().to_string();
            assert!(
                wrong.starts_with("vireo.toml:5:10: unknown variant `com3`"),
                "{wrong}"
            );
        }

        #[test]
        fn a_cpu_has_one_owner() {
            let other = GOOD.replace("\"a\"", "\"b\"");
            let both = |first, second| {
                Config::parse(
                    "vireo.toml",
                    &alloc::format!("{GOOD}{first}\n{other}{second}\n"),
                )
            };
            let config = both("cpus = [1]", "cpus = [2]").unwrap();
            assert_eq!(
                (&*config.vm[0].cpus, &*config.vm[1].cpus),
                (&[1][..], &[2][..])
            );
            let config = both("priority = 3\nslice_us = 100", "cpus = [0]").unwrap();
            assert!(config.vm[0].cpus.is_empty());
            assert_eq!((config.vm[0].priority, config.vm[0].slice_us), (3, 100));
            assert_eq!(both("", "cpus = \"shared\"").unwrap().vm[1].slice_us, 5000);
            for (first, second, expected) in [
                ("cpus = [1]", "cpus = [1]", "10:8: CPU 1 is the vm \"a\"'s"),
                (
                    "",
                    "cpus = [1, 2]",
                    "10:8: cpus names 2 CPUs; expected one for each",
                ),
                ("cpus = [-1]", "", "5:8: cpus is wrong; expected numbers"),
                (
                    "cpus = \"all\"",
                    "",
                    "5:8: cpus is \"all\"; expected numbers",
                ),
                ("vcpus = 0", "", "5:9: vcpus is 0; expected 1 to 64"),
                ("vcpus = 65", "", "5:9: vcpus is 65; expected 1 to 64"),
                (
                    "cpus = [1]\npriority = 1",
                    "",
                    "6:12: priority is for guests that share CPUs",
                ),
                (
                    "after = \"b\"",
                    "",
                    "5:9: after is \"b\"; expected the name of a vm before",
                ),
                ("slice_us = 99", "", "5:12: slice_us is 99; expected 100 to"),
            ] {
                let wrong = both(first, second).unwrap_err().to_string();
                assert!(wrong.contains(expected), "{wrong}");
            }
        }

        #[test]
        fn errors_say_where_and_what() {
            assert!(reason("[[vm]\n").starts_with("vireo.toml:1:"));
            let unknown = reason(&alloc::format!("{GOOD}colour = 1\n"));
            assert!(
                unknown.starts_with("vireo.toml:5:1: unknown field `colour`, expected"),
                "{unknown}"
            );
            let twice = reason(&alloc::format!("{GOOD}{GOOD}"));
            assert!(
                twice.starts_with("vireo.toml:6:8: a second vm is called \"a\""),
                "{twice}"
            );
            let odd = reason(&GOOD.replace("256M", "3M"));
            assert!(
                odd.starts_with("vireo.toml:3:10: memory is wrong; expected a multiple"),
                "{odd}"
            );
            assert!(reason(&GOOD.replace("\"a\"", "\"a b\"")).contains("is no name"));
            for empty in ["", "# nothing\n", "vm = []"] {
                assert!(reason(empty).contains("1:1: there is no vm; expected a [[vm]] section"));
            }
            assert!(
                reason("[[vm]]\nname = \"a\"\nmemory = \"2M\"\n")
                    .starts_with("vireo.toml:2:8: the vm \"a\" has neither")
            );
        }

        proptest! {
            /// Whatever is written there, it is a configuration that survives the way to the
            /// hypervisor, or an error with a place in the text.
            #[test]
            fn no_text_is_a_disaster(parts in prop::collection::vec(prop_oneof![
                Just(GOOD.to_string()),
                prop::sample::select(&[
                    "[[vm]]", "name = ", "memory = ", "kernel", "firmware = \"f\"", "modules = [{file = \"m\"}]",
                    "vcpus = ", "cpus = [0, 1]", "cmdline = ", "protocol = \"pvh\"", "test_device = true",
                    "after = \"a\"", "priority = 3", "\"b\"", "\"2M\"", "0", "-1", "18446744073709551615", "\n", "#", "\u{e9}",
                ][..]).prop_map(String::from),
                ".{0,8}",
            ], 0..12)) {
                let text = parts.concat();
                match Config::parse("vireo.toml", &text) {
                    Ok(config) => {
                        let bytes = postcard::to_allocvec(&config).unwrap();
                        prop_assert_eq!(postcard::from_bytes::<Config>(&bytes).unwrap(), config);
                    }
                    Err(error) => {
                        prop_assert!(error.line >= 1 && error.line <= text.matches('\n').count() + 1);
                        prop_assert!(!error.reason().contains('\n'));
                    }
                }
            }
        }
    }
}

#[cfg(feature = "toml")]
pub use read::{ConfigError, parse_size};
