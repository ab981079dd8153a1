//! The default guest, and what is laid over a guest's initrd so that it runs a
//! command or takes piped input.
//!
//! The default guest is Debian's cloud kernel as packaged and an initramfs
//! with busybox and the script [`INIT`]. An overlay is a second archive in
//! front of the initrd: in front, because the kernel's LZ4 reader takes what
//! follows a compressed archive for another chunk of it.

use crate::cpio::Archive;

/// The command line of the default guest. Each option saves boot time
/// (console output, self-tests, a certificate list, tracers); none of them
/// works around the hypervisor or the emulated CPU.
pub const CMDLINE: &str = "quiet loglevel=1 console=ttyS0,115200 nokaslr mitigations=off panic=-1 \
     no_timer_check random.trust_cpu=on lsm=capability cryptomgr.notests \
     initcall_blacklist=load_system_certificate_list,init_blk_tracer,init_kprobe_trace";

/// Bytes of memory of the default guest.
pub const MEMORY: u64 = 256 << 20;

/// First process of the default guest: a shell with job control on the
/// console, and power-off when it ends.
const INIT: &str = r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
[ -r /vireo/terminal ] && . /vireo/terminal
cd /root
grep -qw hypervisor /proc/cpuinfo && whose=', a guest of Vireo'
echo "Linux $(uname -r)$whose. 'exit' powers it off."
setsid cttyhack sh -l
poweroff -f
"#;

/// What the first process of a guest that runs a command or takes piped input
/// becomes (see `stopwatch`): the other side of `framing.rs`. `@BUSYBOX@`, `@NONCE@` and `@SHELL@` are
/// replaced.
///
/// The command writes into a pipe, not to the console, so that it formats as
/// for a file (`ls` in one column, no colours). The last `stty` returns when
/// the UART has sent everything.
const JOB: &str = r#"#!@BUSYBOX@ sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/vireo/bin HOME=/root
busybox=@BUSYBOX@
nonce=@NONCE@
[ -d /proc/self ] || { $busybox mkdir -p /proc; $busybox mount -t proc proc /proc; }
[ -d /sys/kernel ] || { $busybox mkdir -p /sys; $busybox mount -t sysfs sysfs /sys; }
[ -c /dev/null ] || $busybox mount -t devtmpfs devtmpfs /dev
exec 3<>/dev/console
exec <&3 >&3 2>&3
$busybox stty raw -echo
$busybox dmesg -n 1
cd /root 2>/dev/null || cd /
mark() { printf '\001vireo-%s-%s\001' $nonce "$1" >&3; }
feed() {
    while mark more && read -r line <&3 && [ "$line" != . ]; do
        printf %s "$line" | $busybox base64 -d
    done
}
[ -n "$1" ] && mark "init:$1"
mark begin
feed | {
    { @SHELL@ 2>&1 3>&-; echo $? >/vireo/status; } | $busybox cat
    read -r status </vireo/status
    mark "end:$status"
    $busybox stty raw -echo <&3
    $busybox poweroff -f
}
"#;

/// The initramfs of the default guest: `busybox` and a link for each of its
/// `applets`.
pub fn initramfs(busybox: &[u8], applets: &[String]) -> Vec<u8> {
    let mut archive = Archive::new();
    for directory in [
        "bin", "sbin", "usr", "usr/bin", "usr/sbin", "dev", "etc", "proc", "root", "sys", "tmp",
    ] {
        archive.directory(directory);
    }
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("bin/busybox", 0o755, busybox);
    for applet in applets.iter().filter(|applet| *applet != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    lz4_legacy(&archive.finish())
}

/// What the guest's shell is to do, and where its busybox comes from.
pub struct Exec<'a> {
    /// Goes into the markers, see `framing.rs`: letters and digits.
    pub nonce: &'a str,
    /// The shell script to run; without one, the shell reads the input.
    pub command: Option<&'a str>,
    /// Programs on its search path, by name.
    pub programs: &'a [(&'a str, &'a [u8])],
    /// The first process, which starts the script that does all this; without one, the script
    /// is the first process.
    pub stopwatch: Option<&'a [u8]>,
    /// Busybox and its applets, for an initrd that is not ours.
    pub busybox: Option<(&'a [u8], &'a [String])>,
}

/// The archive to put in front of an initrd, whose first process is then
/// `/vireo/init` (see [`exec_cmdline`]).
pub fn exec_overlay(exec: &Exec) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.directory("vireo");
    archive.directory("vireo/bin");
    let busybox = if exec.busybox.is_some() {
        "/vireo/busybox"
    } else {
        "/bin/busybox"
    };
    let shell = if exec.command.is_some() {
        format!("{busybox} sh /vireo/command")
    } else {
        format!("{busybox} sh")
    };
    let job = JOB
        .replace("@BUSYBOX@", busybox)
        .replace("@NONCE@", exec.nonce)
        .replace("@SHELL@", &shell);
    archive.file(
        "vireo/init",
        0o755,
        exec.stopwatch.unwrap_or(job.as_bytes()),
    );
    archive.file("vireo/job", 0o755, job.as_bytes());
    if let Some(command) = exec.command {
        archive.file("vireo/command", 0o644, format!("{command}\n").as_bytes());
    }
    for (name, contents) in exec.programs {
        archive.file(&format!("vireo/bin/{name}"), 0o755, contents);
    }
    if let Some((contents, applets)) = exec.busybox {
        archive.file("vireo/busybox", 0o755, contents);
        for applet in applets {
            archive.symlink(&format!("vireo/bin/{applet}"), "../busybox");
        }
    }
    archive.finish()
}

/// The archive that tells the default guest's shell about the user's terminal.
pub fn terminal_overlay(columns: u16, rows: u16, name: &str) -> Vec<u8> {
    let known = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    let name = if !name.is_empty() && name.chars().all(known) {
        name
    } else {
        "vt100"
    };
    let mut archive = Archive::new();
    archive.directory("vireo");
    let script = format!("stty columns {columns} rows {rows}\nexport TERM={name}\n");
    archive.file("vireo/terminal", 0o644, script.as_bytes());
    archive.finish()
}

/// The command line with `/vireo/init` as first process and the serial port
/// as a console. What follows `--` belongs to the first process and stays
/// behind.
pub fn exec_cmdline(cmdline: &str) -> String {
    let mut words: Vec<&str> = cmdline.split_whitespace().collect();
    let end = words
        .iter()
        .position(|word| *word == "--")
        .unwrap_or(words.len());
    words.insert(end, "rdinit=/vireo/init");
    if !words[..end]
        .iter()
        .any(|word| word.starts_with("console=ttyS0"))
    {
        words.insert(end, "console=ttyS0,115200");
    }
    words.join(" ")
}

/// LZ4 in the legacy frame format that Linux reads: a magic number, then
/// blocks of at most 8 MiB of contents, each behind its compressed length.
/// Source: "LZ4 Frame Format Description", section "Legacy frame".
pub(crate) fn lz4_legacy(contents: &[u8]) -> Vec<u8> {
    let mut frame = 0x184c_2102_u32.to_le_bytes().to_vec();
    for block in contents.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        frame.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        frame.extend_from_slice(&packed);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_process_is_set_before_its_own_arguments() {
        assert_eq!(
            exec_cmdline("quiet console=ttyS0 -- a b"),
            "quiet console=ttyS0 rdinit=/vireo/init -- a b"
        );
        assert_eq!(exec_cmdline(""), "console=ttyS0,115200 rdinit=/vireo/init");
    }

    #[test]
    fn the_legacy_frame_unpacks_to_its_contents() {
        let contents: Vec<u8> = (0..9 << 20).map(|n: u32| (n / 7) as u8).collect();
        let frame = lz4_legacy(&contents);
        assert_eq!(frame[..4], [0x02, 0x21, 0x4c, 0x18]);
        let mut rest = &frame[4..];
        let mut unpacked = Vec::new();
        while let Some((length, tail)) = rest.split_first_chunk() {
            let (block, tail) = tail.split_at(u32::from_le_bytes(*length) as usize);
            unpacked.extend(lz4_flex::block::decompress(block, 8 << 20).unwrap());
            rest = tail;
        }
        assert!(unpacked == contents);
    }

    #[test]
    fn the_overlay_leaves_no_placeholder_and_keeps_the_command() {
        let command = "echo '@' \"$HOME\"\nfalse";
        let exec = Exec {
            nonce: "n0",
            command: Some(command),
            programs: &[("tool", b"\x7fELF tool")],
            stopwatch: Some(b"\x7fELF"),
            busybox: Some((b"\x7fELF", &["sh".into()])),
        };
        let overlay = exec_overlay(&exec);
        let text = String::from_utf8_lossy(&overlay);
        assert!(text.contains(command));
        assert!(text.contains("vireo/bin/tool\0") && text.contains("\x7fELF tool"));
        assert!(text.starts_with("070701") && text.contains("#!/vireo/busybox sh\n"));
        for placeholder in ["@BUSYBOX@", "@NONCE@", "@SHELL@"] {
            assert!(!text.contains(placeholder));
        }
    }

    #[test]
    fn a_strange_terminal_name_does_not_reach_the_shell() {
        let overlay = terminal_overlay(80, 24, "x; reboot");
        let text = String::from_utf8_lossy(&overlay);
        assert!(text.contains("TERM=vt100") && text.contains("columns 80 rows 24"));
    }
}
