//! The numbers that Vireo promises, as `cargo xtask run --exec` prints them.
//! The boot is counted in instructions, so it is the same on any machine,
//! however busy.

use crate::harness::{Case, Outcome, Suite};
use anyhow::Result;

pub fn add(suite: &mut Suite) {
    suite.add("figures::boot_and_sizes", boot_and_sizes);
}

/// The most that the boot may take, beside the same without Vireo.
const BOOT: f64 = 1.10;
const KERNEL_KIB: f64 = 1024.0;
const HYPERVISOR_KIB: f64 = 16.0 * 1024.0;
const PROMPT_SECONDS: f64 = 240.0;

fn boot_and_sizes(case: &mut Case) -> Result<()> {
    let [bare, vireo] = ["bare", "bochs"].map(|platform| {
        let machine = case.machine().options(["--platform", platform]);
        machine.exec("grep -cw hypervisor /proc/cpuinfo").run()
    });
    let (bare, vireo) = (bare?, vireo?);
    case.check_equal(
        "no hypervisor on the bare emulator",
        bare.output.as_str(),
        "0\n",
    );
    case.check_equal("a hypervisor otherwise", vireo.output.as_str(), "1\n");
    let ratio = figure(&vireo, "boot: ") / figure(&bare, "boot: ");
    case.check(
        "the boot's instructions",
        ratio <= BOOT,
        format!("{ratio:.3} of the bare emulator's"),
    );
    case.check(
        "their ratio is shown",
        vireo
            .errors
            .contains(&format!("/init, {ratio:.2} of the bare emulator's")),
        &vireo.errors,
    );
    for (name, most) in [
        ("kernel image: ", KERNEL_KIB),
        ("hypervisor memory: ", HYPERVISOR_KIB),
        ("prompt: after ", PROMPT_SECONDS),
    ] {
        let found = figure(&vireo, name);
        case.check(
            name,
            found < most,
            format!("{found} instead of less than {most}"),
        );
    }
    Ok(())
}

/// The number behind `name` at the start of a line of xtask's; not a number
/// where there is none.
fn figure(seen: &Outcome, name: &str) -> f64 {
    seen.errors
        .lines()
        .find_map(|line| line.strip_prefix(name)?.split(' ').next()?.parse().ok())
        .unwrap_or(f64::NAN)
}
