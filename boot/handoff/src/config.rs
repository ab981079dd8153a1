//! The configuration: which guests there are and what each is given.
//!
//! The file is `\vireo\vireo.toml` on the boot volume. Paths in it are relative
//! to its folder. An example that names every key stands in the README.

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The guests, in the order of the file.
    pub vm: Vec<Vm>,
}

/// One `[[vm]]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// 1 to 31 letters, digits, `-` or `_`; unique.
    pub name: String,
    /// Bytes of RAM, a multiple of 2 MiB. Written as `"256M"`, `"1G"` or a number of bytes.
    pub memory: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// What is booted.
    pub kernel: String,
    /// Initial RAM disk.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: String,
}
