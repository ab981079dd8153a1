use super::*;
use crate::vcpu::cpuid::{Options as CpuidOptions, Registers};
use crate::vmx::live_state;
use proptest::prelude::*;

/// A CPU with 40 address bits and everything else.
fn host(leaf: u32, _: u32) -> Registers {
    match leaf {
        0x8000_0008 => [0x3028, 0, 0, 0],
        0xd => [0; 4],
        _ => [u32::MAX; 4],
    }
}

const CPUID: CpuidOptions = CpuidOptions {
    vcpus: 1,
    tsc_khz: 2_400_000,
    x2apic: true,
    apic_bus_khz: 1_000_000,
    rdtscp: true,
    invpcid: true,
    xsaves: true,
    fast_strings: true,
};

fn msrs() -> Msrs {
    let options = Options {
        bios_sign_id: 0x1234 << 32,
        fast_strings: true,
    };
    Msrs::new(&CpuidTable::new(host, &CPUID, 0), options)
}

fn value(msrs: &mut Msrs, msr: u32) -> u64 {
    match msrs.read(msr) {
        Ok(MsrRead::Value(value)) => value,
        other => panic!("{msr:#x}: {other:?}"),
    }
}

#[test]
fn direct_msrs_follow_the_cpu() {
    let direct: Vec<_> = msrs().direct().collect();
    let find = |msr| direct.iter().find(|d| d.msr == msr).copied();
    assert_eq!(find(TSC).map(|d| (d.read, d.write)), Some((true, false)));
    assert_eq!(
        find(PRED_CMD).map(|d| (d.read, d.write)),
        Some((false, true))
    );
    assert!(find(TSC_AUX).is_some() && find(SPEC_CTRL).is_some());
    assert!(find(EFER).is_none());

    let none = |leaf, subleaf| match leaf {
        7 => [0; 4],
        _ => host(leaf, subleaf),
    };
    let options = CpuidOptions {
        rdtscp: false,
        ..CPUID
    };
    let bare = Msrs::new(
        &CpuidTable::new(none, &options, 0),
        Options {
            bios_sign_id: 0,
            fast_strings: false,
        },
    );
    assert!(
        bare.direct()
            .all(|d| ![TSC_AUX, SPEC_CTRL, PRED_CMD, FLUSH_CMD].contains(&d.msr))
    );
    assert!(bare.direct().any(|d| d.msr == KERNEL_GS_BASE));
}

/// What Linux 6.1 reads at boot with an RDMSR whose fault is a warning or the end.
#[test]
fn nothing_that_linux_reads_unchecked_faults() {
    let mut msrs = msrs();
    let direct: Vec<u32> = msrs.direct().filter(|d| d.read).map(|d| d.msr).collect();
    let fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f);
    let named = [
        0x10,
        0x17,
        0x1b,
        0x3b,
        0x48,
        0x8b,
        0xfe,
        0x174,
        0x175,
        0x176,
        0x179,
        0x17a,
        0x1a0,
        0x1d9,
        0x277,
        0x2ff,
        0x6e0,
        0x802,
        0x803,
        0xc000_0080,
        0xc000_0081,
        0xc000_0100,
        0xc000_0102,
    ];
    for msr in named.into_iter().chain(0x200..=0x20f).chain(fixed) {
        assert!(direct.contains(&msr) || msrs.read(msr).is_ok(), "{msr:#x}");
    }
    assert_eq!(msrs.unknown(), Unknown::default());
}

#[test]
fn unknown_msrs_fault_and_are_counted() {
    let mut msrs = msrs();
    assert_eq!(msrs.read(0x480), Err(GeneralProtection));
    assert_eq!(msrs.write(0xc001_0015, 0), Err(GeneralProtection));
    assert_eq!(msrs.read(0x210), Err(GeneralProtection));
    assert_eq!(
        msrs.unknown(),
        Unknown {
            reads: 2,
            writes: 1,
            last: 0x210
        }
    );
    // A known register with a bad value is not unknown.
    assert_eq!(msrs.write(MTRR_CAP, 0), Err(GeneralProtection));
    assert_eq!(msrs.write(FEATURE_CONTROL, 5), Err(GeneralProtection));
    assert_eq!(msrs.write(PAT, 2), Err(GeneralProtection));
    assert_eq!(msrs.unknown().writes, 1);
}

#[test]
fn misc_enable_has_fast_strings_as_the_host_has() {
    let mut msrs = msrs();
    let initial = value(&mut msrs, MISC_ENABLE);
    assert_eq!(initial, 0x1801);
    assert_eq!(msrs.write(MISC_ENABLE, initial & !1), Ok(MsrWrite::Done));
    assert_eq!(value(&mut msrs, MISC_ENABLE), 0x1800);
    for bit in [3, 16, 18, 22, 23, 34] {
        let written = 0x1800 | 1 << bit;
        assert_eq!(msrs.write(MISC_ENABLE, written), Ok(MsrWrite::Done));
        assert_eq!(value(&mut msrs, MISC_ENABLE), written);
    }
    assert_eq!(msrs.write(MISC_ENABLE, 0x1800), Ok(MsrWrite::Done));
    for bit in [2, 7, 11, 12, 35] {
        assert_eq!(
            msrs.write(MISC_ENABLE, 0x1800 ^ 1 << bit),
            Err(GeneralProtection),
            "{bit}"
        );
    }
    assert_eq!(value(&mut msrs, MISC_ENABLE), 0x1800);
    let options = Options {
        fast_strings: false,
        ..msrs.options
    };
    let mut without = Msrs::new(&CpuidTable::new(host, &CPUID, 0), options);
    assert_eq!(value(&mut without, MISC_ENABLE), 0x1800);
}

#[test]
fn held_values_are_checked() {
    let mut msrs = msrs();
    let mut takes = |msr, value| match msrs.write(msr, value) {
        Ok(MsrWrite::Held(_, taken)) => Some(taken),
        Ok(MsrWrite::Done) => panic!("{msr:#x} is held"),
        Err(GeneralProtection) => None,
    };
    assert_eq!(takes(EFER, 0xd01), Some(0xd01));
    assert_eq!(takes(EFER, 1 << 12), None, "SVME");
    assert_eq!(
        takes(PAT, 0x0007_0406_0007_0406),
        Some(0x0007_0406_0007_0406)
    );
    assert_eq!(takes(PAT, 0x0800_0000_0000_0000), None);
    assert_eq!(takes(PAT, 0x0300), None);
    assert_eq!(takes(APIC_BASE, 0xfee0_0d00), Some(0xfee0_0d00));
    assert_eq!(takes(APIC_BASE, 1 << 40 | 0x800), None, "above MAXPHYADDR");
    assert_eq!(takes(APIC_BASE, 0xfee0_0a00), None, "bit 9");
    assert_eq!(takes(0x830, 1 << 32), Some(1 << 32), "ICR");
    assert_eq!(takes(0x80b, 1 << 32), None, "EOI");
    assert_eq!(takes(DEBUGCTL, 3), Some(2));
    assert_eq!(takes(DEBUGCTL, 4), None);
    assert_eq!(takes(KVM_SYSTEM_TIME, 0x1003), None);
    assert_eq!(takes(TSC_DEADLINE, u64::MAX), Some(u64::MAX));
}

#[test]
fn constants() {
    let mut msrs = msrs();
    assert_eq!(msrs.write(BIOS_SIGN_ID, 0), Ok(MsrWrite::Done));
    assert_eq!(value(&mut msrs, BIOS_SIGN_ID) >> 32, 0x1234);
    assert_eq!(value(&mut msrs, PLATFORM_INFO), 0);
    assert_eq!(value(&mut msrs, FEATURE_CONTROL), 1);
    assert_eq!(value(&mut msrs, MCG_CAP), 0);
    assert_eq!(msrs.write(MCG_STATUS, 0), Ok(MsrWrite::Done));
    assert_eq!(msrs.write(MCG_STATUS, 4), Err(GeneralProtection));
}

#[test]
fn mtrr_values_are_checked_and_kept() {
    let mut msrs = msrs();
    assert_eq!(value(&mut msrs, MTRR_CAP), 0x508);
    assert_eq!(value(&mut msrs, MTRR_DEF_TYPE), 0, "off after a reset");
    for (msr, good, bad) in [
        (MTRR_DEF_TYPE, 0xc06, 0xc07),
        (MTRR_DEF_TYPE, 0x800, 0x1800),
        (0x200, 0xff_c000_0006, 0x100_0000_0006),
        (0x20e, 0x8000_0000, 0x8000_0100),
        (0x201, 0xff_c000_0800, 0xff_c000_0801),
        (0x26f, 0x0605_0401_0006_0606, 0x0605_0401_0002_0606),
    ] {
        assert_eq!(msrs.write(msr, good), Ok(MsrWrite::Done), "{msr:#x}");
        assert_eq!(msrs.write(msr, bad), Err(GeneralProtection), "{msr:#x}");
        assert_eq!(value(&mut msrs, msr), good);
    }
}

proptest! {
    /// By the rule of SDM 3, 13.11.3: an address is in a range when it agrees with its base under its mask.
    #[test]
    fn firmware_mtrrs_cover_the_hole_and_nothing_else(first in 0x80_000..0x100_000u64, page in 0..0x180_000u64) {
        let start = (first & !0x3ff) << 12;
        let address = page << 12;
        let mut msrs = msrs();
        msrs.set_firmware_mtrrs(start..1 << 32);
        let uncached = (0x200..0x210).step_by(2).any(|msr| {
            let (base, mask) = (value(&mut msrs, msr), value(&mut msrs, msr + 1));
            mask & 0x800 != 0 && address & mask & !0xfff == base & mask & !0xfff
        });
        // Eight ranges are enough for a hole whose size has at most eight bits set.
        let hole = (1u64 << 32) - start;
        if hole.count_ones() <= 8 {
            prop_assert_eq!(uncached, (start..1 << 32).contains(&address));
        }
    }
}

#[test]
fn writes_of_what_stays_in_hardware_are_seen() {
    let mut msrs = msrs();
    for msr in live_state::WRITTEN {
        assert_eq!(
            msrs.write(msr, 5),
            Ok(MsrWrite::Held(Held::Live(msr), 5)),
            "{msr:#x}"
        );
        let direct = msrs.direct().find(|direct| direct.msr == msr).unwrap();
        assert!(direct.read && !direct.write, "{msr:#x}");
    }
}

#[test]
fn the_state_of_every_direct_msr_is_the_guests_own() {
    // VM entries and exits switch these.
    let switched = [SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, FS_BASE, GS_BASE];
    for direct in msrs().direct().filter(|direct| direct.read && direct.write) {
        let is_reset = live_state::FREE.contains(&direct.msr);
        assert!(
            is_reset || switched.contains(&direct.msr),
            "{:#x}",
            direct.msr
        );
    }
}
