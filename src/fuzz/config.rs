//! Configuration files that are nearly right.

use super::{Random, repeat};
use vireo_handoff::config::Config;

const GOOD: &str = "[[vm]]\nname = \"good\"\nmemory = \"64M\"\nkernel = \"vmlinuz\"\n";
const PARTS: [&str; 38] = [
    "[[vm]]\n",
    "[[vm]]\n",
    "[vm]\n",
    "vm = 1\n",
    "name = \"a\"\n",
    "name = \"b\"\n",
    "name = \"\"\n",
    "memory = \"256M\"\n",
    "memory = \"99999999999999999999G\"\n",
    "memory = \"18446744073709551615G\"\n",
    "memory = 2097152\n",
    "memory = -1\n",
    "memory = \"\u{e4}M\"\n",
    "kernel = \"vmlinuz\"\n",
    "kernel = \"../vmlinuz\"\n",
    "firmware = \"bios.bin\"\n",
    "initrd = \"initrd.img\"\n",
    "modules = [{ file = \"m\", cmdline = \"a=b\" }]\n",
    "modules = [{ file = 1 }]\n",
    "protocol = \"multiboot\"\n",
    "cmdline = \"console=ttyS0\"\n",
    "cmdline = '''\n\n'''\n",
    "vcpus = 2\n",
    "vcpus = 9223372036854775807\n",
    "apic = \"apicv\"\n",
    "cpus = [1]\n",
    "cpus = [1, 1, 4294967296]\n",
    "cpus = \"shared\"\n",
    "priority = 255\n",
    "priority = 1e400\n",
    "slice_us = 100\n",
    "after = \"a\"\n",
    "after = \"b\"\n",
    "serial = \"com2\"\n",
    "on_reboot = \"restart\"\n",
    "statistics = \"times\"\n",
    "test_device = true\n",
    "# \u{1f980}\n",
];

fn text(random: &mut Random) -> String {
    let mut text = String::from(random.pick(&["", GOOD, GOOD, GOOD]));
    for _ in 0..random.below(6) {
        text += random.pick(&PARTS);
    }
    let mut bytes = text.into_bytes();
    for _ in 0..random.below(3) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        match random.below(4) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next() as u8),
            2 if at < bytes.len() => bytes[at] = random.next() as u8,
            _ if at < bytes.len() => drop(bytes.remove(at)),
            _ => {}
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn no_configuration_makes_its_reader_panic() {
    let mut accepted = 0;
    repeat("config", 6000, |random| {
        match Config::parse("vireo.toml", &text(random)) {
            Ok(config) => {
                accepted += 1;
                assert!(config.files().len() < 100);
            }
            Err(error) => {
                let sentence = error.to_string();
                assert!(sentence.starts_with("vireo.toml"), "{sentence}");
            }
        }
    });
    assert!(accepted > 0);
}
