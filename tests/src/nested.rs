//! The same disk image under QEMU with KVM on Linux in Bochs: what holds on
//! the emulator alone must hold where VT-x is KVM's, with fewer features.
//! Minutes each, so outside the default set: `cargo xtask test nested`.

use crate::harness::{Case, Ending, Suite};
use anyhow::Result;

/// Seconds for three kernels' boots and three levels of exits.
const LIMIT: u64 = 900;

pub fn add(suite: &mut Suite) {
    suite.add("nested::all_of_kvm", |case| boots(case, "host"));
    // Without PML and TSC scaling among others.
    suite.add("nested::haswell", |case| {
        boots(case, "Haswell-noTSX,vmx=on")
    });
    // Without what KVM users switch off, or older hosts lack.
    suite.add("nested::few_features", |case| {
        boots(
            case,
            "host,-vmx-vpid,-vmx-preemption-timer,-vmx-true-ctls,-vmx-vnmi,-vmx-activity-hlt",
        )
    });
    suite.add("nested::no_unrestricted_guest", no_unrestricted_guest);
}

fn boots(case: &mut Case, cpu: &str) -> Result<()> {
    let seen = case
        .machine()
        .options(["--platform", "nested", "--cpu", cpu])
        .exec("uname -s; grep -cw hypervisor /proc/cpuinfo; exit 42")
        .limit(LIMIT)
        .run()?;
    case.check_equal("the status", &seen.ending, &Ending::Status(42));
    case.check_equal("the output", seen.output.as_str(), "Linux\n1\n");
    case.check(
        "the guest is off at the end",
        seen.console.contains("vireo: vm linux: powered off"),
        seen.console.lines().last().unwrap_or_default(),
    );
    Ok(())
}

fn no_unrestricted_guest(case: &mut Case) -> Result<()> {
    let seen = case
        .machine()
        .options(["--platform", "nested", "--cpu", "Nehalem,vmx=on"])
        .exec("true")
        .limit(LIMIT)
        .run()?;
    case.check(
        "the sentence names what is missing",
        seen.ending.sentence().contains("unrestricted guest"),
        format!("{:?}", seen.ending),
    );
    Ok(())
}
