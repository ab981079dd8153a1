//! The configuration and the files that it names, from the boot volume.

use crate::console::say;
use crate::kernel::{PAGE, pages};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use uefi::boot::{self, ScopedProtocol};
use uefi::proto::media::file::{Directory, File as _, FileAttribute, FileInfo, FileMode};
use uefi::proto::media::fs::SimpleFileSystem;
use uefi::{CString16, Status};
use vireo_handoff::config::Vm;
use vireo_handoff::image::{self, ImageError};
use vireo_handoff::{Config, File};

/// The configuration's file, in the folder of all files.
const CONFIG: &str = "vireo.toml";
/// A longer configuration is a mistake, in bytes.
const LONGEST_CONFIG: u64 = 1 << 20;

/// The boot volume.
pub struct Volume {
    root: Directory,
    /// Keeps the file system open.
    _volume: ScopedProtocol<SimpleFileSystem>,
}

impl Volume {
    /// The volume that the loader was read from.
    ///
    /// # Errors
    /// A sentence.
    pub fn open() -> Result<Self, String> {
        let unreadable = |error| format!("the boot volume cannot be read: {error}");
        let mut volume = boot::get_image_file_system(boot::image_handle()).map_err(unreadable)?;
        let root = volume.open_volume().map_err(unreadable)?;
        Ok(Self {
            root,
            _volume: volume,
        })
    }

    /// Reads `\vireo\name`; `room` gives the place for so many bytes.
    fn read(
        &mut self,
        name: &str,
        room: impl FnOnce(u64) -> Result<&'static mut [u8], String>,
    ) -> Result<&'static mut [u8], String> {
        let path = format!("\\vireo\\{}", name.replace('/', "\\"));
        let path = CString16::try_from(path.as_str())
            .map_err(|_| format!("{name}: is no name for a file on the boot volume"))?;
        let file = self
            .root
            .open(&path, FileMode::Read, FileAttribute::empty())
            .map_err(|error| match error.status() {
                Status::NOT_FOUND => format!(
                    "{name}: is not in the folder \\vireo of the boot volume; put the file there"
                ),
                status => format!("{name}: cannot be read from the boot volume: {status}"),
            })?;
        let mut file = file
            .into_regular_file()
            .ok_or_else(|| format!("{name}: is a folder of the boot volume, and no file"))?;
        let broken = |status| format!("{name}: cannot be read from the boot volume: {status}");
        let size = file
            .get_boxed_info::<FileInfo>()
            .map_err(|error| broken(error.status()))?
            .file_size();
        let place = room(size)?;
        let read = file.read(place).map_err(|error| broken(error.status()))?;
        if read as u64 != size {
            return Err(format!(
                "{name}: has {size} bytes on the boot volume, and only {read} can be read; copy it again"
            ));
        }
        Ok(place)
    }

    /// The checked configuration.
    ///
    /// # Errors
    /// A sentence that begins with the file's name and, where there is one,
    /// the place in it.
    pub fn config(&mut self) -> Result<Config, String> {
        let text = self.read(CONFIG, |size| {
            if size > LONGEST_CONFIG {
                return Err(format!(
                    "{CONFIG}: has {size} bytes; expected a text of at most {LONGEST_CONFIG}"
                ));
            }
            Ok(Vec::leak(alloc::vec![0; size as usize]))
        })?;
        let text = core::str::from_utf8(text)
            .map_err(|_| format!("{CONFIG}: is not text; expected TOML in UTF-8"))?;
        Config::parse(CONFIG, text).map_err(|error| error.to_string())
    }

    /// Reads what the guests need, each file once.
    ///
    /// # Errors
    /// A sentence that begins with the file's name.
    pub fn files(&mut self, config: &Config) -> Result<Vec<File>, String> {
        let mut files = Vec::new();
        for name in config.files() {
            let users: Vec<&Vm> = config
                .vm
                .iter()
                .filter(|vm| vm.files().any(|file| file == name))
                .collect();
            let data = self.read(name, |size| room(name, size, &users))?;
            say(format_args!(
                "loader: {name}, {} KiB",
                data.len().div_ceil(1024)
            ));
            for vm in &config.vm {
                check(vm, name, data).map_err(|error| format!("{name}: {error}"))?;
            }
            files.push(File {
                name: name.to_string(),
                start: data.as_ptr() as u64,
                len: data.len() as u64,
            });
        }
        Ok(files)
    }
}

/// Checks `data`, the file called `name`, for what `vm` wants of it.
fn check(vm: &Vm, name: &str, data: &[u8]) -> Result<(), ImageError> {
    if vm.firmware.as_deref() == Some(name) {
        return image::check_firmware(data);
    }
    // What firmware does with a kernel is its own matter.
    if vm.firmware.is_none() && vm.kernel.as_deref() == Some(name) {
        return image::check(data, vm.protocol);
    }
    Ok(())
}

/// Whole pages for a file of the guests `users`.
fn room(name: &str, size: u64, users: &[&Vm]) -> Result<&'static mut [u8], String> {
    if let Some(vm) = users.iter().find(|vm| vm.memory < size) {
        return Err(format!(
            "{name}: has {} MiB, and the vm {} has {} MiB of memory; raise `memory` in {CONFIG}",
            size.div_ceil(1 << 20),
            vm.name,
            vm.memory >> 20
        ));
    }
    let start = pages(size.div_ceil(PAGE).max(1) as usize).ok_or_else(|| {
        format!(
            "{name}: has {} MiB, and so much memory is not free in this machine; add memory to it",
            size.div_ceil(1 << 20)
        )
    })?;
    // SAFETY: the pages were just allocated, are as long as the file, and are never given back.
    Ok(unsafe {
        core::ptr::write_bytes(start as *mut u8, 0, size as usize);
        core::slice::from_raw_parts_mut(start as *mut u8, size as usize)
    })
}
