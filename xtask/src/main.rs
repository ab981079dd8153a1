//! The command line: `cargo xtask build`, `image`, `run`, `test`, `bench`, `conformance`, `fuzz`.

#![forbid(unsafe_code)]

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use xtask::run::{self, GuestOptions};
use xtask::{bench, conformance, fuzz, test};

/// Builds Vireo, makes its disk image, and runs it
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the kernel and the EFI application around it
    Build {
        /// Build the small guests of the integration tests too
        #[arg(long)]
        guests: bool,
        /// Build a kernel that dies on demand, for the integration tests, into target/selftest
        #[arg(long)]
        selftest: bool,
    },
    /// Make a disk image to write to a USB stick
    Image {
        /// The image to write
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        #[command(flatten)]
        guest: GuestOptions,
    },
    /// Boot guests on an emulated PC and connect this terminal to their console
    ///
    /// On a terminal, Ctrl-] then q leaves and ends the machine. When standard input is not a
    /// terminal, it is the guest shell's input, and its end powers the guest off.
    /// VIREO_BOCHS and VIREO_QEMU name other emulator programs.
    Run(run::Options),
    /// Run the unit tests, then the integration tests, which boot machines
    ///
    /// Results are in target/tests too, as JUnit XML beside the machines' logs.
    Test(test::Options),
    /// Measure what VM exits and a Linux workload cost, in instructions on the emulator
    ///
    /// Fails where a row takes more than its ceiling in tests/budgets.toml.
    Bench(bench::Options),
    /// Run kvm-unit-tests, built elsewhere, and say which of its groups pass
    ///
    /// Results are in target/conformance too, as JUnit XML beside the machines' logs.
    Conformance(conformance::Options),
    /// Have a guest do random things, and see that it hurts nobody else
    ///
    /// Fails where the hypervisor panics or hangs, or ends the guest by a mistake of its own; says
    /// by what seed that is seen again. The machine's logs are in target/fuzz.
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<u8> {
    match command {
        Command::Build { guests, selftest } => {
            let built = if selftest {
                xtask::build::selftest()?
            } else {
                xtask::build::all()?
            };
            println!("{}", built.loader.display());
            if guests {
                for name in xtask::build::GUESTS {
                    println!("{}", xtask::build::guest(name)?.display());
                }
            }
            Ok(0)
        }
        Command::Image { output, guest } => run::make_image(&output, &guest).map(|()| 0),
        Command::Run(options) => run::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Conformance(options) => conformance::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
    }
}
