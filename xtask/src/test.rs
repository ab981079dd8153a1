//! `cargo xtask test`: the unit tests, then the integration tests.

use crate::paths;
use anyhow::{Context, Result};
use clap::Args;
use std::process::Command;

/// `cargo xtask test`
#[derive(Args, Debug)]
pub struct Options {
    /// Only tests whose name contains FILTER; `nested` selects those that are too slow otherwise
    filter: Option<String>,
    /// Only the integration tests
    #[arg(long)]
    machines: bool,
    /// Machines at once; what is left out is as many as there are CPUs
    #[arg(long, value_name = "NUMBER")]
    threads: Option<usize>,
    /// List the integration tests instead of running them
    #[arg(long)]
    list: bool,
}

/// Runs the command, and returns the exit code: not 0 where a test fails.
///
/// # Errors
/// When cargo does not start.
pub fn run(options: &Options) -> Result<u8> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(paths::root())
        .args([
            "run",
            "--locked",
            "--quiet",
            "--package",
            "vireo-tests",
            "--",
        ])
        .env("VIREO_XTASK", std::env::current_exe()?)
        .args(&options.filter)
        .args(
            options
                .threads
                .map(|number| format!("--test-threads={number}")),
        )
        .args(options.list.then_some("--list"));
    if options.machines {
        command.env("VIREO_NO_UNIT_TESTS", "1");
    }
    let status = command.status().context("cannot start cargo")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}
