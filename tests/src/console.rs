//! The operator's console, used as at a terminal: the escape, the prompt and its commands,
//! and two guests on two CPUs that go on meanwhile.

use crate::harness::{Case, Ending, Input, Suite};
use anyhow::Result;
use std::fs;
use xtask::progress::Progress;
use xtask::provision::Provisioner;
use xtask::{build, paths};

pub fn add(suite: &mut Suite) {
    suite.add("console::operator", operator);
    suite.add("console::life_cycle", life_cycle);
    suite.add("console::screen", screen);
    suite.add("console::thousand_rounds", thousand_rounds);
    suite.add("console::dumps", dumps);
    suite.add("console::input_flood", input_flood);
    suite.add("console::second_port", second_port);
    suite.add("console::no_second_port", no_second_port);
    suite.add(
        "console::command_in_one_of_several",
        command_in_one_of_several,
    );
}

const CONFIG: &str = r#"
[[vm]]
name = "first"
memory = "64M"
kernel = "echo"

[[vm]]
name = "second"
memory = "64M"
kernel = "echo"
cpus = [1]
"#;

/// What is waited for, and what is typed then.
const TYPED: [(&str, &str); 22] = [
    ("echo: ready", "\x141"),
    // Ctrl-T twice is one for the guest.
    ("console 1: first", "one\x14\x14two\r"),
    (r#"echo: "one\x14two""#, "half\x14p"),
    ("vireo> ", "vms\r"),
    ("running", "nonsense 1\r"),
    ("there is no command nonsense", "stat nobody\r"),
    ("there is no guest nobody", "stat first\r"),
    // Edited into "stat --json".
    (
        "vireo> ",
        "sttx --jso\x1b[D\x1b[H\x1b[C\x1b[C\x1b[3~a\x1b[C\x7ft\x1b[Fn\r",
    ),
    // Its end is cut off, and what is typed then too.
    ("]}]}", "\x1b[A\x17\x7f\x15mem x\x15 mem\x01\x0bcpus\r"),
    ("runs second", "log\r"),
    ("vm first: started", "trace first\r"),
    ("\n -31  ", "\x147"),
    ("there is no guest 7", "help\r"),
    ("Ctrl-T n", "\x141"),
    // The scroll-back; and what was typed before is still there.
    (r#"echo: "one"#, "way\r"),
    (r#"echo: "halfway""#, "\x142"),
    ("console 2: second", "flood\r"),
    // It goes on, and is in nobody's way.
    ("flood 300", "\x141still\r"),
    (r#"echo: "still""#, "\x14n"),
    ("flood ", "x"),
    ("flood: over", "quit\r"),
    // The console goes to the guest that is left.
    ("console 1: first", "quit\r"),
];

fn operator(case: &mut Case) -> Result<()> {
    let kernel = paths::read(&build::guest("echo")?)?;
    let seen = case
        .machine()
        .volume(CONFIG, &[("echo", &kernel)])?
        .options(["--smp", "2"])
        .input(Input::Typed(TYPED.to_vec()))
        .limit(180)
        .run()?;
    case.check_equal(
        "all that was waited for has come",
        &seen.ending,
        &Ending::Status(0),
    );
    for (what, text) in [
        (
            "a switch to the prompt is told",
            "vireo: console 0: the hypervisor's prompt",
        ),
        ("the guests are listed", "\r\n 1  first     64 MiB      1  "),
        ("exits are a table", "\r\nreason "),
        ("with the guest's port I/O", "\r\nI/O "),
        (
            "exits are JSON too",
            "\"vms\":[{\"name\":\"first\",\"exits\":",
        ),
        (
            "the CPUs are listed",
            "\r\n  0        0  runs first\r\n  1        1  runs second\r\n",
        ),
        ("the end of one", "vireo: vm second: powered off"),
        ("and of the other", "vireo: vm first: powered off"),
    ] {
        case.check(what, seen.output.contains(text), &seen.output);
    }
    Ok(())
}

/// Beside those of [`CONFIG`].
const AGAIN: &str = r#"
[[vm]]
name = "again"
memory = "64M"
kernel = "reset"
cpus = [2]
on_reboot = "restart"
"#;

/// What is waited for, and what is typed then.
const STEERED: [(&str, &str); 24] = [
    ("echo: ready", "\x14p"),
    // By its policy, each second.
    ("vm again: reset, and is started again", ""),
    ("vm again: started", "\r"),
    ("vireo> ", "vm second pause\r"),
    ("vireo> ", "vms\r"),
    ("pausing", "vm second pause\r"),
    ("second: it pauses already", "vm second resume\r"),
    ("vireo> ", "vms\r"),
    ("running", "vm second start\r"),
    ("second: it has not ended", "vm second stop\r"),
    ("vm second: stopped by the operator", "vm second pause\r"),
    ("second: it does not run", "vm second start\r"),
    ("vm second: started", "vm second reset\r"),
    ("vm second: reset, and is started again", ""),
    ("vm second: started", "vm second stop\r"),
    ("vm second: stopped by the operator", "vm again stop\r"),
    ("vm again: stopped by the operator", "vm second create\r"),
    ("vireo> ", "vms\r"),
    ("created", "vm second create\r"),
    ("second: it is created already", "vm second pause\r"),
    ("second: it does not run", "vm second start\r"),
    ("vm second: started", "vm second destroy\r"),
    ("vm second: stopped by the operator", "vm second stop\r"),
    ("second: it is not created", "vm first stop\r"),
];

/// Guests are paused, stopped, started and reset, and one that resets comes again.
fn life_cycle(case: &mut Case) -> Result<()> {
    let echo = paths::read(&build::guest("echo")?)?;
    let reset = paths::read(&build::guest("reset")?)?;
    let seen = case
        .machine()
        .volume(
            &[CONFIG, AGAIN].concat(),
            &[("echo", &echo), ("reset", &reset)],
        )?
        .options(["--smp", "3"])
        .input(Input::Typed(STEERED.to_vec()))
        .limit(240)
        .run()?;
    case.check(
        "the last one ends, and with it the machine",
        seen.output.contains("vm first: stopped by the operator"),
        format!("{:?}\n{}", seen.ending, seen.output),
    );
    Ok(())
}

/// A Linux beside a guest that resets, and comes again, each second.
const BESIDE: &str = r#"
[[vm]]
name = "again"
memory = "32M"
kernel = "reset"
on_reboot = "restart"

[[vm]]
name = "linux"
memory = "128M"
kernel = "linux"
cmdline = "quiet console=ttyS0 nokaslr mitigations=off no_timer_check"
cpus = [1]
"#;

/// `--exec --vm`: the output is that guest's alone, and its end is the run's.
fn command_in_one_of_several(case: &mut Case) -> Result<()> {
    let progress = Progress::new();
    let linux = Provisioner::new(&progress).default_guest()?.kernel;
    let folder = case.folder().join("config");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("vireo.toml"), BESIDE)?;
    fs::copy(linux, folder.join("linux"))?;
    fs::copy(build::guest("reset")?, folder.join("reset"))?;
    let config = folder.join("vireo.toml").display().to_string();
    let machine = |case: &mut Case, vm: &str| {
        let command = "seq 1 20000; exit 7";
        let machine = case.machine().exec(command);
        machine.options(["--config", &config, "--vm", vm])
    };
    let absent = machine(case, "absent").run()?;
    let sentence = absent.ending.sentence();
    case.check(
        "a guest that is not there is refused",
        sentence.contains("has no vm \"absent\": it has again, linux"),
        sentence,
    );
    let seen = machine(case, "linux").run()?;
    case.check_equal("the status", &seen.ending, &Ending::Status(7));
    let lines: Vec<String> = (1..=20_000).map(|n| format!("{n}\n")).collect();
    case.check(
        "the output, and no more",
        seen.output == lines.concat(),
        &seen.output,
    );
    case.check(
        "the other has ended meanwhile",
        seen.console
            .matches("vm again: reset, and is started again")
            .count()
            > 1,
        &seen.console,
    );
    Ok(())
}

/// What spins with interrupts off, and what mostly halts.
const DUMPED: &str = r#"
[[vm]]
name = "halts"
memory = "8M"
kernel = "latency"

[[vm]]
name = "spins"
memory = "8M"
kernel = "spin"
cpus = [1]
"#;

const DUMPS: [(&str, &str); 8] = [
    ("vm halts: started", "\x141"),
    ("console 1: halts", ""),
    ("round 1", "\x14pdump spins\r"),
    ("VMCS, host:", "dump halts\r"),
    ("VMCS, host:", "vm spins pause\rdump spins\r"),
    ("VMCS, host:", "vm spins destroy\rdump spins\r"),
    ("spins: it is not created", "trace halts 2\r"),
    ("\n   0  ", "vm halts stop\r"),
];

/// Guests show their state wherever they are.
fn dumps(case: &mut Case) -> Result<()> {
    let files = ["latency", "spin"].map(|name| Ok((name, paths::read(&build::guest(name)?)?)));
    let files = files
        .into_iter()
        .collect::<Result<Vec<(&str, Vec<u8>)>>>()?;
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, file)| (*name, &**file)).collect();
    let seen = case
        .machine()
        .volume(DUMPED, &files)?
        .options(["--smp", "2"])
        .input(Input::Typed(DUMPS.to_vec()))
        .limit(180)
        .run()?;
    case.check_equal("each has come", &seen.ending, &Ending::Status(0));
    let dumps: Vec<&str> = seen.console.split("> \x1b[Kdump ").skip(1).collect();
    case.check_equal("so many were asked for", dumps.len(), 4);
    for (dump, guest) in dumps.iter().zip(["spins", "halts", "spins"]) {
        let value = |name: &str| {
            let mut words = dump.split_whitespace().skip_while(|word| *word != name);
            u64::from_str_radix(words.nth(1)?, 16).ok()
        };
        case.check_equal(
            &format!("{guest}: CPL 0"),
            value("CS_SELECTOR").map(|cs| cs & 3),
            Some(0),
        );
        case.check(
            &format!("{guest}: RIP is in its program"),
            value("RIP").is_some_and(|rip| (0x10_0000..0x30_0000).contains(&rip)),
            dump,
        );
    }
    Ok(())
}

const SCREENS: [(&str, &str); 9] = [
    ("echo: ready", "\x14pscreen nobody\r"),
    ("there is no guest nobody", "screen second\r\x141"),
    ("console 1: first", "draw\r"),
    ("drawn", "\x14pscreen first\r"),
    ("♥", "vm first pause\rscreen first\r"),
    ("♥", "vm first resume\r\x141"),
    ("console 1: first", "graphics\r"),
    ("painted", "\x14pscreen first\r"),
    (
        "the screen shows graphics, not text",
        "vm second stop\rscreen second\rvm first stop\r",
    ),
];

/// What guests show on their screens is text on the operator's, wherever they are.
fn screen(case: &mut Case) -> Result<()> {
    let kernel = paths::read(&build::guest("echo")?)?;
    let seen = case
        .machine()
        .volume(CONFIG, &[("echo", &kernel)])?
        .options(["--smp", "2"])
        .input(Input::Typed(SCREENS.to_vec()))
        .limit(180)
        .run()?;
    case.check_equal("all has come", &seen.ending, &Ending::Status(0));
    case.check(
        "the screen is memory",
        seen.console.contains("check: the screen is memory: ok"),
        &seen.console,
    );
    let shown: Vec<&str> = seen.console.split("> \x1b[Kscreen ").skip(1).collect();
    let lines = |index: usize| -> Vec<&str> {
        let lines = shown.get(index).into_iter().flat_map(|text| text.lines());
        lines.skip(1).collect()
    };
    let margin = " ".repeat(38);
    let mut drawn = ["╔══╗", "║hé║", "╚══╝"]
        .map(|text| format!("{margin}{text}"))
        .to_vec();
    drawn.resize(24, String::new());
    drawn.push(format!("{}♥", " ".repeat(79)));
    for (index, when) in [(2, "while it runs"), (3, "while it pauses")] {
        case.check(
            when,
            lines(index).iter().take(25).eq(&drawn),
            lines(index).join("\n"),
        );
    }
    Ok(())
}

/// Beside a guest that stays.
const TINY: &str = r#"
[[vm]]
name = "stays"
memory = "16M"
kernel = "echo"

[[vm]]
name = "tiny"
memory = "4M"
kernel = "echo"
vcpus = 2
"#;

/// What is typed at once: so many times a guest is created, started and destroyed.
const BATCH: usize = 20;
const BATCHES: usize = 50;

/// Whatever a guest has had is given back at its end.
fn thousand_rounds(case: &mut Case) -> Result<()> {
    let kernel = paths::read(&build::guest("echo")?)?;
    let round = "vm tiny create\rvm tiny start\rvm tiny destroy\r".repeat(BATCH) + "mem\r";
    let round: &str = round.leak();
    let mut typed = vec![
        ("echo: ready", "\x14p"),
        ("vireo> ", "vm tiny destroy\rmem\r"),
        // No table is left of where its local APIC has been.
        (" in use\r\n", "\x141roam\r"),
        ("roamed", "\x14pmem\r"),
    ];
    typed.extend([(" in use\r\n", round); BATCHES]);
    typed.push((" in use\r\n", "vms\rvm stays destroy\r"));
    let seen = case
        .machine()
        .volume(TINY, &[("echo", &kernel)])?
        .options(["--smp", "2"])
        .input(Input::Typed(typed))
        .limit(600)
        .run()?;
    let console = &seen.console;
    let started = console.matches("vireo: vm tiny: started").count();
    case.check_equal("so many times it has started", started, BATCH * BATCHES + 1);
    for what in ["frames ", "VPIDs "] {
        let lines = console.lines().filter(|line| line.starts_with(what));
        let counts: Vec<&str> = lines.collect();
        case.check_equal(
            &format!("{what}are told before and after each batch"),
            counts.len(),
            BATCHES + 2,
        );
        let first = counts.first().copied().unwrap_or_default();
        case.check(
            &format!("{what}are always as many"),
            counts.iter().all(|count| *count == first),
            counts.join("\n"),
        );
    }
    case.check(
        "what is destroyed is a section of the configuration only",
        console.contains(" 2  tiny      4 MiB      2  -               0  not created"),
        console,
    );
    case.check_equal(
        "the last one's end is the machine's",
        &seen.ending,
        &Ending::Status(0),
    );
    Ok(())
}

/// Lines that are typed at once, and their length.
const LINES: usize = 100;
const LINE: usize = 60;

/// What is pasted comes to the guest whole, and in its order.
fn input_flood(case: &mut Case) -> Result<()> {
    let kernel = paths::read(&build::guest("echo")?)?;
    let lines: Vec<String> = (0..LINES).map(|n| format!("{n:0LINE$}")).collect();
    let pasted: &str = (lines.join("\r") + "\rquit\r").leak();
    let seen = case
        .machine()
        .volume(CONFIG, &[("echo", &kernel)])?
        .options(["--smp", "2"])
        // The other guest sends all that it can meanwhile.
        .input(Input::Typed(vec![
            ("echo: ready", "\x142"),
            ("console 2: second", "flood\r"),
            ("flood 1", "\x141"),
            ("console 1: first", pasted),
            ("console 2: second", "x"),
            ("flood: over", "quit\r"),
        ]))
        .limit(180)
        .run()?;
    case.check_equal("both have ended", &seen.ending, &Ending::Status(0));
    let echoed = seen.console.lines().filter_map(|line| {
        let text = line.trim_end().strip_prefix("echo: \"")?;
        text.strip_suffix('"')
    });
    case.check_equal(
        "each line has come",
        echoed.collect::<Vec<_>>(),
        lines.iter().map(|line| &**line).collect(),
    );
    Ok(())
}

/// Beside those of [`CONFIG`]: it says that it is about to reset, on the second serial port.
const APART: &str = r#"
[[vm]]
name = "apart"
memory = "64M"
kernel = "reset"
cpus = [2]
serial = "com2"
"#;

/// A guest has the second serial port for itself.
fn second_port(case: &mut Case) -> Result<()> {
    let echo = paths::read(&build::guest("echo")?)?;
    let reset = paths::read(&build::guest("reset")?)?;
    let file = case.folder().join("com2");
    let path = file.display().to_string();
    let seen = case
        .machine()
        .volume(
            &[CONFIG, APART].concat(),
            &[("echo", &echo), ("reset", &reset)],
        )?
        .options(["--smp", "3", "--com2", &path])
        .input(Input::Typed(vec![
            ("vm apart: reset", "\x143"),
            (
                "the console of apart is the second serial port",
                "\x141quit\r",
            ),
            ("vm first: powered off", "quit\r"),
        ]))
        .limit(180)
        .run()?;
    case.check(
        "the operator's console goes on",
        seen.output.contains("vm second: powered off"),
        &seen.output,
    );
    // Behind what the firmware says on each of its ports.
    let sent = String::from_utf8_lossy(&fs::read(&file)?).into_owned();
    case.check(
        "what it has sent, and nothing of others",
        sent.ends_with("hypervisor\r\nabout to reset\r\n"),
        sent,
    );
    Ok(())
}

/// Where there is none, it is not started, and others are.
fn no_second_port(case: &mut Case) -> Result<()> {
    let reset = paths::read(&build::guest("reset")?)?;
    let config = [
        APART,
        &APART.replace("apart", "other").replace("com2", "console"),
    ]
    .concat()
    .replace("cpus = [2]", "");
    let seen = case
        .machine()
        .volume(&config, &[("reset", &reset)])?
        .limit(120)
        .run()?;
    for line in [
        "vireo: error: vm apart: `serial` in vireo.toml is \"com2\", and the machine has no second serial port",
        "vireo: vm other: reset",
    ] {
        let said = seen.console.lines().any(|said| said.trim_end() == line);
        case.check(line, said, &seen.console);
    }
    Ok(())
}
