//! How the hypervisor itself dies: whatever goes wrong, it says what and where,
//! in functions that xtask knows, and then the machine is off.

use crate::harness::{Case, Outcome, Suite};
use crate::images;
use anyhow::Result;
use xtask::image::LOADER;
use xtask::{build, paths, symbols};

pub fn add(suite: &mut Suite) {
    suite.add("deaths::panic", panic);
    suite.add("deaths::panic_in_a_panic", panic_in_a_panic);
    suite.add("deaths::page_fault", page_fault);
    suite.add("deaths::stack_overflow", stack_overflow);
    suite.add("deaths::machine_check", machine_check);
    suite.add("deaths::nmi", nmi);
}

/// What starts fastest; VT-x is not reached.
const QUICK: [&str; 2] = ["--platform", "qemu"];
/// Has no ACPI tables: the machine is turned off by the firmware's service.
const WITHOUT_ACPI: [&str; 2] = ["--platform", "bochs"];

/// Boots the kernel that dies on demand, lets it run `tests`
/// (`src/host/selftest.rs`), and looks for `sentence` in what it dies with and
/// for `functions` in its backtrace.
fn dies(
    case: &mut Case,
    platform: [&str; 2],
    tests: &[&str],
    sentence: &str,
    functions: &[&str],
) -> Result<Outcome> {
    let built = build::selftest()?;
    let words: Vec<String> = tests
        .iter()
        .map(|test| format!("vireo.selftest={test}"))
        .collect();
    let config = format!(
        "[[vm]]\nname = \"a\"\nmemory = \"64M\"\nkernel = \"kernel\"\ncmdline = \"{}\"\n",
        words.join(" ")
    );
    let volume = vec![
        (LOADER.into(), paths::read(&built.loader)?),
        ("vireo/vireo.toml".into(), config.into()),
        ("vireo/kernel".into(), images::empty_elf()),
    ];
    let machine = case.machine().raw_volume(volume)?.options(platform);
    let seen = machine.limit(120).run()?;
    case.check(
        &format!("it dies with: {sentence}"),
        seen.ending.sentence().contains(sentence),
        format!("{:?}", seen.ending),
    );
    let lines: Vec<String> = seen.console.lines().map(str::to_owned).collect();
    let backtrace = symbols::backtrace(&built.kernel, &lines)?.join("\n");
    for function in functions {
        case.check(
            &format!("the backtrace has {function}"),
            backtrace.contains(function),
            &backtrace,
        );
    }
    Ok(seen)
}

fn panic(case: &mut Case) -> Result<()> {
    let functions = ["selftest.rs", "main", "_start"];
    let tests = ["page-tables", "panic"];
    let seen = dies(
        case,
        WITHOUT_ACPI,
        &tests,
        "panicked: self-test at",
        &functions,
    )?;
    let tables = seen
        .console
        .lines()
        .find(|line| line.contains("pages mapped"));
    case.check(
        "no page is writable and executable, and only memory is in the direct map",
        tables.is_some_and(|line| line.contains(", 0 wrongly; the image is not in")),
        tables.unwrap_or("it was not looked at"),
    );
    Ok(())
}

fn panic_in_a_panic(case: &mut Case) -> Result<()> {
    dies(case, QUICK, &["panic-in-panic"], "within the report", &[]).map(drop)
}

fn page_fault(case: &mut Case) -> Result<()> {
    let functions = ["page_fault", "main"];
    let seen = dies(
        case,
        QUICK,
        &["page-fault"],
        "page fault (vector 14",
        &functions,
    )?;
    case.check(
        "the address and the registers are told",
        seen.console.contains("cr2 ffffc00000000000") && seen.console.contains("  r12 "),
        &seen.console,
    );
    Ok(())
}

fn stack_overflow(case: &mut Case) -> Result<()> {
    dies(
        case,
        WITHOUT_ACPI,
        &["double-fault"],
        "double fault (vector 8",
        &["overflow"],
    )
    .map(drop)
}

fn machine_check(case: &mut Case) -> Result<()> {
    let functions = ["machine_check", "main"];
    dies(
        case,
        QUICK,
        &["machine-check"],
        "machine check (vector 18",
        &functions,
    )
    .map(drop)
}

/// From the NMI's stack back to the code that it interrupted.
fn nmi(case: &mut Case) -> Result<()> {
    let functions = ["vireo_interrupt_common", "selftest.rs", "main"];
    dies(
        case,
        QUICK,
        &["nmi"],
        "panicked: self-test: NMI",
        &functions,
    )
    .map(drop)
}
