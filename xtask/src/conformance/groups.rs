//! What kvm-unit-tests says about its groups, in `x86/unittests.cfg`: a section for each, of
//! lines `key = value`.

use std::collections::HashMap;
use std::time::Duration;

/// Bytes of memory where a group asks for none: QEMU's default.
const MEMORY: u64 = 128 << 20;
/// How long a group may take on hardware where it says nothing else (`scripts/runtime.bash`).
const TIMEOUT: Duration = Duration::from_secs(90);

/// One group: a run of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub name: String,
    /// The kernel's file.
    pub file: String,
    pub vcpus: u32,
    /// Bytes.
    pub memory: u64,
    /// The kernel's arguments; see [`Group::arguments`].
    arguments: String,
    /// It is for a CPU of AMD.
    for_amd: bool,
    /// It is for a CPU whose local APIC has the x2APIC mode, or may have it.
    pub x2apic: bool,
    /// How long it may take on hardware.
    pub timeout: Duration,
    /// Why it says nothing about this hypervisor.
    pub not_applicable: Option<String>,
}

/// How a group asks the shell for the time, in seconds since 1970.
const TIME: &str = "`date +%s`";

impl Group {
    /// The kernel's arguments, on a machine whose clock says `time`.
    pub fn arguments(&self, time: u64) -> String {
        self.arguments.replace(TIME, &time.to_string())
    }

    /// Whether it compares the machine's clock with the time.
    pub fn wants_time(&self) -> bool {
        self.arguments.contains(TIME)
    }

    /// What the kernel is told by its module, where something is to be told. A machine without
    /// Vireo has nothing of what the suite's machines have; and where a group is for a CPU of
    /// AMD, it is not told that it runs on a hypervisor that would play one.
    pub fn environment(&self, bare: bool) -> Option<String> {
        let machine = bare.then(|| {
            let memory = self.memory >> 20;
            format!("NR_CPUS={}\nMEMSIZE={memory}\n", self.vcpus)
        });
        (bare || self.for_amd).then(|| format!("{}TEST_DEVICE=0\n", machine.unwrap_or_default()))
    }
}

/// The groups in `text`, in its order.
pub fn parse(text: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut section: Option<(&str, HashMap<&str, &str>)> = None;
    for line in text.lines().chain(["[]"]) {
        let line = line.trim();
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            let next = (name, HashMap::new());
            if let Some((name, keys)) = section.replace(next) {
                groups.extend(group(name, &keys));
            }
        } else if let (false, Some((key, value)), Some((_, keys))) =
            (line.starts_with('#'), line.split_once('='), &mut section)
        {
            keys.insert(key.trim(), value.trim());
        }
    }
    groups
}

fn group(name: &str, keys: &HashMap<&str, &str>) -> Option<Group> {
    let file = (*keys.get("file")?).to_owned();
    let words: Vec<&str> = keys
        .get("qemu_params")
        .or_else(|| keys.get("extra_params"))
        .map(|text| text.split_whitespace().collect())
        .unwrap_or_default();
    let memory = words
        .windows(2)
        .find(|pair| pair[0] == "-m")
        .and_then(|pair| size(pair[1]));
    let arguments = keys.get("test_args").copied().unwrap_or_default();
    let timeout = keys.get("timeout").and_then(|text| text.parse().ok());
    let not_applicable = not_applicable(name, keys, &words);
    Some(Group {
        name: name.to_owned(),
        file,
        vcpus: keys
            .get("smp")
            .and_then(|text| text.parse().ok())
            .unwrap_or(1),
        memory: memory.unwrap_or(MEMORY),
        arguments: arguments.trim_matches(['\'', '"']).to_owned(),
        x2apic: !words.iter().any(|word| word.contains("-x2apic")),
        for_amd: words
            .iter()
            .any(|word| word.contains("vendor=AuthenticAMD")),
        timeout: timeout.map_or(TIMEOUT, Duration::from_secs),
        not_applicable,
    })
}

/// Bytes, by QEMU's option `-m`: MiB where there is no unit.
fn size(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let (digits, shift) = match lower.strip_suffix('g') {
        Some(digits) => (digits, 30),
        None => (lower.trim_end_matches('m'), 20),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Why a group cannot say anything about Vireo: it tests, or needs, what it does not have.
fn not_applicable(name: &str, keys: &HashMap<&str, &str>, words: &[&str]) -> Option<String> {
    const FEATURES: [(&str, &str); 9] = [
        ("svm", "nested virtualization (SVM)"),
        ("vmx", "nested virtualization (VMX)"),
        ("ept", "nested virtualization (VMX)"),
        ("hyperv", "Hyper-V's interface"),
        ("vmware", "VMware's interface"),
        ("intel_iommu", "VT-d"),
        ("intel-iommu", "VT-d"),
        ("pmu", "performance counters"),
        ("asyncpf", "KVM's asynchronous page faults"),
    ];
    let file = keys.get("file").copied().unwrap_or_default();
    let starts = |prefix: &str| {
        let named = |text: &str| text.starts_with(prefix);
        let groups = keys.get("groups").copied().unwrap_or_default();
        named(name) && !named("vmexit")
            || groups.split_whitespace().any(|group| group == prefix)
            || file.strip_suffix(".flat") == Some(prefix)
    };
    // Those of the group "vmexit" are about exits, whatever their names begin with.
    if !name.starts_with("vmexit")
        && let Some((_, what)) = FEATURES.iter().find(|(prefix, _)| starts(prefix))
    {
        return Some((*what).to_owned());
    }
    let groups = keys.get("groups").copied().unwrap_or_default();
    if groups.split_whitespace().any(|group| group == "nodefault") {
        return Some("not in the suite's default set (KVM's forced emulation)".to_owned());
    }
    if let Some(check) = keys.get("check") {
        return Some(format!("a setting of KVM ({check})"));
    }
    let device = words.iter().position(|word| *word == "-device");
    device.map(|at| {
        let name = words.get(at + 1).copied().unwrap_or_default();
        format!("QEMU's device {name}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# comment\n[plain]\nfile = a.flat\n\n[more]\nfile = b.flat\nsmp = 3\n\
        test_args = 'x y'\nqemu_params = -cpu max,+pcid -m 2g\ntimeout = 30\n# [off]\n#file = c\n\
        [vmexit_cpuid]\nfile = vmexit.flat\ntest_args = cpuid\ngroups = vmexit\n\
        [no_file]\nsmp = 2\n";

    #[test]
    fn groups_have_what_their_sections_say() {
        let groups = parse(TEXT);
        let names: Vec<&str> = groups.iter().map(|group| &*group.name).collect();
        assert_eq!(names, ["plain", "more", "vmexit_cpuid"]);
        let (plain, more) = (&groups[0], &groups[1]);
        assert_eq!(
            (plain.vcpus, plain.memory, &*plain.arguments(0)),
            (1, 128 << 20, "")
        );
        assert_eq!(
            (more.vcpus, more.memory, &*more.arguments(0)),
            (3, 2 << 30, "x y")
        );
        assert_eq!((plain.timeout.as_secs(), more.timeout.as_secs()), (90, 30));
        assert!(groups.iter().all(|group| group.not_applicable.is_none()));
    }

    #[test]
    fn what_needs_something_else_is_not_applicable() {
        for (section, reason) in [
            (
                "[svm_npt]\nfile = svm_npt.flat\n",
                "nested virtualization (SVM)",
            ),
            (
                "[ept]\nfile = vmx.flat\ngroups = vmx\n",
                "nested virtualization (VMX)",
            ),
            (
                "[hyperv_clock]\nfile = h.flat\ngroups = hyperv\n",
                "Hyper-V's interface",
            ),
            ("[pmu_lbr]\nfile = pmu_lbr.flat\n", "performance counters"),
            (
                "[access_fep]\nfile = access_test.flat\ngroups = nodefault\n",
                "not in the suite's default set (KVM's forced emulation)",
            ),
            (
                "[a]\nfile = a.flat\ncheck = /sys/x=Y\n",
                "a setting of KVM (/sys/x=Y)",
            ),
            (
                "[a]\nfile = a.flat\nqemu_params = -M q35 -device edu\n",
                "QEMU's device edu",
            ),
        ] {
            assert_eq!(parse(section)[0].not_applicable.as_deref(), Some(reason));
        }
    }

    #[test]
    fn the_time_is_an_argument() {
        let group = &parse("[k]\nfile = k.flat\ntest_args = \"10 `date +%s`\"\n")[0];
        assert!(group.wants_time());
        assert_eq!(group.arguments(1_767_225_600), "10 1767225600");
    }

    #[test]
    fn the_environment_says_what_the_machine_does_not() {
        let groups = parse(
            "[a]\nfile = a.flat\nsmp = 2\n\
             [b]\nfile = b.flat\nqemu_params = -cpu Opteron_G1,-x2apic,vendor=AuthenticAMD\n",
        );
        assert!(groups[0].x2apic && !groups[1].x2apic);
        let told = |index: usize, bare| groups[index].environment(bare);
        assert_eq!(told(0, false), None);
        assert_eq!(
            told(0, true).as_deref(),
            Some("NR_CPUS=2\nMEMSIZE=128\nTEST_DEVICE=0\n")
        );
        assert_eq!(told(1, false).as_deref(), Some("TEST_DEVICE=0\n"));
    }

    #[test]
    fn sizes_are_in_mebibytes() {
        assert_eq!(size("2048"), Some(2 << 30));
        assert_eq!(size("4g"), Some(4 << 30));
        assert_eq!(size("256M"), Some(256 << 20));
        assert_eq!(size("x"), None);
    }
}
