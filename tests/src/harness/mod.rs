//! What every test needs: a machine's outcome, checks on it, and a journal.

mod journal;
mod machine;
mod unit;

pub use machine::{Ending, Input, Machine, Outcome, xtask_program};

use anyhow::Result;
use journal::{Journal, Record};
use libtest_mimic::{Arguments, Failed, Trial};
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use xtask::machine::nested_vmx;
use xtask::paths;
use xtask::progress::Progress;
use xtask::provision::Provisioner;

/// The module of the tests that run only where the filter names them.
const SLOW: &str = "nested";

/// All tests.
#[derive(Default)]
pub struct Suite {
    tests: Vec<Test>,
}

type Body = Box<dyn FnOnce(&mut Case) -> Result<()> + Send>;

struct Test {
    name: String,
    body: Body,
}

impl Suite {
    /// Adds a test that boots something.
    pub fn add(&mut self, name: &str, body: impl FnOnce(&mut Case) -> Result<()> + Send + 'static) {
        self.tests.push(Test {
            name: name.into(),
            body: Box::new(body),
        });
    }

    /// Runs what the command line selects (its filter, options as those of
    /// `cargo test`), as many machines at once as there are CPUs, and writes
    /// the journal. The unit tests come first, unless the environment has
    /// `VIREO_NO_UNIT_TESTS`.
    ///
    /// # Errors
    /// When what the tests share cannot be had, or the journal not be written.
    pub fn run(self) -> Result<ExitCode> {
        let arguments = Arguments::from_args();
        let journal = Arc::new(Journal::default());
        let filter = arguments.filter.as_deref().unwrap_or_default();
        let trials = self
            .tests
            .into_iter()
            .filter(|test| !test.name.starts_with(SLOW) || filter.contains(SLOW))
            .map(|test| test.trial(&journal))
            .collect();
        if arguments.list {
            return Ok(libtest_mimic::run(&arguments, trials).exit_code());
        }
        let mut units_pass = true;
        if std::env::var_os("VIREO_NO_UNIT_TESTS").is_none() {
            let start = Instant::now();
            let units = unit::run(arguments.filter.as_deref())?;
            units_pass = units.passed;
            journal.add("unit", start.elapsed(), units.records);
        }
        provide()?;
        let conclusion = libtest_mimic::run(&arguments, trials);
        let file = paths::target().join("tests/journal.xml");
        journal.write("vireo", &file)?;
        println!("journal: {}", file.display());
        Ok(if units_pass {
            conclusion.exit_code()
        } else {
            ExitCode::FAILURE
        })
    }
}

/// Fetches and builds what machines need, once and not in each of them.
fn provide() -> Result<()> {
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    provisioner.default_guest()?;
    provisioner.bare()?;
    provisioner.qemu()?;
    progress.clear();
    xtask::build::all()?;
    xtask::build::stopwatch()?;
    for name in xtask::build::GUESTS {
        xtask::build::guest(name)?;
    }
    if nested_vmx() {
        eprintln!("KVM offers VMX here: QEMU is the machine of most tests");
    }
    Ok(())
}

impl Test {
    fn trial(self, journal: &Arc<Journal>) -> Trial {
        let Self { name, body } = self;
        let journal = Arc::clone(journal);
        Trial::test(name.clone(), move || {
            let mut case = Case::new(&name)?;
            let start = Instant::now();
            if let Err(error) = body(&mut case) {
                case.records
                    .push(Record::new("ends as it should", Err(format!("{error:#}"))));
            }
            let failures = case.failures();
            journal.add(&name, start.elapsed(), case.records);
            if failures.is_empty() {
                Ok(())
            } else {
                Err(Failed::from(failures))
            }
        })
    }
}

/// One test while it runs.
pub struct Case {
    folder: PathBuf,
    machines: usize,
    records: Vec<Record>,
}

impl Case {
    /// With an empty folder of its own for logs and files.
    fn new(name: &str) -> Result<Self> {
        let folder = paths::target().join("tests").join(name.replace("::", "-"));
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        Ok(Self {
            folder,
            machines: 0,
            records: Vec::new(),
        })
    }

    /// Where the test may write.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A machine, to be configured and run.
    pub fn machine(&mut self) -> Machine {
        self.machines += 1;
        Machine::new(&self.folder.join(format!("machine-{}", self.machines)))
    }

    /// A result that some machine reports itself.
    pub fn record(&mut self, name: &str, result: Result<(), String>) {
        self.records.push(Record::new(name, result));
    }

    /// Checks something about what was seen; `found` is shown where it is not so.
    pub fn check(&mut self, name: &str, ok: bool, found: impl Display) {
        self.record(name, if ok { Ok(()) } else { Err(found.to_string()) });
    }

    /// Checks that two values are equal.
    pub fn check_equal<T: PartialEq + std::fmt::Debug>(
        &mut self,
        name: &str,
        actual: T,
        expected: T,
    ) {
        let found = format!("{actual:?} instead of {expected:?}");
        self.check(name, actual == expected, found);
    }

    /// Runs `machine`, and checks that it ends with one sentence, in which are
    /// `words`.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn refusal(&mut self, machine: Machine, words: &[&str]) -> Result<()> {
        let seen = machine.limit(120).run()?;
        for word in words {
            self.check(
                &format!("the sentence has: {word}"),
                seen.ending.sentence().contains(word),
                format!("{:?}", seen.ending),
            );
        }
        let said = seen.console.matches("vireo: error: ").count();
        self.check_equal("it is said once", said, 1);
        Ok(())
    }

    /// What failed, for the user, with the place of the logs.
    fn failures(&self) -> String {
        let mut text: String = self
            .records
            .iter()
            .filter_map(|record| Some(format!("{}: {}\n", record.name, record.failure()?)))
            .collect();
        if !text.is_empty() {
            text += &format!("logs: {}", self.folder.display());
        }
        text
    }
}
