//! Builds the kernel and the loader, which are freestanding, and the programs of tests.
//!
//! No freestanding target can be had for the pinned toolchain (see
//! `rust-toolchain.toml`), so both use the host target's prebuilt `core` and
//! `alloc` with flags that turn the differences off. The flags are passed
//! together with an explicit `--target`, which keeps them from build scripts
//! and procedural macros, and the output has a directory of its own.

use crate::machine::bound_command;
use crate::{inspect, paths, pe};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::Stdio;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What keeps the kernel and the small guests from the FPU. The loader needs
/// none of it: UEFI gives it SSE (2.10, 2.3.4).
///
/// Without SSE, rustc warns that the ABI of the target "must" have it and that
/// this will become an error one day. That is harmless here: no float or
/// vector crosses a function boundary, `inspect.rs` proves it after linking,
/// and the toolchain is pinned. `x86_64-unknown-none` replaces these flags the
/// day that target is at hand. [`cargo`] drops the warning.
const NO_SSE: &str = "-Ctarget-feature=-sse,-sse2";

/// Flags of all freestanding code.
const FREESTANDING: &[&str] = &[
    "-Cno-redzone=yes",
    "-Cforce-frame-pointers=yes",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-nostartfiles",
];

/// The warning that [`NO_SSE`] causes.
const KNOWN_WARNING: &str =
    "must be enabled to ensure that the ABI of the current target can be implemented correctly";

/// What a build produces.
pub struct Built {
    /// The kernel, an ELF file with symbols and line tables.
    pub kernel: PathBuf,
    /// The loader with the kernel in it: an EFI application.
    pub loader: PathBuf,
    /// Bytes of the kernel's loaded segments.
    pub size: u64,
}

/// Builds the kernel, checks it, and builds the loader around it.
///
/// # Errors
/// When something does not compile, or the kernel breaks a rule of
/// [`inspect`].
pub fn all() -> Result<Built> {
    hypervisor(&output_folder(), "bare")
}

/// As [`all`], with a kernel that dies on demand (`src/host/selftest.rs`), in
/// an output folder of its own.
///
/// # Errors
/// As [`all`].
pub fn selftest() -> Result<Built> {
    hypervisor(&paths::target().join("selftest"), "bare,selftest")
}

fn hypervisor(folder: &Path, features: &str) -> Result<Built> {
    let root = paths::root();
    let script = format!("-Clink-arg=-T{}", root.join("linker.ld").display());
    let flags = [
        NO_SSE,
        // The kernel is linked into the top 2 GiB.
        "-Ccode-model=kernel",
        "-Crelocation-model=static",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        &script,
    ];
    let kernel = Program {
        folder,
        package: "vireo",
        name: "vireo",
    }
    .build(&["--features", features], &flags, &[])?;
    let size = inspect::kernel(&paths::read(&kernel)?)?;
    eprintln!(
        "kernel: {} KiB, no FPU, MMX, SSE or AVX instruction",
        size.div_ceil(1024)
    );
    let program = Program {
        folder,
        package: "vireo-boot",
        name: "vireo-boot",
    };
    let loader = efi_application(&program, &[("VIREO_KERNEL", &kernel)], "BOOTX64.EFI")?;
    Ok(Built {
        kernel,
        loader,
        size,
    })
}

/// As [`all`], with a kernel that counts VMREADs and VMWRITEs (`src/vmx/count.rs`), in
/// an output folder of its own.
///
/// # Errors
/// As [`all`].
pub fn counting() -> Result<Built> {
    hypervisor(&paths::target().join("count-vmcs"), "bare,count-vmcs")
}

/// Builds the EFI application that locks VT-x off and starts the loader.
///
/// # Errors
/// When it does not compile.
pub fn locking_firmware() -> Result<PathBuf> {
    let program = Program {
        folder: &output_folder(),
        package: "vireo-test-firmware",
        name: "vmx-locked-off",
    };
    efi_application(&program, &[], "LOCK.EFI")
}

/// Builds a program and makes an EFI application of it, called `file`.
fn efi_application(program: &Program, env: &[(&str, &Path)], file: &str) -> Result<PathBuf> {
    let flags = [
        "-Crelocation-model=pic",
        "-Clink-arg=-static-pie",
        // What `uefi::entry` defines.
        "-Clink-arg=-Wl,-e,efi_main",
        "-Clink-arg=-Wl,-z,norelro",
    ];
    let elf = program.build(&["--features", "bare"], &flags, env)?;
    let application = pe::convert(&paths::read(&elf)?)
        .with_context(|| format!("cannot make an EFI application of {}", program.name))?;
    let path = program.folder.join(file);
    paths::write(&path, &application)?;
    Ok(path)
}

/// The small guests: the programs in `tests/guests`.
pub const GUESTS: [&str; 19] = [
    "pc",
    "triple",
    "vmxon",
    "unmapped",
    "hang",
    "spin",
    "storm",
    "turns",
    "reset",
    "bench",
    "delivery",
    "fpu_mmio",
    "echo",
    "test_device",
    "multiboot",
    "suspend",
    "emulation",
    "tasks",
    "fuzz",
];

/// Builds the small guest `name`, one of the programs in `tests/guests`.
///
/// # Errors
/// When it does not compile.
pub fn guest(name: &str) -> Result<PathBuf> {
    let script = format!(
        "-Clink-arg=-T{}",
        paths::root().join("tests/guests/linker.ld").display()
    );
    let flags = [
        NO_SSE,
        "-Crelocation-model=static",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        &script,
    ];
    let program = Program {
        folder: &output_folder(),
        package: "vireo-test-guests",
        name,
    };
    program.build(&["--features", "bare"], &flags, &[])
}

/// Builds the first process of guests with a job, a static Linux program.
///
/// # Errors
/// When it does not compile.
pub fn stopwatch() -> Result<PathBuf> {
    let flags = [
        "-Crelocation-model=static",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        "-Cstrip=symbols",
    ];
    let program = Program {
        folder: &output_folder(),
        package: "vireo-stopwatch",
        name: "stopwatch",
    };
    program.build(&[], &flags, &[])
}

/// Builds the benchmark's workload, a static Linux program.
///
/// # Errors
/// When it does not compile.
pub fn workload() -> Result<PathBuf> {
    let flags = [
        "-Ctarget-feature=+crt-static",
        "-Crelocation-model=static",
        "-Cstrip=symbols",
    ];
    let program = Program {
        folder: &output_folder(),
        package: "vireo-workload",
        name: "workload",
    };
    program.build_hosted(&[], &flags, &[])
}

fn output_folder() -> PathBuf {
    paths::target().join("bare")
}

/// A program to build.
struct Program<'a> {
    /// Cargo's target directory for it.
    folder: &'a Path,
    package: &'a str,
    name: &'a str,
}

impl Program<'_> {
    /// Builds freestanding code and returns where it is.
    fn build(&self, options: &[&str], flags: &[&str], env: &[(&str, &Path)]) -> Result<PathBuf> {
        self.build_hosted(options, &[FREESTANDING, flags].concat(), env)
    }

    /// Builds a program with these flags alone and returns where it is.
    fn build_hosted(
        &self,
        options: &[&str],
        flags: &[&str],
        env: &[(&str, &Path)],
    ) -> Result<PathBuf> {
        let Self {
            folder,
            package,
            name,
        } = *self;
        let terminal = std::io::stderr().is_terminal();
        let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = bound_command(Path::new(&program));
        command
            .current_dir(paths::root())
            .args([
                "build",
                "--release",
                "--target",
                TARGET,
                "--package",
                package,
                "--bin",
                name,
            ])
            .args(options)
            .arg("--target-dir")
            .arg(folder)
            .arg(if terminal {
                "--message-format=json-diagnostic-rendered-ansi"
            } else {
                "--message-format=json"
            })
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env_remove("RUSTFLAGS")
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        if !terminal {
            command.arg("--quiet");
        }
        let mut child = command.spawn().context("cannot start cargo")?;
        let output = child.stdout.take().context("cargo has no output")?;
        let mut program = None;
        for line in BufReader::new(output).lines() {
            let message: Value = serde_json::from_str(&line?).unwrap_or_default();
            match message["reason"].as_str() {
                Some("compiler-message") => show(&message["message"]),
                Some("compiler-artifact") if message["target"]["name"] == name => {
                    program = message["executable"]
                        .as_str()
                        .map(PathBuf::from)
                        .or(program);
                }
                _ => {}
            }
        }
        ensure!(
            child.wait()?.success(),
            "{package} does not build: see the messages above"
        );
        let Some(program) = program else {
            bail!("cargo has built {package} but names no program {name}")
        };
        Ok(program)
    }
}

/// Prints a diagnostic, unless it is the one that the flags cause.
fn show(message: &Value) {
    let text = message["message"].as_str().unwrap_or_default();
    if text.contains(KNOWN_WARNING) || text.ends_with("warning emitted") {
        return;
    }
    if let Some(rendered) = message["rendered"].as_str() {
        eprint!("{rendered}");
    }
}
