//! The small guests of `tests/guests`: one whose checks of its PC are results
//! here, and those that come to a bad end, which the console has to name.

use crate::harness::{Case, Ending, Outcome, Suite};
use anyhow::Result;
use xtask::exit_times::ExitTimes;
use xtask::{build, paths};

/// The oldest CPU that Bochs has and Vireo runs on: no INVPCID, no XSAVE.
const OLDEST: &str = "corei5_arrandale_m520";

pub fn add(suite: &mut Suite) {
    suite.add("guests::pc", pc);
    suite.add("guests::pc_on_the_oldest_cpu", pc_on_the_oldest_cpu);
    suite.add("guests::one_after_another", one_after_another);
    suite.add("guests::hang", |case| {
        stopped(
            case,
            "hang",
            "about to halt for good",
            "halted with interrupts off",
        )
    });
    suite.add("guests::triple", |case| {
        stopped(
            case,
            "triple",
            "about to fault three times",
            "triple fault at 0x@",
        )
    });
    suite.add("guests::unmapped", |case| {
        stopped(
            case,
            "unmapped",
            "about to run into nothing",
            "code or page tables at 0xd0000000, where it has no memory",
        )
    });
    suite.add("guests::code_in_the_local_apic", code_in_the_local_apic);
    suite.add("guests::delivery", |case| {
        stopped(
            case,
            "delivery",
            "about to be interrupted",
            "an interrupt or exception was to be delivered by way of 0xd000@, where it has no memory",
        )
    });
    suite.add("guests::fpu_mmio", |case| {
        stopped(
            case,
            "fpu_mmio",
            "about to add a vector from a device",
            "the instruction at 0x@, which accesses 0xfec00000, is not emulated: 0f 58 @ @ @ @ @ @ @ @ @ @ @ @ @",
        )
    });
    suite.add("guests::vmxon", |case| {
        stopped(
            case,
            "vmxon",
            "about to execute VMXON",
            "triple fault at 0x@, where the guest has no handler for #UD (VMXON)",
        )
    });
    suite.add("guests::smp", |case| smp(case, "cpus = [0, 1]", 2, 2));
    suite.add("guests::smp_on_one_cpu", |case| {
        smp(case, "slice_us = 1000", 3, 1)
    });
    suite.add("guests::reset", reset);
    suite.add("guests::crash_all_at_once", crash_all_at_once);
    suite.add("guests::more_cpus_than_there_are", more_cpus_than_there_are);
    suite.add("guests::test_device", test_device);
    suite.add("guests::suspend", suspend);
    suite.add("guests::emulation", emulation);
    suite.add("guests::tasks", tasks);
    suite.add("guests::spin", spin);
    suite.add("guests::storm", |case| on_one_cpu(case, "storm", 2));
    suite.add("guests::turns", |case| on_one_cpu(case, "turns", 4));
}

/// A guest in the configuration.
fn entry(name: &str, kernel: &str) -> String {
    format!("[[vm]]\nname = \"{name}\"\nmemory = \"64M\"\nkernel = \"{kernel}\"\n")
}

/// Boots the small guest `name` for at most `seconds`.
fn boot(case: &mut Case, name: &str, options: &[&str], seconds: u64) -> Result<Outcome> {
    boot_as(case, name, &entry(name, name), options, seconds)
}

/// The same as a configuration says.
fn boot_as(
    case: &mut Case,
    name: &str,
    config: &str,
    options: &[&str],
    seconds: u64,
) -> Result<Outcome> {
    let kernel = paths::read(&build::guest(name)?)?;
    let mut machine = case.machine().volume(config, &[(name, &kernel)])?;
    for option in options {
        machine = machine.options([option]);
    }
    machine.limit(seconds).run()
}

/// Every check of the guest is a result of its own.
fn pc(case: &mut Case) -> Result<()> {
    let seen = boot(case, "pc", &[], 240)?;
    results(case, "", &seen.console);
    case.check_equal("it powers off", seen.ending, Ending::Status(0));
    Ok(())
}

/// Several vCPUs, placed as `place` says, on a machine with so many CPUs.
fn smp(case: &mut Case, place: &str, vcpus: u32, cpus: u32) -> Result<()> {
    let config = format!("{}vcpus = {vcpus}\n{place}\n", entry("smp", "smp"));
    let seen = boot_as(case, "smp", &config, &["--smp", &cpus.to_string()], 300)?;
    results(case, "", &seen.console);
    case.check_equal("it powers off", seen.ending, Ending::Status(0));
    Ok(())
}

/// That CPU has no APICv: a guest that insists on it is refused, any other goes on.
fn pc_on_the_oldest_cpu(case: &mut Case) -> Result<()> {
    let config = format!(
        "{}apic = \"apicv\"\n{}",
        entry("choosy", "pc"),
        entry("modest", "pc")
    );
    let kernel = paths::read(&build::guest("pc")?)?;
    let seen = case
        .machine()
        .volume(&config, &[("pc", &kernel)])?
        .options(["--platform", "bochs", "--cpu", OLDEST])
        .limit(240)
        .run()?;
    results(case, "", &seen.console);
    case.check(
        "it has FlexPriority",
        said(
            &seen,
            "vireo: vm modest: started, 64 MiB, APIC FlexPriority, CPU 0",
        ),
        &seen.console,
    );
    case.check(
        "a page that a guest executes is small: the CPU has the mistake",
        seen.console
            .contains("; code in pages of 4 KiB (CVE-2018-12207)"),
        &seen.console,
    );
    let refusal = "`apic` in vireo.toml asks for what this CPU's VT-x lacks, \
        \"APIC-register virtualization\" (IA32_VMX_PROCBASED_CTLS2 bit 40); use apic = \"auto\"";
    case.check(
        "the sentence",
        seen.ending.sentence().contains(refusal),
        format!("{:?}", seen.ending),
    );
    Ok(())
}

/// Takes over the results that the guest shows on this console; `prefix` goes before their names.
fn results(case: &mut Case, prefix: &str, console: &str) {
    let (mut passed, mut failed) = (0, 0);
    for line in console.lines() {
        let Some(line) = line.trim_end().strip_prefix("check: ") else {
            continue;
        };
        if let Some(name) = line.strip_suffix(": ok") {
            passed += 1;
            case.record(&format!("{prefix}{name}"), Ok(()));
        } else if let Some((name, found)) = line.split_once(": failed: ") {
            failed += 1;
            case.record(&format!("{prefix}{name}"), Err(found.into()));
        }
    }
    let total = format!("checks: {passed} passed, {failed} failed");
    case.check(
        &format!("{prefix}the guest has counted as many"),
        passed > 0 && console.lines().any(|line| line.trim_end() == total),
        total,
    );
}

/// Nothing of a guest is left for the next one, and one that is stopped takes
/// nobody with it. The two that do not have what [`pc`] has by default: the other tiers
/// of APIC virtualization. The exits of the last one are timed.
fn one_after_another(case: &mut Case) -> Result<()> {
    let mut config = [
        ("first", "pc", "flexpriority\""),
        ("bad", "triple", "auto\"\nafter = \"first\""),
        ("last", "pc", "emulated\"\nafter = \"bad\""),
    ]
    .map(|(name, kernel, rest)| format!("{}apic = \"{rest}\n", entry(name, kernel)))
    .concat();
    config.push_str("statistics = \"times\"\n");
    config.push_str(
        "[[vm]]\nname = \"null\"\nmemory = \"2M\"\nfirmware = \"null\"\ntest_device = true\nafter = \"last\"\n",
    );
    let (pc, triple) = (build::guest("pc")?, build::guest("triple")?);
    let files = [
        ("pc", &*paths::read(&pc)?),
        ("triple", &*paths::read(&triple)?),
        ("null", &null_segment_of_real_mode()),
    ];
    let seen = case.machine().volume(&config, &files)?.limit(300).run()?;
    case.check(
        "a register that was null is loaded in real mode",
        said(&seen, "vireo: vm null: ended with code 33"),
        &seen.console,
    );
    for name in ["first", "last"] {
        let start = format!("vireo: vm {name}: started");
        let end = format!("vireo: vm {name}: powered off");
        let console = seen
            .console
            .split_once(&start)
            .and_then(|(_, rest)| rest.split_once(&end))
            .map_or("", |(console, _)| console);
        results(case, &format!("{name}: "), console);
    }
    exit_times(case, &seen.console);
    case.check(
        "the sentence",
        matches(
            seen.ending.sentence(),
            "the guest bad was stopped: triple fault at 0x@",
        ),
        format!("{:?}", seen.ending),
    );
    Ok(())
}

/// Firmware that loads FS and GS with null in protected mode, with something in real mode, and
/// exits: with FS there, with GS in protected mode again.
fn null_segment_of_real_mode() -> Vec<u8> {
    const CODE: &[u8] = &[
        0x0f, 0x20, 0xc0, // MOV EAX, CR0
        0x0c, 0x01, // OR AL, 1
        0x0f, 0x22, 0xc0, // MOV CR0, EAX
        0x31, 0xdb, // XOR BX, BX
        0x8e, 0xe3, // MOV FS, BX
        0x8e, 0xeb, // MOV GS, BX
        0x24, 0xfe, // AND AL, 0xfe
        0x0f, 0x22, 0xc0, // MOV CR0, EAX
        0xb3, 0x40, // MOV BL, 0x40
        0x8e, 0xe3, // MOV FS, BX
        0x0f, 0xa2, // CPUID
        0xbb, 0x40, 0x00, // MOV BX, 0x40
        0x8e, 0xeb, // MOV GS, BX
        0x0f, 0x20, 0xc0, // MOV EAX, CR0
        0x0c, 0x01, // OR AL, 1
        0x0f, 0x22, 0xc0, // MOV CR0, EAX
        0xb0, 0x21, // MOV AL, 0x21
        0xe6, 0xf4, // OUT 0xf4, AL
        0xeb, 0xfe, // JMP to itself
    ];
    const ENTRY: usize = 0xff0;
    let mut image = vec![0x90; 0x1000];
    image[..CODE.len()].copy_from_slice(CODE);
    // JMP to the start, where CS has its base 64 KiB below the end.
    image[ENTRY..ENTRY + 3].copy_from_slice(&[0xe9, 0x0d, 0xf0]);
    image
}

/// The table of exit times is there for the guest `last` only, and is right in itself.
fn exit_times(case: &mut Case, console: &str) {
    let lines: Vec<&str> = console.lines().map(str::trim_end).collect();
    let title = lines
        .iter()
        .position(|line| line.contains(" ticks in root mode, "))
        .unwrap_or_default();
    // A column "timed" would say that the histogram of a reason has not as many exits
    // as were counted.
    let heading = lines.get(title + 1).copied().unwrap_or_default();
    case.check(
        "all exits are in the histograms",
        heading.starts_with("vireo: reason") && !heading.contains("timed"),
        heading,
    );
    for vm in ["first", "bad"] {
        let times = ExitTimes::parse(console, vm);
        case.check_equal("who does not want it has no table", times, None);
    }
    let Some(times) = ExitTimes::parse(console, "last") else {
        case.check("who wants it has one", false, console);
        return;
    };
    let rows = || std::iter::once(&times.all).chain(&times.reasons);
    for row in rows() {
        case.check(
            "a row's figures",
            row.mean > 0 && row.mean <= row.maximum && !row.histogram.is_empty(),
            format!("{row:?}"),
        );
    }
    for line in lines.iter().skip(title).take(2 + rows().count()) {
        case.check("it fits 80 columns", line.len() <= 80, line);
    }
    let all = times.all.count;
    case.check_equal(
        "the reasons make up all exits",
        times.reasons.iter().map(|row| row.count).sum(),
        all,
    );
    let summary = format!("vireo: vm last: {all} exits: ");
    case.check(
        "and those of the short line",
        all > 0 && lines.iter().any(|line| line.starts_with(&summary)),
        summary,
    );
}

/// It fetches where each tier has the local APIC's registers.
fn code_in_the_local_apic(case: &mut Case) -> Result<()> {
    const TIERS: [&str; 3] = ["emulated", "flexpriority", "apicv"];
    let config = TIERS.map(|tier| {
        let rest = format!("apic = \"{tier}\"\ncmdline = \"at={}\"\n", 0xfee0_01e0_u32);
        entry(tier, "unmapped") + &rest
    });
    let kernel = paths::read(&build::guest("unmapped")?)?;
    let seen = case
        .machine()
        .volume(&config.concat(), &[("unmapped", &kernel)])?
        .limit(120)
        .run()?;
    for tier in TIERS {
        let line = format!(
            "vireo: vm {tier}: stopped: code or page tables at 0xfee001e0, where it has no memory"
        );
        case.check(&line, said(&seen, &line), &seen.console);
    }
    Ok(())
}

/// A guest that says `last` and then is stopped with `reason`, in which `@`
/// stands for hexadecimal digits. The hypervisor lives on and powers off.
fn stopped(case: &mut Case, name: &str, last: &str, reason: &str) -> Result<()> {
    let seen = boot(case, name, &[], 120)?;
    case.check("the guest's last words", said(&seen, last), &seen.console);
    let sentence = format!("the guest {name} was stopped: {reason}");
    case.check(
        "the sentence",
        matches(seen.ending.sentence(), &sentence),
        format!("{:?} instead of {sentence:?}", seen.ending),
    );
    let line = format!("vireo: vm {name}: stopped: {reason}");
    case.check(
        "the console's last line",
        seen.console
            .lines()
            .last()
            .is_some_and(|last| matches(last.trim_end(), &line)),
        seen.console.lines().last().unwrap_or_default(),
    );
    Ok(())
}

fn reset(case: &mut Case) -> Result<()> {
    let seen = boot(case, "reset", &[], 120)?;
    case.check(
        "the guest's last words",
        said(&seen, "about to reset"),
        &seen.console,
    );
    case.check_equal(
        "the sentence",
        seen.ending.sentence(),
        "the guest reset has reset its machine",
    );
    Ok(())
}

/// A guest whose end has a code, which is the exit status as QEMU would have it.
fn test_device(case: &mut Case) -> Result<()> {
    let kernel = paths::read(&build::guest("test_device")?)?;
    let config = format!("{}test_device = true\n", entry("test", "kernel"));
    let seen = case
        .machine()
        .volume(&config, &[("kernel", &kernel)])?
        .limit(120)
        .run()?;
    let failed = seen
        .console
        .lines()
        .find(|line| line.contains(": failed: "));
    case.check(
        "no check fails",
        failed.is_none(),
        failed.unwrap_or_default(),
    );
    let passed = seen
        .console
        .lines()
        .filter(|line| line.trim_end().ends_with(": ok"))
        .count();
    case.check_equal("all checks pass", passed, 15);
    let flood: String = (0..12_000u32)
        .map(|number| char::from(b'a' + (number % 26) as u8))
        .collect();
    case.check(
        "the debug console loses nothing",
        seen.console.contains(&format!("flood {flood}\n")),
        &seen.console,
    );
    case.check(
        "the hypervisor names the code",
        said(&seen, "vireo: vm test: ended with code 33"),
        &seen.console,
    );
    case.check_equal("the exit status", seen.ending, Ending::Status(0x43));
    Ok(())
}

/// Instructions that the hypervisor emulates: every check of the guest is a result of its own.
fn emulation(case: &mut Case) -> Result<()> {
    let kernel = paths::read(&build::guest("emulation")?)?;
    let config = format!("{}test_device = true\n", entry("emulation", "kernel"));
    let seen = case
        .machine()
        .volume(&config, &[("kernel", &kernel)])?
        .limit(120)
        .run()?;
    results(case, "", &seen.console);
    case.check_equal("it powers off", seen.ending, Ending::Status(0));
    Ok(())
}

/// Task switches: every check of the guest is a result of its own.
fn tasks(case: &mut Case) -> Result<()> {
    let seen = boot(case, "tasks", &[], 120)?;
    results(case, "", &seen.console);
    case.check_equal("it powers off", seen.ending, Ending::Status(0));
    Ok(())
}

/// A guest that sleeps until its clock wakes it, and ends where it has said that it goes on.
fn suspend(case: &mut Case) -> Result<()> {
    let seen = boot(case, "suspend", &[], 120)?;
    case.check("it sleeps", said(&seen, "about to sleep"), &seen.console);
    case.check_equal("it wakes", seen.ending, Ending::Status(0x2b));
    Ok(())
}

/// A loop with interrupts off: nothing but time tells.
fn spin(case: &mut Case) -> Result<()> {
    let seen = boot(case, "spin", &[], 40)?;
    case.check(
        "the guest's last words",
        said(&seen, "about to spin for good"),
        &seen.console,
    );
    case.check_equal("the machine hangs", seen.ending, Ending::Hang);
    Ok(())
}

/// vCPUs that wake up again and again leave their CPU to another, and to the hypervisor's own
/// interrupts, without which nothing is said.
fn on_one_cpu(case: &mut Case, name: &str, vcpus: u32) -> Result<()> {
    let config = format!("{}vcpus = {vcpus}\n", entry(name, name));
    let seen = boot_as(case, name, &config, &["--smp", "1"], 90)?;
    results(case, "", &seen.console);
    case.check_equal("it powers off", seen.ending, Ending::Status(0));
    Ok(())
}

/// Whether the console has this line.
fn said(seen: &Outcome, line: &str) -> bool {
    seen.console.lines().any(|said| said.trim_end() == line)
}

/// Whether `text` is `pattern`, in which each `@` stands for hexadecimal digits.
fn matches(text: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('@');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    for part in parts {
        let digits = rest.trim_start_matches(|digit: char| digit.is_ascii_hexdigit());
        match digits.strip_prefix(part) {
            Some(behind) if digits.len() < rest.len() => rest = behind,
            _ => return false,
        }
    }
    rest.is_empty()
}

/// Guests that crash on all CPUs end, each with its reason, and the machine goes off.
fn crash_all_at_once(case: &mut Case) -> Result<()> {
    const WAYS: [(&str, &str); 3] = [
        ("triple", "triple fault at 0x"),
        (
            "unmapped",
            "code or page tables at 0xd0000000, where it has no memory",
        ),
        ("hang", "halted with interrupts off"),
    ];
    let mut config = String::new();
    let mut files = Vec::new();
    for ((name, _), cpu) in WAYS.iter().zip(0..) {
        config += &entry(name, name);
        config += &format!("cpus = [{cpu}]\n");
        files.push((*name, paths::read(&build::guest(name)?)?));
    }
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, file)| (*name, &**file)).collect();
    let seen = case
        .machine()
        .volume(&config, &files)?
        .options(["--smp", "3"])
        .limit(180)
        .run()?;
    for (name, reason) in WAYS {
        let verdict = format!("vireo: vm {name}: stopped: {reason}");
        case.check(
            &format!("{name} is told"),
            said_part(&seen, &verdict),
            &seen.console,
        );
    }
    case.check_equal(
        "nobody is left, and nothing else is wrong",
        seen.console.matches(": stopped: ").count(),
        3,
    );
    case.check(
        "it is no crash",
        matches!(seen.ending, Ending::Refused(_)),
        format!("{:?}", seen.ending),
    );
    Ok(())
}

/// A guest for a CPU that is not there does not start, and takes no other with it.
fn more_cpus_than_there_are(case: &mut Case) -> Result<()> {
    let config = format!(
        "{}cpus = [7]\n{}",
        entry("greedy", "reset"),
        entry("modest", "reset")
    );
    let seen = boot_as(case, "reset", &config, &["--smp", "2"], 120)?;
    for line in [
        "vireo: error: vm greedy: `cpus` in vireo.toml names CPU 7, and the machine has these: 0 1",
        "vireo: vm modest: reset",
    ] {
        case.check(line, said_part(&seen, line), &seen.console);
    }
    Ok(())
}

/// Whether a line of the console has this in it.
fn said_part(seen: &Outcome, part: &str) -> bool {
    seen.console.lines().any(|line| line.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_at_sign_stands_for_digits() {
        assert!(matches("fault at 0x20af, where", "fault at 0x@, where"));
        assert!(matches("fault at 0x20af", "fault at 0x@"));
        assert!(!matches("fault at 0x, where", "fault at 0x@, where"));
        assert!(!matches("fault at 0x20, whence", "fault at 0x@, where"));
        assert!(!matches("fault at 0x20, where", "fault at 0x@"));
        assert!(matches("plain", "plain"));
    }
}
