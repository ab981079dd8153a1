//! Locks VT-x off, as the firmware of a board with "Virtualization Technology"
//! disabled does, and starts the loader `\EFI\VIREO\LOADER.EFI` of the same volume.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::arch::asm;
use core::panic::PanicInfo;
use uefi::boot::{self, LoadImageSource, OpenProtocolAttributes, OpenProtocolParams};
use uefi::prelude::*;
use uefi::proto::BootPolicy;
use uefi::proto::device_path::DevicePath;
use uefi::proto::device_path::build::{DevicePathBuilder, media::FilePath};
use uefi::proto::loaded_image::LoadedImage;
use uefi::runtime::{self, ResetType};
use uefi::{cstr16, println};
use vireo_freestanding as _;

const FEATURE_CONTROL: u32 = 0x3a;
/// Locks the register until the next reset (SDM volume 3, 24.7).
const LOCK: u32 = 1;

#[entry]
fn main() -> Status {
    lock_vmx_off();
    // Returns only when the loader could not be started.
    let status = start_loader().status();
    println!("vireo: error: test firmware: the loader does not start: {status}");
    runtime::reset(ResetType::SHUTDOWN, status, None)
}

/// Sets the lock with VMX off inside and outside SMX.
fn lock_vmx_off() {
    // SAFETY: for CPUs with VMX only, which have the register; it is not locked yet where
    // firmware leaves that to the system, as the emulated PC's does.
    unsafe {
        asm!("wrmsr", in("ecx") FEATURE_CONTROL, in("eax") LOCK, in("edx") 0, options(nomem, nostack));
    }
}

fn start_loader() -> uefi::Result {
    let device = boot::open_protocol_exclusive::<LoadedImage>(boot::image_handle())?
        .device()
        .ok_or(Status::NOT_FOUND)?;
    let params = OpenProtocolParams {
        handle: device,
        agent: boot::image_handle(),
        controller: None,
    };
    // SAFETY: only read, while nothing else runs that could remove it.
    let volume =
        unsafe { boot::open_protocol::<DevicePath>(params, OpenProtocolAttributes::GetProtocol) }?;
    let mut storage = Vec::new();
    let mut path = DevicePathBuilder::with_vec(&mut storage);
    for node in volume.node_iter() {
        path = path.push(&node).map_err(|_| Status::INVALID_PARAMETER)?;
    }
    let path = path
        .push(&FilePath {
            path_name: cstr16!("\\EFI\\VIREO\\LOADER.EFI"),
        })
        .and_then(DevicePathBuilder::finalize)
        .map_err(|_| Status::INVALID_PARAMETER)?;
    let loader = boot::load_image(
        boot::image_handle(),
        LoadImageSource::FromDevicePath {
            device_path: path,
            boot_policy: BootPolicy::ExactMatch,
        },
    )?;
    boot::start_image(loader)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("vireo: error: test firmware: {info}");
    runtime::reset(ResetType::SHUTDOWN, Status::ABORTED, None)
}

/// Named by the unwind tables of the prebuilt `core`; nothing unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
extern "C" fn _Unwind_Resume() -> ! {
    panic!("unwinding")
}
