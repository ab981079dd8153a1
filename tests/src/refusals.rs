//! Bad input: each ends with one clear sentence on the serial console and,
//! through xtask, a non-zero exit.

use crate::harness::{Case, Suite};
use anyhow::Result;

/// A guest whose kernel is never looked at.
const GUEST: &str = "[[vm]]\nname = \"a\"\nmemory = \"64M\"\nkernel = \"kernel\"\n";

pub fn add(suite: &mut Suite) {
    suite.add("refusals::no_configuration", no_configuration);
    suite.add("refusals::malformed", malformed);
    suite.add("refusals::unknown_key", unknown_key);
    suite.add("refusals::one_name_twice", one_name_twice);
    suite.add("refusals::one_cpu_twice", one_cpu_twice);
}

/// Boots `config` and looks for `words` in the sentence of the refusal.
fn refused(case: &mut Case, config: &str, words: &[&str]) -> Result<()> {
    let machine = case.machine().volume(config, &[("kernel", b"MZ")])?;
    case.refusal(machine, words)
}

fn no_configuration(case: &mut Case) -> Result<()> {
    let machine = case.machine().raw_volume(Vec::new())?;
    let seen = machine.limit(120).run()?;
    let sentence = seen.ending.sentence();
    case.check(
        "the missing file is named",
        sentence.starts_with("vireo.toml: ") && sentence.contains(r"\vireo"),
        format!("{:?}", seen.ending),
    );
    Ok(())
}

fn malformed(case: &mut Case) -> Result<()> {
    let config = format!("{GUEST}cmdline = quiet\n");
    refused(case, &config, &["vireo.toml:5:11: ", "must be quoted"])
}

fn unknown_key(case: &mut Case) -> Result<()> {
    let config = format!("{GUEST}colour = 1\n");
    refused(
        case,
        &config,
        &["vireo.toml:5:1: ", "`colour`", "expected one of"],
    )
}

fn one_name_twice(case: &mut Case) -> Result<()> {
    let config = format!("{GUEST}{GUEST}");
    refused(case, &config, &["vireo.toml:6:8: ", "second", "\"a\""])
}

fn one_cpu_twice(case: &mut Case) -> Result<()> {
    let other = GUEST.replace("\"a\"", "\"b\"");
    let config = format!("{GUEST}cpus = [1]\n{other}cpus = [1]\n");
    refused(case, &config, &["vireo.toml:10:8: ", "CPU 1", "\"a\""])
}
