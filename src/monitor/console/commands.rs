//! The commands of the operator's prompt: text in, text out.

use super::Text;
use super::multiplexer::Commands;
use crate::monitor::statistics::Exits;
use crate::vmx::exit_reason;
use crate::vmx::trace::Traced;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{self, Write};

/// What the commands ask about.
pub trait Machine {
    /// All guests of the configuration, in its order.
    fn guests(&self) -> Vec<Guest>;
    /// All CPUs, the boot processor first.
    fn cpus(&self) -> Vec<Cpu>;
    fn memory(&self) -> Memory;
    /// Ticks a second of the time-stamp counter.
    fn ticks_per_second(&self) -> u64;
    /// The time-stamp counter.
    fn now(&self) -> u64;
    /// The VM exits of each vCPU of the guest with this index.
    fn exits_of_each(&self, guest: usize) -> Vec<Exits>;
    /// The last VM exits of each vCPU of the guest with this index, the oldest first.
    fn traces(&self, guest: usize) -> Vec<Vec<Traced>>;
    /// The log's lines, as far as they are still there.
    fn log(&self) -> String;
    /// Has the guest with this index do that.
    ///
    /// # Errors
    /// Why not.
    fn steer(&self, guest: usize, action: Action) -> Result<(), &'static str>;
    /// Asks the guest with this index to show this; `Some` where it is there already.
    ///
    /// # Errors
    /// Why that cannot be.
    fn ask_to_show(&self, guest: usize, view: View) -> Result<Option<String>, &'static str>;
    /// What was asked for, of each vCPU that was asked, once it is there.
    ///
    /// # Errors
    /// Why it will not come.
    fn shown(&self, guest: usize) -> Result<Option<Vec<String>>, &'static str>;
    /// Whether the guest with this index has done that.
    fn is_settled(&self, guest: usize) -> bool;
}

/// What a guest shows of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// The registers of each vCPU.
    State,
    /// The text on its screen.
    Screen,
}

/// What the operator has a guest do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To be loaded.
    Create,
    /// To be loaded, where it is not, and started.
    Start,
    /// To end, as if its plug was pulled.
    Stop,
    /// Not to execute, while its clocks go on.
    Pause,
    Resume,
    /// To be started again from the beginning.
    Reset,
    /// To end, and give back all that it has.
    Destroy,
}

impl Action {
    const ALL: [(&'static str, Self); 7] = [
        ("create", Self::Create),
        ("start", Self::Start),
        ("stop", Self::Stop),
        ("pause", Self::Pause),
        ("resume", Self::Resume),
        ("reset", Self::Reset),
        ("destroy", Self::Destroy),
    ];

    fn named(name: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|(other, _)| *other == name)
            .map(|(_, action)| action)
    }
}

/// A guest.
#[derive(Clone, Debug)]
pub struct Guest {
    pub name: String,
    /// "running", or how it has ended.
    pub state: String,
    /// Bytes.
    pub memory: u64,
    pub vcpus: u32,
    /// How much of its local APIC the CPU is, once that is known.
    pub apic: Option<String>,
    /// The numbers of its vCPUs' CPUs, while it runs.
    pub cpus: Vec<usize>,
    /// `None` before it has started.
    pub exits: Option<Exits>,
}

/// A CPU of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    pub apic_id: u32,
    /// It has started, and is ours.
    pub answers: bool,
}

/// The machine's memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub total: u64,
    pub free: u64,
    pub hypervisor: u64,
    pub guests: u64,
    /// Of the hypervisor's heap: in use, and all.
    pub heap: (u64, u64),
    /// Frames of 4 KiB that are free.
    pub frames_free: u64,
    /// VPIDs in use.
    pub vpids: usize,
}

/// What a command waits for, before the next one is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The guest with this index has done what it was asked for.
    Steered(usize),
    /// The guest with this index has shown what it was asked for.
    Shown(usize),
}

type Answer = fn(&dyn Machine, &[&str], &mut Text) -> Result<Option<Wait>, Complaint>;

/// A command: what it is called, what stands behind it, what it does.
struct Command {
    name: &'static str,
    arguments: &'static str,
    help: &'static str,
    run: Answer,
}

/// Exits that are shown where nobody says how many.
const TRACE: usize = 32;

const COMMANDS: [Command; 10] = [
    Command {
        name: "vms",
        arguments: "",
        help: "the guests, with the numbers of their consoles",
        run: |machine, _, out| at_once(guests(machine, out)),
    },
    Command {
        name: "vm",
        arguments: "NAME create|start|stop|pause|resume|reset|destroy",
        help: "steers a guest",
        run: steer,
    },
    Command {
        name: "cpus",
        arguments: "",
        help: "the CPUs, and what they do",
        run: |machine, _, out| at_once(cpus(machine, out)),
    },
    Command {
        name: "stat",
        arguments: "[NAME] [--json]",
        help: "VM exits by reason, of one guest or of all",
        run: statistics,
    },
    Command {
        name: "trace",
        arguments: "NAME [COUNT]",
        help: "the last VM exits, 32 or COUNT of each vCPU",
        run: trace,
    },
    Command {
        name: "dump",
        arguments: "NAME",
        help: "a guest's registers and VMCS",
        run: |machine, arguments, out| show(machine, ("dump", View::State), arguments, out),
    },
    Command {
        name: "screen",
        arguments: "NAME",
        help: "the text on a guest's screen",
        run: |machine, arguments, out| show(machine, ("screen", View::Screen), arguments, out),
    },
    Command {
        name: "mem",
        arguments: "",
        help: "the memory in use",
        run: |machine, _, out| at_once(memory(machine, out)),
    },
    Command {
        name: "log",
        arguments: "",
        help: "what the hypervisor has said",
        run: |machine, _, out| at_once(out.write_str(&machine.log())),
    },
    Command {
        name: "help",
        arguments: "",
        help: "this list",
        run: |_, _, out| at_once(help(out)),
    },
];

/// Of a command that has said everything.
fn at_once(written: fmt::Result) -> Result<Option<Wait>, Complaint> {
    Ok(written.map(|()| None)?)
}

/// What is wrong with a command, in one sentence.
enum Complaint {
    NoCommand(String),
    NoGuest(String),
    Arguments(&'static Command),
    /// Of the guest with this name, which cannot do that.
    Refused(String, &'static str),
    /// The text has no room.
    Cut,
}

impl From<fmt::Error> for Complaint {
    fn from(_: fmt::Error) -> Self {
        Self::Cut
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCommand(name) => write!(f, "there is no command {name}; help lists them"),
            Self::NoGuest(name) => write!(f, "there is no guest {name}; vms lists them"),
            Self::Refused(name, reason) => write!(f, "{name}: {reason}"),
            Self::Arguments(Command {
                name,
                arguments: "",
                ..
            }) => write!(f, "{name} stands alone"),
            Self::Arguments(Command {
                name, arguments, ..
            }) => write!(f, "{name} is written {name} {arguments}"),
            Self::Cut => f.write_str("there is no room for all of the answer"),
        }
    }
}

/// The commands of a machine.
pub struct Prompt<'a>(pub &'a dyn Machine);

impl Commands for Prompt<'_> {
    fn answer(&self, line: &str, out: &mut Text) -> Option<Wait> {
        answer(self.0, line, out).unwrap_or_else(|complaint| {
            // A queue takes everything, or cuts it.
            let _ = writeln!(out, "{complaint}");
            None
        })
    }

    fn is_over(&self, wait: Wait, out: &mut Text) -> bool {
        let guest = match wait {
            Wait::Steered(guest) => return self.0.is_settled(guest),
            Wait::Shown(guest) => guest,
        };
        let shown = self.0.shown(guest);
        // As above.
        let _ = match &shown {
            Ok(None) => return false,
            Ok(Some(views)) => views.iter().zip(0..).try_for_each(|(view, vcpu)| {
                if views.len() > 1 {
                    writeln!(out, "vCPU {vcpu}:")?;
                }
                out.write_str(view)
            }),
            Err(reason) => writeln!(out, "{reason}"),
        };
        true
    }
}

fn answer(machine: &dyn Machine, line: &str, out: &mut Text) -> Result<Option<Wait>, Complaint> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let Some((name, arguments)) = words.split_first() else {
        return Ok(None);
    };
    let command = COMMANDS
        .iter()
        .find(|command| command.name == *name)
        .ok_or_else(|| Complaint::NoCommand((*name).into()))?;
    if command.arguments.is_empty() && !arguments.is_empty() {
        return Err(Complaint::Arguments(command));
    }
    (command.run)(machine, arguments, out)
}

fn help(out: &mut Text) -> fmt::Result {
    for Command {
        name,
        arguments,
        help,
        ..
    } in &COMMANDS
    {
        writeln!(out, "{name:6} {arguments:15}  {help}")?;
    }
    writeln!(out, "Ctrl-T 1 to 9         the console of that guest")?;
    writeln!(out, "Ctrl-T n              that of the next one that runs")?;
    writeln!(out, "Ctrl-T p, Ctrl-T 0    this prompt")
}

fn guests(machine: &dyn Machine, out: &mut Text) -> fmt::Result {
    let guests = machine.guests();
    let widest = |heading: &str, width: &dyn Fn(&Guest) -> usize| {
        guests.iter().map(width).fold(heading.len(), usize::max)
    };
    let name = widest("name", &|guest| guest.name.len());
    let apic = widest("APIC", &|guest| guest.apic.as_ref().map_or(0, String::len));
    writeln!(
        out,
        "no  {:name$}  memory    vCPUs  {:apic$}       exits  state",
        "name", "APIC"
    )?;
    for (guest, number) in guests.iter().zip(1..) {
        writeln!(
            out,
            "{number:2}  {:name$}  {:4} MiB  {:5}  {:apic$}  {:10}  {}",
            guest.name,
            guest.memory >> 20,
            guest.vcpus,
            guest.apic.as_deref().unwrap_or("-"),
            guest.exits.as_ref().map_or(0, Exits::count),
            guest.state
        )?;
    }
    Ok(())
}

fn cpus(machine: &dyn Machine, out: &mut Text) -> fmt::Result {
    let guests = machine.guests();
    writeln!(out, "CPU  APIC id  state")?;
    for (number, cpu) in machine.cpus().iter().enumerate() {
        write!(out, "{number:3}  {:7}  ", cpu.apic_id)?;
        let mut running = guests
            .iter()
            .filter(|guest| guest.cpus.contains(&number))
            .peekable();
        if running.peek().is_none() {
            out.write_str(if cpu.answers {
                "runs no guest"
            } else {
                "left out; log says why"
            })?;
        }
        let mut separator = "runs ";
        for guest in running {
            write!(out, "{separator}{}", guest.name)?;
            separator = ", ";
        }
        writeln!(out)?;
    }
    Ok(())
}

fn memory(machine: &dyn Machine, out: &mut Text) -> fmt::Result {
    let memory = machine.memory();
    for (what, bytes) in [
        ("machine", memory.total),
        ("free", memory.free),
        ("hypervisor", memory.hypervisor),
        ("guests", memory.guests),
    ] {
        writeln!(out, "{what:10}  {:10} KiB", bytes / 1024)?;
    }
    let (used, all) = memory.heap;
    writeln!(
        out,
        "heap        {:10} KiB of {} KiB",
        used / 1024,
        all / 1024
    )?;
    writeln!(out, "frames      {:10} free", memory.frames_free)?;
    writeln!(out, "VPIDs       {:10} in use", memory.vpids)
}

fn statistics(
    machine: &dyn Machine,
    arguments: &[&str],
    out: &mut Text,
) -> Result<Option<Wait>, Complaint> {
    let (options, names): (Vec<&str>, Vec<&str>) =
        arguments.iter().partition(|word| word.starts_with('-'));
    let json = match options[..] {
        [] => false,
        ["--json"] => true,
        _ => return Err(wrong_arguments("stat")),
    };
    let mut guests: Vec<(usize, Guest)> = machine.guests().into_iter().enumerate().collect();
    match names[..] {
        [] => {}
        [name] => {
            guests.retain(|(_, guest)| guest.name == name);
            if guests.is_empty() {
                return Err(Complaint::NoGuest(name.into()));
            }
        }
        _ => return Err(wrong_arguments("stat")),
    }
    let hz = machine.ticks_per_second();
    if json {
        return at_once(statistics_json(machine, &guests, out));
    }
    for (index, guest) in &guests {
        let Guest {
            name, exits, vcpus, ..
        } = guest;
        match exits {
            None => writeln!(out, "{name} has not started")?,
            Some(exits) if exits.timed() => {
                let ticks = exits.ticks();
                writeln!(out, "{name}: {ticks} ticks in root mode, of {hz} a second")?;
                write!(out, "{}", exits.table())?;
            }
            Some(exits) => write!(out, "{name}:\n{}", exits.table())?,
        }
        for (exits, vcpu) in of_each(machine, *index, *vcpus).iter().zip(0..) {
            writeln!(out, "vCPU {vcpu}: {}", exits.line())?;
        }
    }
    Ok(None)
}

/// The exits of each of several vCPUs.
fn of_each(machine: &dyn Machine, guest: usize, vcpus: u32) -> Vec<Exits> {
    if vcpus > 1 {
        machine.exits_of_each(guest)
    } else {
        Vec::new()
    }
}

/// One line: an object with the `vms` that have started, each with its `vcpus` where there are
/// several.
fn statistics_json(
    machine: &dyn Machine,
    guests: &[(usize, Guest)],
    out: &mut Text,
) -> fmt::Result {
    let hz = machine.ticks_per_second();
    write!(out, "{{\"ticks_per_second\":{hz},\"vms\":[")?;
    let mut separator = "";
    for (index, guest) in guests {
        if let Some(exits) = &guest.exits {
            // Names are letters, digits, - and _.
            let name = &guest.name;
            write!(out, "{separator}{{\"name\":\"{name}\",{}", exits.json())?;
            separator = ",\"vcpus\":[";
            for exits in of_each(machine, *index, guest.vcpus) {
                write!(out, "{separator}{{{}}}", exits.json())?;
                separator = ",";
            }
            out.write_str(if separator == "," { "]}" } else { "}" })?;
            separator = ",";
        }
    }
    writeln!(out, "]}}")
}

fn trace(
    machine: &dyn Machine,
    arguments: &[&str],
    out: &mut Text,
) -> Result<Option<Wait>, Complaint> {
    let wrong = || wrong_arguments("trace");
    let (name, count) = match *arguments {
        [name] => (name, TRACE),
        [name, count] => (name, count.parse().map_err(|_| wrong())?),
        _ => return Err(wrong()),
    };
    let traces = machine.traces(index_of(machine, name)?);
    let clock = (machine.now(), machine.ticks_per_second());
    if traces.iter().all(Vec::is_empty) {
        return at_once(writeln!(out, "{name} has not exited"));
    }
    for (exits, vcpu) in traces.iter().zip(0..) {
        if traces.len() > 1 {
            writeln!(out, "vCPU {vcpu}:")?;
        }
        let shown = &exits[exits.len().saturating_sub(count)..];
        last_exits(shown, clock, out)?;
    }
    Ok(None)
}

/// A table of `exits`, where `clock` is the time-stamp counter and its ticks a second.
fn last_exits(exits: &[Traced], clock: (u64, u64), out: &mut Text) -> fmt::Result {
    let (now, hz) = clock;
    writeln!(
        out,
        "exit  reason                 us ago  RIP                 qualification"
    )?;
    for (exit, back) in exits.iter().zip((0..exits.len()).rev()) {
        let reason = exit_reason::name(exit.reason);
        match exit.place {
            None => writeln!(out, "{:4}  {reason}", -(back as i64))?,
            Some(place) => writeln!(
                out,
                "{:4}  {reason:18}  {:9}  {:#018x}  {:#x}",
                -(back as i64),
                microseconds(now.saturating_sub(place.ticks), hz),
                place.rip,
                place.qualification
            )?,
        }
    }
    Ok(())
}

/// The command with this name, which shows this of a guest.
fn show(
    machine: &dyn Machine,
    (name, view): (&str, View),
    arguments: &[&str],
    out: &mut Text,
) -> Result<Option<Wait>, Complaint> {
    let [guest] = *arguments else {
        return Err(wrong_arguments(name));
    };
    let index = index_of(machine, guest)?;
    match machine.ask_to_show(index, view) {
        Ok(Some(shown)) => at_once(out.write_str(&shown)),
        Ok(None) => Ok(Some(Wait::Shown(index))),
        Err(reason) => Err(Complaint::Refused(guest.into(), reason)),
    }
}

const fn microseconds(ticks: u64, hz: u64) -> u64 {
    (ticks as u128 * 1_000_000 / if hz == 0 { 1 } else { hz as u128 }) as u64
}

/// The index of the guest with this name.
fn index_of(machine: &dyn Machine, name: &str) -> Result<usize, Complaint> {
    let guests = machine.guests();
    let index = guests.iter().position(|guest| guest.name == name);
    index.ok_or_else(|| Complaint::NoGuest(name.into()))
}

fn steer(
    machine: &dyn Machine,
    arguments: &[&str],
    _: &mut Text,
) -> Result<Option<Wait>, Complaint> {
    let [name, action] = arguments else {
        return Err(wrong_arguments("vm"));
    };
    let action = Action::named(action).ok_or_else(|| wrong_arguments("vm"))?;
    let index = index_of(machine, name)?;
    machine
        .steer(index, action)
        .map(|()| Some(Wait::Steered(index)))
        .map_err(|reason| Complaint::Refused((*name).into(), reason))
}

fn wrong_arguments(name: &str) -> Complaint {
    COMMANDS
        .iter()
        .find(|command| command.name == name)
        .map_or(Complaint::Cut, Complaint::Arguments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::trace::Place;

    struct Fake;

    impl Machine for Fake {
        fn guests(&self) -> Vec<Guest> {
            let mut counts = [0; 64];
            (counts[10], counts[30]) = (1000, 500);
            let running = Guest {
                name: "linux".into(),
                state: "running".into(),
                memory: 256 << 20,
                vcpus: 2,
                apic: Some("APICv".into()),
                cpus: [0].into(),
                exits: Some(Exits::new(&counts, None)),
            };
            let loaded = Guest {
                name: "b".into(),
                state: "loaded".into(),
                apic: None,
                cpus: Vec::new(),
                exits: None,
                ..running.clone()
            };
            vec![running, loaded]
        }

        fn cpus(&self) -> Vec<Cpu> {
            [(4, true), (5, true), (6, false)]
                .map(|(apic_id, answers)| Cpu { apic_id, answers })
                .to_vec()
        }

        fn memory(&self) -> Memory {
            Memory {
                total: 1 << 30,
                free: 700 << 20,
                hypervisor: 5 << 20,
                guests: 256 << 20,
                heap: (100 << 10, 4 << 20),
                frames_free: 1234,
                vpids: 2,
            }
        }

        fn ticks_per_second(&self) -> u64 {
            1000
        }

        fn now(&self) -> u64 {
            5000
        }

        fn exits_of_each(&self, guest: usize) -> Vec<Exits> {
            let exits = |cpuid, io| {
                let mut counts = [0; 64];
                (counts[10], counts[30]) = (cpuid, io);
                Exits::new(&counts, None)
            };
            match guest {
                0 => vec![exits(1000, 0), exits(0, 500)],
                _ => vec![],
            }
        }

        fn traces(&self, guest: usize) -> Vec<Vec<Traced>> {
            let place = Place {
                rip: 0xffff_ffff_8100_0000,
                qualification: 0x3f8_0001,
                ticks: 4000,
            };
            let exit = |reason, place| Traced { reason, place };
            let all = [exit(10, None), exit(30, Some(place)), exit(52, None)];
            let all = all.to_vec();
            match guest {
                0 => vec![all],
                _ => vec![],
            }
        }

        fn log(&self) -> String {
            "one\ntwo\n".into()
        }

        fn steer(&self, guest: usize, action: Action) -> Result<(), &'static str> {
            match (guest, action) {
                (0, Action::Start) => Err("it has not ended"),
                (0, _) => Ok(()),
                _ => Err("it does not run"),
            }
        }

        fn ask_to_show(&self, guest: usize, view: View) -> Result<Option<String>, &'static str> {
            match (guest, view) {
                (0, _) => Ok(None),
                (_, View::Screen) => Ok(Some("BIOS\n".into())),
                _ => Err("it does not run"),
            }
        }

        fn shown(&self, guest: usize) -> Result<Option<Vec<String>>, &'static str> {
            let views = |views: &[&str]| Ok(Some(views.iter().map(|&s| s.into()).collect()));
            match guest {
                0 => views(&["rax 0\n"]),
                3 => views(&["rax 0\n", "rax 1\n"]),
                1 => Ok(None),
                _ => Err("it has ended"),
            }
        }

        fn is_settled(&self, guest: usize) -> bool {
            guest == 1
        }
    }

    #[test]
    fn guests_are_steered() {
        for line in [
            "vm linux create",
            "vm linux destroy",
            "vm linux stop",
            "vm linux pause",
            "vm linux resume",
            "vm linux reset",
        ] {
            assert!(lines(line).is_empty(), "{line}");
        }
        let wait = Prompt(&Fake).answer("vm linux stop", &mut Text::new());
        assert_eq!(wait, Some(Wait::Steered(0)));
        assert!(!Prompt(&Fake).is_over(Wait::Steered(0), &mut Text::new()));
        assert!(Prompt(&Fake).is_over(Wait::Steered(1), &mut Text::new()));
        assert_eq!(lines("vm linux start"), ["linux: it has not ended"]);
        assert_eq!(lines("vm b stop"), ["b: it does not run"]);
        assert_eq!(lines("vm c stop"), ["there is no guest c; vms lists them"]);
        for wrong in ["vm", "vm linux", "vm linux jump", "vm linux stop now"] {
            assert_eq!(
                lines(wrong),
                ["vm is written vm NAME create|start|stop|pause|resume|reset|destroy"]
            );
        }
    }

    fn asked(line: &str) -> String {
        let mut text = Text::new();
        Prompt(&Fake).answer(line, &mut text);
        let bytes: Vec<u8> = core::iter::from_fn(|| text.pop()).collect();
        String::from_utf8(bytes).unwrap()
    }

    fn lines(line: &str) -> Vec<String> {
        let text = asked(line);
        assert!(text.is_empty() || text.ends_with("\r\n"), "{text:?}");
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn guests_are_listed() {
        assert_eq!(
            lines(" vms "),
            [
                "no  name   memory    vCPUs  APIC        exits  state",
                " 1  linux   256 MiB      2  APICv        1500  running",
                " 2  b       256 MiB      2  -               0  loaded",
            ]
        );
    }

    #[test]
    fn cpus_and_memory_are_told() {
        assert_eq!(
            lines("cpus"),
            [
                "CPU  APIC id  state",
                "  0        4  runs linux",
                "  1        5  runs no guest",
                "  2        6  left out; log says why",
            ]
        );
        assert_eq!(lines("mem").len(), 7);
        assert_eq!(lines("mem")[5], "frames            1234 free");
        assert_eq!(lines("mem")[3], "guests          262144 KiB");
        assert_eq!(lines("log"), ["one", "two"]);
    }

    #[test]
    fn what_a_guest_shows_of_itself_is_told_when_it_has_come() {
        assert_eq!(lines("dump b"), ["b: it does not run"]);
        assert_eq!(lines("screen b"), ["BIOS"]);
        for name in ["dump", "screen"] {
            assert_eq!(lines(name), [format!("{name} is written {name} NAME")]);
            let nobody = ["there is no guest c; vms lists them"];
            assert_eq!(lines(&format!("{name} c")), nobody);
        }
        let mut out = Text::new();
        let wait = Prompt(&Fake).answer("screen linux", &mut out);
        assert_eq!((wait, out.len()), (Some(Wait::Shown(0)), 0));
        let mut shown = |guest| {
            let over = Prompt(&Fake).is_over(Wait::Shown(guest), &mut out);
            let bytes: Vec<u8> = core::iter::from_fn(|| out.pop()).collect();
            (over, String::from_utf8(bytes).unwrap())
        };
        assert_eq!(shown(0), (true, "rax 0\r\n".into()));
        assert_eq!(shown(3).1, "vCPU 0:\r\nrax 0\r\nvCPU 1:\r\nrax 1\r\n");
        assert_eq!(shown(1), (false, String::new()));
        assert_eq!(shown(2), (true, "it has ended\r\n".into()));
    }

    #[test]
    fn the_last_exits_are_listed() {
        let heading = "exit  reason                 us ago  RIP                 qualification";
        let of_the_io = "  -1  I/O                   1000000  0xffffffff81000000  0x3f80001";
        assert_eq!(
            lines("trace linux"),
            [heading, "  -2  CPUID", of_the_io, "   0  preemption timer"]
        );
        assert_eq!(
            lines("trace linux 2")[1..],
            [of_the_io, "   0  preemption timer"]
        );
        assert_eq!(lines("trace b"), ["b has not exited"]);
        assert_eq!(lines("trace c"), ["there is no guest c; vms lists them"]);
        for wrong in ["trace", "trace linux many", "trace linux 1 2"] {
            assert_eq!(lines(wrong), ["trace is written trace NAME [COUNT]"]);
        }
    }

    #[test]
    fn exits_are_tables_or_one_line_for_programs() {
        let all = lines("stat");
        assert_eq!(all[0], "linux:");
        assert!(all[2].starts_with("all      1500  100.0%"), "{all:?}");
        assert!(all[3].starts_with("CPUID    1000   66.7%"), "{all:?}");
        assert_eq!(
            all[5..],
            [
                "vCPU 0: 1000 exits: CPUID 1000",
                "vCPU 1: 500 exits: I/O 500",
                "b has not started"
            ]
        );
        assert_eq!(lines("stat b"), ["b has not started"]);
        assert_eq!(
            lines("stat linux --json"),
            [concat!(
                r#"{"ticks_per_second":1000,"vms":[{"name":"linux","exits":1500,"reasons":["#,
                r#"{"reason":"CPUID","count":1000,"share":0.667},"#,
                r#"{"reason":"I/O","count":500,"share":0.333}],"vcpus":["#,
                r#"{"exits":1000,"reasons":[{"reason":"CPUID","count":1000,"share":1.000}]},"#,
                r#"{"exits":500,"reasons":[{"reason":"I/O","count":500,"share":1.000}]}]}]}"#
            )]
        );
        assert_eq!(
            lines("stat --json b"),
            [r#"{"ticks_per_second":1000,"vms":[]}"#]
        );
    }

    #[test]
    fn what_is_wrong_is_one_sentence() {
        assert_eq!(
            lines("reboot now"),
            ["there is no command reboot; help lists them"]
        );
        assert_eq!(lines("stat c"), ["there is no guest c; vms lists them"]);
        assert_eq!(lines("mem x"), ["mem stands alone"]);
        for wrong in ["stat a b", "stat --xml", "stat --json --json"] {
            assert_eq!(lines(wrong), ["stat is written stat [NAME] [--json]"]);
        }
        assert_eq!(asked("  "), "");
    }

    #[test]
    fn help_names_every_command() {
        let help = lines("help");
        for command in &COMMANDS {
            assert!(help.iter().any(|line| line.starts_with(command.name)));
        }
        assert!(help.iter().all(|line| line.len() < 80));
    }
}
