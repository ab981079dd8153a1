//! Mistakes of CPUs that a guest could turn against its host.

use super::{cpu, msr};

/// Models of family 6 that stop with a machine check when code changes the size of the page that
/// holds it, Nehalem to Comet Lake: "Machine Check Error on Page Size Change" of Intel,
/// CVE-2018-12207.
const STOPPED_BY_PAGE_SIZES: [u8; 27] = [
    0x1a, 0x1e, 0x1f, 0x2e, // Nehalem
    0x25, 0x2c, 0x2f, // Westmere
    0x2a, 0x2d, // Sandy Bridge
    0x3a, 0x3e, // Ivy Bridge
    0x3c, 0x3f, 0x45, 0x46, // Haswell
    0x3d, 0x47, 0x4f, 0x56, // Broadwell
    0x4e, 0x5e, 0x55, // Skylake, Cascade Lake, Cooper Lake
    0x8e, 0x9e, 0x66, // Kaby, Coffee and Cannon Lake
    0xa5, 0xa6, // Comet Lake
];

const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// IF_PSCHANGE_MC_NO: those of these models that are mended.
const NOT_STOPPED: u64 = 1 << 6;

/// Whether this CPU is one that a guest stops by changing the size of a page that it executes:
/// large pages of its memory must not be for code then.
pub fn page_sizes_stop_it() -> bool {
    let cpuid = cpu::cpuid();
    let intel = cpuid
        .get_vendor_info()
        .is_some_and(|vendor| vendor.as_str() == "GenuineIntel");
    let capabilities = || msr::try_read(IA32_ARCH_CAPABILITIES).unwrap_or(0);
    intel
        && cpuid.get_feature_info().is_some_and(|info| {
            is_stopped_by_page_sizes(info.family_id(), info.model_id(), capabilities)
        })
}

fn is_stopped_by_page_sizes(family: u8, model: u8, capabilities: impl FnOnce() -> u64) -> bool {
    family == 6 && STOPPED_BY_PAGE_SIZES.contains(&model) && capabilities() & NOT_STOPPED == 0
}

#[cfg(test)]
mod tests {
    use super::is_stopped_by_page_sizes;

    #[test]
    fn old_cores_are_stopped_unless_they_say_otherwise() {
        let stopped = |family, model, bits: u64| is_stopped_by_page_sizes(family, model, || bits);
        assert!(stopped(6, 0x25, 0) && stopped(6, 0x9e, 1 << 5));
        assert!(!stopped(6, 0x9e, 1 << 6));
        // Ice Lake, Goldmont, and whatever is no core of these.
        assert!(!stopped(6, 0x7e, 0) && !stopped(6, 0x5c, 0) && !stopped(15, 0x1a, 0));
    }
}
