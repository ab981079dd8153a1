//! Jobs in the default guest, booted directly by QEMU: the scripts in the
//! guest and the framing of its console, without a hypervisor between them.
//!
//! They fetch packages and boot Linux, so they run on request:
//! `cargo test -p xtask --test jobs -- --ignored`.

use anyhow::Result;
use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};
use xtask::framing::{BLOCK, Event, Framer, input_line};
use xtask::machine::{Machine, MachineConfig, bound_command};
use xtask::paths;
use xtask::progress::Progress;
use xtask::provision::Provisioner;
use xtask::volume::{Job, Single, Volume};

const NONCE: &str = "0123abcd";

/// Boots a guest with a job and returns its output and status. With
/// `own_kernel`, the guest has no initrd but what the job brings.
fn boot(
    name: &str,
    command: Option<&str>,
    input: &[u8],
    own_kernel: bool,
) -> Result<(Vec<u8>, i32)> {
    let folder = std::env::temp_dir().join(format!("vireo-job-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let progress = Progress::new();
    let provisioner = Provisioner::new(&progress);
    let kernel = provisioner.default_guest()?.kernel;
    let single = match own_kernel {
        true => Single {
            kernel: Some(&kernel),
            cmdline: Some("quiet"),
            ..Single::default()
        },
        false => Single::default(),
    };
    let volume = Volume::single(
        &single,
        Some(&Job {
            nonce: NONCE,
            command,
        }),
        None,
        &provisioner,
    )?;
    let mut cmdline = String::new();
    for file in volume.into_files(Vec::new()) {
        let name = file.path.rsplit('/').next().unwrap_or_default();
        fs::write(folder.join(name), &file.contents)?;
        if name == "vireo.toml" {
            let config: toml::Table = String::from_utf8(file.contents)?.parse()?;
            cmdline = config["vm"][0]["cmdline"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
        }
    }
    let qemu = paths::find_program("qemu-system-x86_64").expect("QEMU is installed");
    let config = MachineConfig::new(&folder.join("kernel"), &folder, 256 << 20);
    let machine = Machine::start(&config, |port| {
        let mut command = bound_command(&qemu);
        command
            .args([
                "-m", "256M", "-cpu", "max", "-display", "none", "-monitor", "none", "-nic", "none",
            ])
            .args([
                "-kernel", "kernel", "-initrd", "initrd", "-append", &cmdline,
            ])
            .args([
                "-chardev",
                &format!("socket,id=com1,host=127.0.0.1,port={port}"),
                "-serial",
                "chardev:com1",
            ]);
        Ok(command)
    })?;
    let result = converse(machine, input);
    fs::remove_dir_all(folder)?;
    result
}

/// Feeds the input and collects the output, until the guest is off.
fn converse(machine: Machine, input: &[u8]) -> Result<(Vec<u8>, i32)> {
    let mut serial = machine.serial();
    serial.set_read_timeout(Some(Duration::from_secs(60)))?;
    let start = Instant::now();
    let mut framer = Framer::new(NONCE);
    let mut blocks = input.chunks(BLOCK);
    let (mut output, mut status) = (Vec::new(), None);
    let mut buffer = [0; 4096];
    while start.elapsed() < Duration::from_secs(120) {
        let count = serial.read(&mut buffer)?;
        if count == 0 {
            return Ok((output, status.expect("the shell ended before the machine")));
        }
        for event in framer.push(&buffer[..count]) {
            match event {
                Event::Begin => {}
                Event::Output(bytes) => output.extend(bytes),
                Event::More => serial.write_all(&input_line(blocks.next()))?,
                Event::End(code) => status = Some(code),
            }
        }
    }
    anyhow::bail!("the guest does not power off")
}

#[test]
#[ignore = "boots Linux in QEMU"]
fn output_is_exact_and_the_status_is_the_commands() {
    let command = "printf 'a\\nb\\r\\n\\001\\377'; cd /proc; ls -d s* | head -n 2; exit 7";
    let (output, status) = boot("exact", Some(command), b"", false).unwrap();
    let text = String::from_utf8_lossy(&output);
    assert!(output.starts_with(b"a\nb\r\n\x01\xff"), "{text}");
    assert_eq!(
        (output[7..].split(|byte| *byte == b'\n').count(), status),
        (3, 7),
        "{text}"
    );
}

#[test]
#[ignore = "boots Linux in QEMU"]
fn piped_input_is_a_script_and_its_end_powers_off() {
    let (output, status) = boot(
        "script",
        None,
        b"uname\nx=\"the  line\"\necho \"$x\"; (exit 3)\n",
        false,
    )
    .unwrap();
    assert_eq!(
        (String::from_utf8_lossy(&output).as_ref(), status),
        ("Linux\nthe  line\n", 3)
    );
}

#[test]
#[ignore = "boots Linux in QEMU"]
fn binary_input_passes_through_unchanged() {
    let input: Vec<u8> = (0..20_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let (output, status) = boot("binary", Some("cat"), &input, false).unwrap();
    assert!(
        output == input && status == 0,
        "{} bytes of {}",
        output.len(),
        input.len()
    );
}

#[test]
#[ignore = "boots Linux in QEMU"]
fn a_guest_without_a_busybox_of_its_own_gets_one() {
    let (output, status) = boot("own", Some("id -u; ls /bin/sh"), b"", true).unwrap();
    assert!(
        output.starts_with(b"0\n") && status != 0,
        "{}",
        String::from_utf8_lossy(&output)
    );
}
