//! What is fetched from Debian: an invocation that is interrupted leaves
//! nothing broken, and what cannot be had is said in one sentence.

use crate::harness::{Case, Suite, xtask_program};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

/// An `apt-get` that begins to fetch the kernel and never gets on.
const STUCK: &str = "#!/bin/sh\necho half >half.deb\nexec sleep 1000\n";
/// One that has the kernel, and nothing else.
const KERNEL_ONLY: &str = r#"#!/bin/sh
case "$*" in *download*linux-image-1) ;; *) echo "E: Unable to locate it" >&2; exit 100 ;; esac
mkdir -p k/DEBIAN k/boot && echo kernel >k/boot/vmlinuz-1
printf 'Package: k\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n' >k/DEBIAN/control
dpkg-deb --build k >/dev/null && rm -r k
"#;
const APT_CACHE: &str = "#!/bin/sh\necho 'Depends: linux-image-1 (= 1)'\n";

pub fn add(suite: &mut Suite) {
    suite.add("fetching::interrupted", interrupted);
}

fn interrupted(case: &mut Case) -> Result<()> {
    let folder = case.folder().to_owned();
    program(&folder, "apt-cache", APT_CACHE)?;
    program(&folder, "apt-get", STUCK)?;
    let mut child = start(&folder)?;
    let provision = folder.join("target/provision");
    let half = provision.join("linux-image-1.archives/half.deb");
    until("the fetch has begun", || Ok(half.exists()))?;
    kill(Pid::from_raw(child.id().try_into()?), Signal::SIGINT)?;
    let status = child.wait()?;
    case.check_equal(
        "Ctrl-C ends it",
        status.signal(),
        Some(Signal::SIGINT as i32),
    );
    until("what it started ends too", || Ok(!is_used(&half)))?;

    program(&folder, "apt-get", KERNEL_ONLY)?;
    let status = start(&folder)?.wait()?;
    case.check_equal("a failure's status", status.code(), Some(1));
    let errors = fs::read_to_string(folder.join("errors"))?;
    let kernel = fs::read_to_string(provision.join("linux-image-1/boot/vmlinuz-1"));
    case.check_equal(
        "the next one fetches it whole",
        kernel.ok().as_deref(),
        Some("kernel\n"),
    );
    let sentence = errors.lines().last().unwrap_or_default();
    case.check(
        "and names what is missing",
        sentence.starts_with("error: cannot fetch the Debian package busybox-static"),
        &errors,
    );
    Ok(())
}

/// Puts a program into the folder that is first on the search path.
fn program(folder: &Path, name: &str, script: &str) -> Result<()> {
    let programs = folder.join("bin");
    fs::create_dir_all(&programs)?;
    let file = programs.join(name);
    fs::write(&file, script)?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// `cargo xtask run` that has nothing fetched yet, and heeds Ctrl-C also where these tests run in
/// a shell's background, and do not.
fn start(folder: &Path) -> Result<Child> {
    let mut path = OsString::from(folder.join("bin"));
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    Command::new("env")
        .arg("--default-signal=INT")
        .arg(xtask_program()?)
        .args(["run", "--exec", "true"])
        .env("PATH", path)
        .env("CARGO_TARGET_DIR", folder.join("target"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(folder.join("errors"))?)
        .spawn()
        .context("cannot start xtask")
}

fn until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Whether a process works in the folder of `file`.
fn is_used(file: &Path) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut folders =
        processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok());
    folders.any(|folder| Some(folder.as_path()) == file.parent())
}
