//! Machines on which no guest can run, guests that do not fit, and images that
//! are none: as `refusals`, each ends with one clear sentence.

use crate::harness::{Case, Machine, Suite};
use crate::images;
use anyhow::Result;
use xtask::image::LOADER;
use xtask::machine::nested_vmx;
use xtask::{build, paths};

/// A guest of 64 MiB with a kernel only.
const GUEST: &str = "[[vm]]\nname = \"a\"\nmemory = \"64M\"\nkernel = \"kernel\"\n";
/// Where the firmware that locks VT-x off finds the loader.
const CHAINED_LOADER: &str = "EFI/VIREO/LOADER.EFI";

pub fn add(suite: &mut Suite) {
    suite.add("unusable::no_vt_x", no_vt_x);
    suite.add("unusable::vt_x_locked_off", vt_x_locked_off);
    suite.add("unusable::no_ept", no_ept);
    suite.add("unusable::no_unrestricted_guest", no_unrestricted_guest);
    suite.add("unusable::too_little_memory", too_little_memory);
    suite.add("unusable::no_such_cpu", no_such_cpu);
    suite.add("unusable::no_kernel", no_kernel);
    suite.add("unusable::kernel_truncated", kernel_truncated);
    suite.add(
        "unusable::kernel_is_something_else",
        kernel_is_something_else,
    );
    suite.add(
        "unusable::initrd_larger_than_memory",
        initrd_larger_than_memory,
    );
}

/// A machine with the small guest configuration and something that the loader
/// takes for a kernel.
fn machine(case: &mut Case) -> Result<Machine> {
    case.machine()
        .volume(GUEST, &[("kernel", &images::empty_elf())])
}

fn no_vt_x(case: &mut Case) -> Result<()> {
    let mut machine = machine(case)?.options(["--platform", "qemu"]);
    if nested_vmx() {
        machine = machine.options(["--cpu", "host,-vmx"]);
    }
    case.refusal(machine, &["no VT-x", "CPUID.1:ECX bit 5", "use "])
}

fn vt_x_locked_off(case: &mut Case) -> Result<()> {
    let volume = vec![
        (LOADER.into(), paths::read(&build::locking_firmware()?)?),
        (CHAINED_LOADER.into(), paths::read(&build::all()?.loader)?),
        ("vireo/vireo.toml".into(), GUEST.into()),
        ("vireo/kernel".into(), images::empty_elf()),
    ];
    let machine = case.machine().raw_volume(volume)?;
    case.refusal(
        machine.options(["--platform", "bochs"]),
        &["locked VT-x off", "IA32_FEATURE_CONTROL", "enable"],
    )
}

/// Has VT-x of 2007.
fn no_ept(case: &mut Case) -> Result<()> {
    let machine = machine(case)?.options(["--platform", "bochs", "--cpu", "core2_penryn_t9600"]);
    let words = ["enable EPT", "IA32_VMX_PROCBASED_CTLS2 bit 33", "use a CPU"];
    case.refusal(machine, &words)
}

/// Has VT-x of 2009.
fn no_unrestricted_guest(case: &mut Case) -> Result<()> {
    let machine = machine(case)?.options(["--platform", "bochs", "--cpu", "corei5_lynnfield_750"]);
    let words = [
        "unrestricted guest",
        "IA32_VMX_PROCBASED_CTLS2 bit 39",
        "use a CPU",
    ];
    case.refusal(machine, &words)
}

fn too_little_memory(case: &mut Case) -> Result<()> {
    let config = GUEST.replace("64M", "256M");
    let machine = case
        .machine()
        .volume(&config, &[("kernel", &images::empty_elf())])?;
    case.refusal(
        machine.options(["--machine-memory", "192M"]),
        &[
            "the vm a needs 256 MiB",
            "this machine has 1",
            "lower `memory`",
        ],
    )
}

/// The other CPU is there, and is named.
fn no_such_cpu(case: &mut Case) -> Result<()> {
    let config = format!("{GUEST}cpus = [3]\n");
    let machine = case
        .machine()
        .volume(&config, &[("kernel", &images::empty_elf())])?;
    case.refusal(
        machine.options(["--smp", "2"]),
        &["vm a: `cpus`", "CPU 3", "has these: 0 1"],
    )
}

fn no_kernel(case: &mut Case) -> Result<()> {
    let machine = case.machine().volume(GUEST, &[])?;
    case.refusal(machine, &["kernel: ", r"\vireo", "put the file there"])
}

fn kernel_truncated(case: &mut Case) -> Result<()> {
    let kernel = images::bzimage(100_000);
    let cut = &kernel[..50_000];
    let machine = case.machine().volume(GUEST, &[("kernel", cut)])?;
    let words = [
        "kernel: the kernel image is truncated",
        &kernel.len().to_string(),
        "50000",
        "copy it again",
    ];
    case.refusal(machine, &words)
}

fn kernel_is_something_else(case: &mut Case) -> Result<()> {
    let initrd = [b"\x1f\x8b\x08".as_slice(), &[0; 100]].concat();
    let machine = case.machine().volume(GUEST, &[("kernel", &initrd)])?;
    case.refusal(
        machine,
        &["kernel: the kernel image is neither", "gzip", "vmlinuz"],
    )
}

fn initrd_larger_than_memory(case: &mut Case) -> Result<()> {
    let config = format!("{GUEST}initrd = \"initrd\"\n").replace("64M", "2M");
    let files: [(&str, &[u8]); 2] = [
        ("kernel", &images::empty_elf()),
        ("initrd", &vec![0; 3 << 20]),
    ];
    let machine = case.machine().volume(&config, &files)?;
    let words = ["initrd: has 3 MiB", "the vm a has 2 MiB", "raise `memory`"];
    case.refusal(machine, &words)
}
