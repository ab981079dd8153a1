//! The default guest, Debian's kernel as packaged, used as its users do, in each tier
//! of APIC virtualization.

use crate::harness::{Case, Ending, Input, Outcome, Suite};
use anyhow::Result;
use nix::sys::signal::Signal;
use std::time::Duration;
use xtask::progress::Progress;
use xtask::provision::Provisioner;
use xtask::{guest, paths};

/// How long `cargo xtask run` may take to the prompt on the emulator.
const TO_THE_PROMPT: Duration = Duration::from_secs(240);

pub fn add(suite: &mut Suite) {
    suite.add("linux::command", command);
    suite.add("linux::piped_input", piped_input);
    suite.add("linux::terminal", terminal);
    suite.add("linux::power_off_from_the_shell", power_off_from_the_shell);
    suite.add("linux::interrupted", interrupted);
    suite.add("linux::reset", reset);
    suite.add("linux::hotplug", hotplug);
    suite.add("linux::four_at_once", four_at_once);
}

/// What a kernel says when it finds something wrong with its PC.
const COMPLAINTS: [&str; 10] = [
    "BUG:",
    "WARNING:",
    "Call Trace",
    "unchecked MSR",
    "Firmware Bug",
    "FIRMWARE BUG",
    "ACPI Error",
    "ACPI BIOS Error",
    "unstable",
    "spurious",
];

/// Prints everything that is looked at, each part after its name.
const SCRIPT: &str = r#"
part() { echo "== $1"; }
part kernel; uname -rs
part cpu; cat /proc/cpuinfo
part messages; dmesg
part clock; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
part memory; grep MemTotal /proc/meminfo
part seconds; read a _ </proc/uptime; sleep 1; read b _ </proc/uptime; echo "$a $b"
part timer; grep 'timer interrupts' /proc/interrupts
part serial; grep ttyS0 /proc/interrupts
part errors; echo to the error output >&2
part bytes; seq 1 20000 | md5sum
exit 42
"#;

fn command(case: &mut Case) -> Result<()> {
    let seen = case.machine().exec(SCRIPT).run()?;
    case.check_equal(
        "the command's status is the exit status",
        &seen.ending,
        &Ending::Status(42),
    );
    case.check(
        "output begins with the command's",
        seen.output.starts_with("== kernel\nLinux "),
        seen.output.lines().next().unwrap_or_default(),
    );
    case.check(
        "output ends with the command's",
        seen.output.ends_with("  -\n"),
        seen.output.lines().last().unwrap_or_default(),
    );
    case.check_equal(
        "output of both streams",
        seen.section("errors"),
        "to the error output",
    );
    case.check_equal(
        "a pipeline's result",
        seen.section("bytes"),
        "e071f707df7bbeee2a6a1eb48011ddd0  -\n",
    );
    cpu(case, &seen);
    let messages = seen.section("messages");
    for complaint in COMPLAINTS {
        let found = messages.lines().find(|line| line.contains(complaint));
        case.check(
            &format!("the kernel does not say {complaint}"),
            found.is_none() && !messages.is_empty(),
            found.unwrap_or("no messages"),
        );
    }
    time(case, &seen);
    case.check(
        "the guest is off at the end",
        seen.console.contains("vireo: vm linux: powered off"),
        seen.console.lines().last().unwrap_or_default(),
    );
    case.check(
        "its exits are counted",
        seen.console.contains(" exits: I/O "),
        "no such line",
    );
    case.check(
        "standard error has no complaint",
        !seen.errors.contains("error") && !seen.errors.contains("warning"),
        &seen.errors,
    );
    case.check(
        "it is quick",
        seen.time < TO_THE_PROMPT,
        format!("{:?}", seen.time),
    );
    Ok(())
}

/// The guest's CPU: a stock kernel needs no option to cure what is emulated wrongly.
fn cpu(case: &mut Case, seen: &Outcome) {
    let flags: Vec<&str> = seen
        .section("cpu")
        .lines()
        .find_map(|line| line.strip_prefix("flags\t\t: "))
        .unwrap_or_default()
        .split(' ')
        .collect();
    for flag in ["hypervisor", "lm", "nx", "apic", "tsc", "fxsr", "sse2"] {
        case.check(
            &format!("the CPU has {flag}"),
            flags.contains(&flag),
            flags.join(" "),
        );
    }
    for flag in ["vmx", "fsrm", "svm", "smx", "monitor"] {
        case.check(
            &format!("the CPU has no {flag}"),
            !flags.contains(&flag),
            flags.join(" "),
        );
    }
}

fn time(case: &mut Case, seen: &Outcome) {
    let clock = seen.section("clock").trim();
    case.check(
        "the clock is fast",
        ["tsc", "kvm-clock"].contains(&clock),
        clock,
    );
    let seconds: Vec<f64> = seen
        .section("seconds")
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let slept = match seconds[..] {
        [before, after] => after - before,
        _ => f64::NAN,
    };
    case.check(
        "a second lasts a second",
        (0.99..1.5).contains(&slept),
        format!("{slept} s"),
    );
    let count = |name: &str| -> u64 {
        let words = seen.section(name).split_whitespace();
        words
            .skip(1)
            .find_map(|word| word.parse().ok())
            .unwrap_or_default()
    };
    case.check("the timer interrupts", count("timer") > 50, count("timer"));
    case.check("the UART interrupts", count("serial") > 10, count("serial"));
}

fn piped_input(case: &mut Case) -> Result<()> {
    // More than the receive FIFO and the line buffer of a terminal hold.
    let lines: String = (0..500).map(|n| format!("line {n} $HOME 'x\n")).collect();
    let script = format!("uname\ncat <<'END'\n{lines}END\necho $((6 * 7))\n(exit 3)\n");
    let seen = case
        .machine()
        .options(["--apic", "emulated", "--statistics"])
        .input(Input::Bytes(script.into_bytes()))
        .run()?;
    case.check_equal(
        "everything arrives and comes back",
        seen.output,
        format!("Linux\n{lines}42\n"),
    );
    case.check_equal(
        "the status is the last command's",
        seen.ending,
        Ending::Status(3),
    );
    let table = seen.errors.split_once(" ticks in root mode, ");
    case.check(
        "standard error has what its exits took",
        table.is_some_and(|(before, table)| {
            before.ends_with(|last: char| last.is_ascii_digit()) && table.contains("\nCPUID ")
        }),
        &seen.errors,
    );
    Ok(())
}

fn terminal(case: &mut Case) -> Result<()> {
    let typed = vec![
        ("powers it off", "echo $((6 * 7))x; tty; stty size\r"),
        ("42x", "sleep 100\r"),
        ("sleep 100", "\x03"),
        ("# ", "\x1dq"),
    ];
    let seen = case.machine().input(Input::Typed(typed)).run()?;
    case.check_equal("leaving is no failure", seen.ending, Ending::Status(0));
    case.check(
        "the shell has job control",
        seen.output.contains("/dev/ttyS0"),
        &seen.output,
    );
    case.check(
        "the key to leave is shown",
        seen.output.contains("Ctrl-] then q"),
        &seen.output,
    );
    no_leftover(case);
    Ok(())
}

fn power_off_from_the_shell(case: &mut Case) -> Result<()> {
    let typed = vec![("powers it off", "exit\r")];
    let seen = case
        .machine()
        .options(["--apic", "flexpriority"])
        .input(Input::Typed(typed))
        .run()?;
    case.check_equal("the end is no failure", seen.ending, Ending::Status(0));
    case.check(
        "the hypervisor says so",
        seen.output.contains("vireo: vm linux: powered off"),
        &seen.output,
    );
    Ok(())
}

fn interrupted(case: &mut Case) -> Result<()> {
    let seen = case
        .machine()
        .exec("sleep 1000")
        .signal_at("vm linux: started", Signal::SIGINT)
        .run()?;
    case.check_equal("Ctrl-C's status", seen.ending, Ending::Status(130));
    no_leftover(case);
    Ok(())
}

fn reset(case: &mut Case) -> Result<()> {
    let seen = case.machine().exec("echo before; reboot -f").run()?;
    case.check(
        "output until then",
        seen.output.starts_with("before\n"),
        &seen.output,
    );
    case.check_equal(
        "the sentence",
        seen.ending.sentence(),
        "the guest linux has reset its machine",
    );
    Ok(())
}

/// Takes its second CPU away and back a hundred times, and trusts its clock then.
fn hotplug(case: &mut Case) -> Result<()> {
    let seen = case
        .machine()
        .options(["--vcpus", "2", "--smp", "2"])
        .exec(
            "cd /sys/devices/system/cpu/cpu1; for i in $(seq 100); do echo 0 >online && echo 1 >online || exit 2; done; \
            nproc; cat /sys/devices/system/clocksource/clocksource0/current_clocksource; \
            dmesg | grep -c 'BUG:\\|WARNING:\\|unstable'; exit 0",
        )
        .limit(400)
        .run()?;
    case.check_equal("CPUs, clock, complaints", &*seen.output, "2\ntsc\n0\n");
    case.check_equal("the status", &seen.ending, &Ending::Status(0));
    Ok(())
}

/// Two of 64 bits and two of 32, each with a CPU of its own, to a first process that powers off.
fn four_at_once(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let i386 = provisioner.i386();
    let kernels = [
        ("amd64", provisioner.default_guest()?.kernel),
        ("i386", i386.kernel("linux-image-686")?),
    ];
    let (programs, applets) = provisioner.busybox()?;
    let (programs_i386, applets_i386) = provisioner.busybox_i386()?;
    let initrds = [
        ("amd64.initrd", guest::initramfs(&programs, &applets)),
        (
            "i386.initrd",
            guest::initramfs(&programs_i386, &applets_i386),
        ),
    ];
    let mut files: Vec<(&str, Vec<u8>)> = initrds.to_vec();
    for (name, kernel) in &kernels {
        files.push((name, paths::read(kernel)?.to_vec()));
    }
    let config: String = (0..4)
        .map(|cpu| {
            let kind = if cpu < 2 { "amd64" } else { "i386" };
            format!(
                "[[vm]]\nname = \"linux{cpu}\"\nmemory = \"192M\"\ncpus = [{cpu}]\nkernel = \"{kind}\"\n\
                initrd = \"{kind}.initrd\"\ncmdline = \"{} rdinit=/bin/busybox -- poweroff -f\"\n",
                guest::CMDLINE
            )
        })
        .collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, file)| (*name, &**file)).collect();
    let seen = case
        .machine()
        .volume(&config, &files)?
        .options(["--smp", "4", "--machine-memory", "1200M"])
        .limit(600)
        .run()?;
    for cpu in 0..4 {
        case.check(
            &format!("guest {cpu} powers off"),
            seen.output
                .contains(&format!("vireo: vm linux{cpu}: powered off")),
            &seen.output,
        );
    }
    case.check_equal("and so does the machine", seen.ending, Ending::Status(0));
    Ok(())
}

fn no_leftover(case: &mut Case) {
    let leftover = Outcome::leftover(case.folder());
    case.check(
        "no process is left behind",
        leftover.is_none(),
        leftover.unwrap_or_default(),
    );
}
