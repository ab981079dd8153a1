//! `cargo xtask conformance`: kvm-unit-tests, built elsewhere, as guests of Vireo.
//!
//! Each group is a run of `cargo xtask run` in a process of its own. A kernel ends with its
//! result as the code that it writes to port 0xf4, which xtask's exit status tells.

mod groups;

use crate::machine::{MachineConfig, Platform, bound_command};
use crate::paths;
use crate::progress::Progress;
use crate::run::PlatformChoice;
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use groups::Group;
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What a group may take beside its time on hardware: firmware and hypervisor have to start.
const START: u64 = 60;
/// How much slower the emulator is, at the most that a group gets.
const SLOWER: u64 = 6;
/// What the suite's results are as exit statuses: the codes 0, 1, and 77 / 2 (see
/// [`crate::verdict::Watcher::exit_status`]).
const PASSED: i32 = 1;
const FAILED: i32 = 3;
const SKIPPED: i32 = 77;
/// The most results that are shown of a group that fails.
const SHOWN: usize = 8;

/// `cargo xtask conformance`
#[derive(Args, Debug)]
pub struct Options {
    /// The folder with the built kernels (*.flat), and unittests.cfg in it or above it
    folder: PathBuf,
    /// Only groups whose name contains TEXT; may be given several times
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Groups at once; what is left out is as many as there are CPUs
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: Option<u32>,
    /// How long each group may take, instead of six times what unittests.cfg says for hardware
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// What the machines run on
    #[arg(long, value_enum, default_value_t = PlatformChoice::Auto)]
    platform: PlatformChoice,
    /// The emulator's CPU model, by the emulator's name for it
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// List the groups instead of running them
    #[arg(long)]
    list: bool,
}

/// How a group has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    /// With what has failed.
    Failed(Vec<String>),
    /// By its own decision.
    Skipped(String),
    TimedOut,
    NotApplicable(String),
    NotBuilt,
}

impl Outcome {
    const fn word(&self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::Failed(_) => "FAIL",
            Self::Skipped(_) => "skip",
            Self::TimedOut => "TIME-OUT",
            Self::NotApplicable(_) | Self::NotBuilt => "n/a",
        }
    }

    const fn is_bad(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::TimedOut)
    }
}

/// A group that has been run, or not.
struct Record {
    name: String,
    outcome: Outcome,
    /// The suite's own summary, where it gives one.
    summary: String,
    time: Duration,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            outcome,
            summary,
            time,
        } = self;
        write!(f, "{:<8} {name}", outcome.word())?;
        match outcome {
            Outcome::NotApplicable(reason) => return write!(f, ": {reason}"),
            Outcome::NotBuilt => return f.write_str(": its kernel is not in the folder"),
            Outcome::Skipped(reason) if !reason.is_empty() => write!(f, ": {reason}")?,
            _ if !summary.is_empty() => write!(f, ": {summary}")?,
            _ => {}
        }
        write!(f, " ({} s)", time.as_secs())?;
        if let Outcome::Failed(results) = outcome {
            for result in results.iter().take(SHOWN) {
                write!(f, "\n         {result}")?;
            }
            if results.len() > SHOWN {
                write!(f, "\n         and {} more", results.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}

/// Runs the command, and returns the exit code: not 0 where a group fails or takes too long.
///
/// # Errors
/// When there is nothing to run, or a machine cannot be had.
pub fn run(options: &Options) -> Result<u8> {
    let config = [&*options.folder, options.folder.parent().unwrap_or(Path::new(""))]
        .map(|folder| folder.join("unittests.cfg"))
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "there is no unittests.cfg in or above {}: name the folder x86 of kvm-unit-tests, built",
                options.folder.display()
            )
        })?;
    let text = String::from_utf8_lossy(&paths::read(&config)?).into_owned();
    let mut groups = groups::parse(&text);
    let wanted = |group: &Group| {
        let contains = |text: &String| group.name.contains(text.as_str());
        options.filter.is_empty() || options.filter.iter().any(contains)
    };
    groups.retain(wanted);
    ensure!(
        !groups.is_empty(),
        "{} has no group with such a name",
        config.display()
    );
    if options.list {
        for group in &groups {
            println!("{}", group.name);
        }
        return Ok(0);
    }
    let built = |group: &Group| options.folder.join(&group.file).is_file();
    if !groups.iter().any(built) {
        bail!(
            "{} has none of the kernels of {}: build kvm-unit-tests first",
            options.folder.display(),
            config.display()
        );
    }
    let platform = prepare(options)?;

    let results = paths::target().join("conformance");
    let records = run_all(&groups, options, &*platform, &results);
    let count = |what: fn(&Outcome) -> bool| {
        records
            .iter()
            .filter(|record| what(&record.outcome))
            .count()
    };
    println!(
        "conformance: {} passed, {} failed, {} timed out, {} skipped, {} not applicable",
        count(|outcome| *outcome == Outcome::Passed),
        count(|outcome| matches!(outcome, Outcome::Failed(_))),
        count(|outcome| *outcome == Outcome::TimedOut),
        count(|outcome| matches!(outcome, Outcome::Skipped(_))),
        count(|outcome| matches!(outcome, Outcome::NotApplicable(_) | Outcome::NotBuilt)),
    );
    let journal = results.join("journal.xml");
    write_journal(&journal, &records)?;
    eprintln!("journal: {}", journal.display());
    Ok(u8::from(count(Outcome::is_bad) > 0))
}

/// What all groups share is fetched and built once, before the first.
fn prepare(options: &Options) -> Result<Box<dyn Platform>> {
    let progress = Progress::new();
    let provisioner = crate::provision::Provisioner::new(&progress);
    let platform = options.platform.provision(&provisioner)?;
    progress.clear();
    crate::build::all()?;
    Ok(platform)
}

/// Runs groups, several at once, and tells of each when it has ended.
fn run_all(
    groups: &[Group],
    options: &Options,
    platform: &dyn Platform,
    results: &Path,
) -> Vec<Record> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let jobs = options.jobs.map_or(cpus, |jobs| jobs as usize);
    let next = AtomicUsize::new(0);
    let records = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs.min(groups.len()) {
            scope.spawn(|| {
                while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let record = run_one(group, options, platform, results);
                    println!("{record}");
                    let mut records = records.lock().unwrap_or_else(PoisonError::into_inner);
                    records.push(record);
                }
            });
        }
    });
    let mut records = records.into_inner().unwrap_or_else(PoisonError::into_inner);
    let order = |record: &Record| groups.iter().position(|group| group.name == record.name);
    records.sort_by_key(order);
    records
}

fn run_one(group: &Group, options: &Options, platform: &dyn Platform, results: &Path) -> Record {
    let start = Instant::now();
    let (outcome, summary) = match &group.not_applicable {
        Some(reason) => (Outcome::NotApplicable(reason.clone()), String::new()),
        None if !options.folder.join(&group.file).is_file() => (Outcome::NotBuilt, String::new()),
        None => {
            boot(group, options, platform, &results.join(&group.name)).unwrap_or_else(|error| {
                let outcome = Outcome::Failed(vec![format!("{error:#}")]);
                (outcome, String::new())
            })
        }
    };
    Record {
        name: group.name.clone(),
        outcome,
        summary,
        time: start.elapsed(),
    }
}

/// Boots a group's machine, and judges what it says; and the suite's own summary.
fn boot(
    group: &Group,
    options: &Options,
    machine: &dyn Platform,
    folder: &Path,
) -> Result<(Outcome, String)> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let limit = options
        .timeout
        .unwrap_or(START + SLOWER * group.timeout.as_secs());
    let platform = options.platform.to_possible_value();
    let mut command = bound_command(&std::env::current_exe()?);
    command
        .arg("run")
        .arg("--multiboot")
        .arg(options.folder.join(&group.file))
        .args([
            "--cmdline",
            &group.arguments(machine.time()),
            "--test-device",
        ])
        .args(["--memory", &group.memory.to_string()])
        .args(["--vcpus", &group.vcpus.to_string()])
        // A CPU for each: tests that wait for each other do so for a whole turn otherwise.
        .args(["--smp", &group.vcpus.to_string()])
        .args(["--timeout", &limit.to_string()])
        .arg("--folder")
        .arg(folder);
    if !group.x2apic {
        command.arg("--no-x2apic");
    }
    if group.wants_time() {
        // The time until a kernel starts counts.
        command.args(["--ips", &MachineConfig::TIMED_IPS.to_string()]);
    }
    let bare = options.platform == PlatformChoice::Bare;
    if let Some(text) = group.environment(bare) {
        let environment = folder.join("environment");
        paths::write(&environment, text.as_bytes())?;
        command.arg("--module").arg(environment);
    }
    if let Some(platform) = &platform {
        command.args(["--platform", platform.get_name()]);
    }
    if let Some(model) = &options.cpu {
        command.args(["--cpu", model]);
    }
    let (output, errors) = (folder.join("stdout"), folder.join("stderr"));
    let status = command
        .stdin(Stdio::null())
        .stdout(File::create(&output)?)
        .stderr(File::create(&errors)?)
        .status()
        .context("cannot start xtask")?;
    let text = |path: &Path| -> Result<String> {
        Ok(String::from_utf8_lossy(&paths::read(path)?).into_owned())
    };
    let (console, errors) = (text(&output)?, text(&errors)?);
    let summary = console
        .lines()
        .find_map(|line| line.trim_end().strip_prefix("SUMMARY: "))
        .unwrap_or_default();
    let status = match status.code() {
        // Nobody takes the code there.
        Some(0) if bare => status_in(summary),
        status => status,
    };
    Ok((judge(status, &console, &errors), summary.to_owned()))
}

/// The exit status that goes with the suite's own summary, if there is one.
fn status_in(summary: &str) -> Option<i32> {
    let count = |what: &str| {
        let mut parts = summary.split(", ");
        let part = parts.find_map(|part| part.strip_suffix(what))?;
        part.trim().parse::<u32>().ok()
    };
    let tests = count("tests")?;
    Some(match (count("unexpected failures"), count("skipped")) {
        (Some(_), _) => FAILED,
        (None, Some(skipped)) if skipped == tests => SKIPPED,
        _ => PASSED,
    })
}

/// The outcome of a run with this exit status and these outputs.
fn judge(status: Option<i32>, console: &str, errors: &str) -> Outcome {
    let sentence = errors
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("error: "));
    let starting = |prefix: &str| -> Vec<String> {
        let lines = console.lines().map(str::trim);
        lines
            .filter(|line| line.starts_with(prefix))
            .map(str::to_owned)
            .collect()
    };
    match (status, sentence) {
        (Some(_), Some(sentence)) if sentence.contains("has not ended within") => Outcome::TimedOut,
        (Some(PASSED), None) => Outcome::Passed,
        (Some(SKIPPED), None) => {
            let reasons = starting("SKIP: ");
            let reason = reasons.first().map_or("", |line| &line["SKIP: ".len()..]);
            Outcome::Skipped(reason.to_owned())
        }
        (status, sentence) => {
            let mut results = starting("FAIL: ");
            results.extend(starting("Unhandled "));
            results.extend(sentence.map(str::to_owned));
            if results.is_empty() {
                let status = status.map_or("a signal".to_owned(), |status| status.to_string());
                results.push(format!("it has ended with status {status}"));
            }
            Outcome::Failed(results)
        }
    }
}

/// The results as JUnit XML.
fn write_journal(path: &Path, records: &[Record]) -> Result<()> {
    let mut suite = TestSuite::new("conformance");
    for record in records {
        let skipped = |reason: &str| {
            let mut status = TestCaseStatus::skipped();
            status.set_message(reason);
            status
        };
        let failed = |reason: String| {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message(reason);
            status
        };
        let status = match &record.outcome {
            Outcome::Passed => TestCaseStatus::success(),
            Outcome::Failed(results) => failed(results.join("; ")),
            Outcome::TimedOut => failed("it has taken too long".to_owned()),
            Outcome::Skipped(reason) | Outcome::NotApplicable(reason) => skipped(reason),
            Outcome::NotBuilt => skipped("its kernel is not in the folder"),
        };
        let mut case = TestCase::new(&record.name, status);
        case.set_classname("conformance");
        case.set_time(record.time);
        suite.add_test_case(case);
    }
    let mut report = Report::new("vireo");
    report.add_test_suite(suite);
    let folder = path.parent().context("no folder for the journal")?;
    fs::create_dir_all(folder)?;
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    report.serialize(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_told_apart() {
        assert_eq!(judge(Some(1), "PASS: a\n", ""), Outcome::Passed);
        let console = "SKIP: no SMAP\r\nSUMMARY: 1 tests, 1 skipped\r\n";
        assert_eq!(
            judge(Some(77), console, ""),
            Outcome::Skipped("no SMAP".into())
        );
        let hang = "error: the machine has not ended within 5 s (--timeout), it was\n";
        assert_eq!(judge(Some(1), "", hang), Outcome::TimedOut);
        let death = "noise\nerror: the guest guest was stopped: triple fault\n";
        assert_eq!(
            judge(Some(1), "PASS: a\nFAIL: b\n", death),
            Outcome::Failed(vec![
                "FAIL: b".into(),
                "the guest guest was stopped: triple fault".into()
            ])
        );
        assert_eq!(
            judge(Some(0), "", ""),
            Outcome::Failed(vec!["it has ended with status 0".into()])
        );
        assert_eq!(
            judge(Some(3), "FAIL: x\n", ""),
            Outcome::Failed(vec!["FAIL: x".into()])
        );
    }

    #[test]
    fn without_vireo_the_summary_tells() {
        assert_eq!(status_in("30 tests"), Some(PASSED));
        assert_eq!(status_in("2 tests, 1 skipped"), Some(PASSED));
        assert_eq!(status_in("1 tests, 1 skipped"), Some(SKIPPED));
        assert_eq!(status_in("25 tests, 2 unexpected failures"), Some(FAILED));
        assert_eq!(status_in(""), None);
    }

    #[test]
    fn a_record_is_a_line_and_what_has_failed() {
        let record = |outcome, summary: &str| {
            Record {
                name: "emulator".into(),
                outcome,
                summary: summary.into(),
                time: Duration::from_millis(2900),
            }
            .to_string()
        };
        assert_eq!(
            record(Outcome::Passed, "5 tests"),
            "pass     emulator: 5 tests (2 s)"
        );
        let failures = (0..10).map(|number| format!("FAIL: {number}")).collect();
        let text = record(Outcome::Failed(failures), "");
        assert_eq!(text.lines().count(), 2 + SHOWN);
        assert!(text.ends_with("and 2 more"));
        assert_eq!(
            record(Outcome::NotApplicable("VT-d".into()), ""),
            "n/a      emulator: VT-d"
        );
    }
}
