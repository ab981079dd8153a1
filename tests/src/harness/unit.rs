//! The unit tests: `cargo test`, with its results in the journal too.

use super::journal::Record;
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use xtask::paths;

/// What came of the unit tests.
pub struct Units {
    pub records: Vec<Record>,
    /// All have passed, and all have been built.
    pub passed: bool,
}

/// Runs those whose name contains `filter`, and the models of what is lock-free, and shows what
/// they print.
///
/// # Errors
/// When cargo does not start.
pub fn run(filter: Option<&str>) -> Result<Units> {
    let mut units = cargo(|command| command.args(filter))?;
    // Another configuration, which has a folder of its own. A module of that name has the models.
    if filter.is_none_or(|filter| "models".contains(filter)) {
        let folder = paths::target().join("loom");
        let models = cargo(|command| {
            command
                .env("RUSTFLAGS", "--cfg loom")
                .arg("--target-dir")
                .arg(folder)
                .args(["--package", "vireo", "--lib"])
                // As in the workspace, where others ask for it.
                .args(["--features", "vireo-handoff/toml", "models"])
        })?;
        units.records.extend(models.records);
        units.passed &= models.passed;
    }
    Ok(units)
}

/// Runs `cargo test` with what `more` adds.
fn cargo(more: impl FnOnce(&mut Command) -> &mut Command) -> Result<Units> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(paths::root())
        .args(["test", "--locked", "--no-fail-fast"]);
    let mut child = more(&mut command)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut records = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line.context("cannot read cargo's output")?;
        println!("{line}");
        records.extend(parse(&line));
    }
    Ok(Units {
        records,
        passed: child.wait()?.success(),
    })
}

/// The result in a line of the standard test harness.
fn parse(line: &str) -> Option<Record> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    match result {
        "ok" => Some(Record::new(name, Ok(()))),
        "FAILED" => Some(Record::new(name, Err("see the output of the run".into()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_from_lines() {
        let good = parse("test vmx::ept::tests::maps - should panic ... ok").unwrap();
        assert_eq!(good.name, "vmx::ept::tests::maps - should panic");
        assert_eq!(good.failure(), None);
        assert!(parse("test a::b ... FAILED").unwrap().failure().is_some());
        assert!(parse("test a::b ... ignored").is_none());
        assert!(parse("test result: ok. 3 passed; 0 failed").is_none());
    }
}
