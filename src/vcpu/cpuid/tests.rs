use super::*;

type Recording = [(u32, u32, Registers)];

/// The emulated PC's CPU: Bochs 2.7, `corei7_icelake_u`, read by a UEFI application.
#[rustfmt::skip]
const BOCHS_ICELAKE: &Recording = &[
    (0x0, 0, [0x1b, 0x756e6547, 0x6c65746e, 0x49656e69]),
    (0x1, 0, [0x706e5, 0x10800, 0x77faf3bf, 0xbfebfbff]),
    (0x2, 0, [0xfeff01, 0xf0, 0x0, 0x0]),
    (0x4, 0, [0x1c004121, 0x2c0003f, 0x3f, 0x0]),
    (0x4, 1, [0x1c004122, 0x1c0003f, 0x3f, 0x0]),
    (0x4, 2, [0x1c004143, 0x1c0003f, 0x3ff, 0x0]),
    (0x4, 3, [0x1c03c163, 0x3c0003f, 0x1fff, 0x6]),
    (0x5, 0, [0x40, 0x40, 0x3, 0x11121020]),
    (0x6, 0, [0x7aff5, 0x2, 0x9, 0x0]),
    (0x7, 0, [0x0, 0xf0bf27eb, 0x405f4e, 0xbc000110]),
    (0xa, 0, [0x8300805, 0x0, 0xf, 0x8604]),
    (0xb, 0, [0x1, 0x1, 0x0, 0x0]),
    (0xb, 1, [0x0, 0x0, 0x1, 0x0]),
    (0xb, 2, [0x0, 0x0, 0x2, 0x0]),
    (0xd, 0, [0x2e7, 0x240, 0xac0, 0x0]),
    (0xd, 1, [0xf, 0x0, 0x0, 0x0]),
    (0xd, 2, [0x100, 0x240, 0x0, 0x0]),
    (0xd, 5, [0x40, 0x440, 0x0, 0x0]),
    (0xd, 6, [0x200, 0x480, 0x0, 0x0]),
    (0xd, 7, [0x400, 0x680, 0x0, 0x0]),
    (0x15, 0, [0x2, 0x4e, 0x249f000, 0x0]),
    (0x16, 0, [0x5dc, 0xf3c, 0x64, 0x0]),
    (0x18, 0, [0x7, 0x0, 0x0, 0x0]),
    (0x18, 1, [0x0, 0x80007, 0x1, 0x4122]),
    (0x18, 2, [0x0, 0x10000f, 0x1, 0x4125]),
    (0x18, 3, [0x0, 0x40001, 0x10, 0x4024]),
    (0x18, 4, [0x0, 0x40006, 0x8, 0x4024]),
    (0x80000000, 0, [0x80000008, 0x0, 0x0, 0x0]),
    (0x80000001, 0, [0x0, 0x0, 0x121, 0x2c100800]),
    (0x80000002, 0, [0x64617551, 0x65726f43, 0x746e4920, 0x43206c65]),
    (0x80000003, 0, [0x2065726f, 0x312d3769, 0x47353630, 0x31202c37]),
    (0x80000004, 0, [0x20303033, 0x7a484d, 0x0, 0x0]),
    (0x80000006, 0, [0x0, 0x0, 0x1006040, 0x0]),
    (0x80000007, 0, [0x0, 0x0, 0x0, 0x100]),
    (0x80000008, 0, [0x3028, 0x0, 0x0, 0x0]),
];

/// A virtual machine on a Sapphire Rapids server, with AMX, shadow stacks and a leaf 0x1F.
#[rustfmt::skip]
const SAPPHIRE_RAPIDS: &Recording = &[
    (0x0, 0, [0x24, 0x756e6547, 0x6c65746e, 0x49656e69]),
    (0x1, 0, [0xa0671, 0x1020800, 0xfffa3203, 0x1f8bfbff]),
    (0x2, 0, [0xfeff01, 0xf0, 0x0, 0x0]),
    (0x4, 0, [0x4000121, 0x2c0003f, 0x3f, 0x0]),
    (0x4, 1, [0x4000122, 0x3c0003f, 0x3f, 0x0]),
    (0x4, 2, [0x4000143, 0x3c0003f, 0x7ff, 0x0]),
    (0x4, 3, [0x4004163, 0x3c0003f, 0x77fff, 0x4]),
    (0x6, 0, [0x4, 0x0, 0x0, 0x0]),
    (0x7, 0, [0x2, 0xf1bf27eb, 0x1b415fde, 0xbfd14410]),
    (0x7, 1, [0x201c30, 0x0, 0x0, 0x84000]),
    (0x7, 2, [0x0, 0x0, 0x0, 0x3f]),
    (0xb, 0, [0x0, 0x1, 0x100, 0x1]),
    (0xb, 1, [0x5, 0x2, 0x201, 0x1]),
    (0xb, 2, [0x0, 0x0, 0x2, 0x1]),
    (0xd, 0, [0x602e7, 0x2b00, 0x2b00, 0x0]),
    (0xd, 1, [0x1f, 0x2a00, 0x1800, 0x0]),
    (0xd, 2, [0x100, 0x240, 0x0, 0x0]),
    (0xd, 5, [0x40, 0x440, 0x0, 0x0]),
    (0xd, 6, [0x200, 0x480, 0x0, 0x0]),
    (0xd, 7, [0x400, 0x680, 0x0, 0x0]),
    (0xd, 9, [0x8, 0xa80, 0x0, 0x0]),
    (0xd, 11, [0x10, 0x0, 0x1, 0x0]),
    (0xd, 12, [0x18, 0x0, 0x1, 0x0]),
    (0xd, 17, [0x40, 0xac0, 0x2, 0x0]),
    (0xd, 18, [0x2000, 0xb00, 0x6, 0x0]),
    (0x1d, 0, [0x1, 0x0, 0x0, 0x0]),
    (0x1e, 0, [0x0, 0x4010, 0x0, 0x0]),
    (0x1f, 0, [0x0, 0x1, 0x100, 0x1]),
    (0x1f, 1, [0x5, 0x2, 0x201, 0x1]),
    (0x1f, 2, [0x0, 0x0, 0x2, 0x1]),
    (0x80000000, 0, [0x80000008, 0x0, 0x0, 0x0]),
    (0x80000001, 0, [0x0, 0x0, 0x121, 0x2c100800]),
    (0x80000002, 0, [0x65746e49, 0x2952286c, 0x6f655820, 0x2952286e]),
    (0x80000003, 0, [0x6f725020, 0x73736563, 0x726f, 0x0]),
    (0x80000006, 0, [0x0, 0x0, 0x8007040, 0x0]),
    (0x80000007, 0, [0x0, 0x0, 0x0, 0x100]),
    (0x80000008, 0, [0x343934, 0x4100d200, 0x0, 0x0]),
];

fn play(recording: &Recording) -> impl Fn(u32, u32) -> Registers {
    move |leaf, subleaf| {
        let ignores_subleaf = ![4, 7, 0xb, 0xd, 0x14, 0x18, 0x1f].contains(&leaf);
        recording
            .iter()
            .find(|row| row.0 == leaf && (row.1 == subleaf || ignores_subleaf))
            .map_or([0; 4], |row| row.2)
    }
}

const OPTIONS: Options = Options {
    vcpus: 1,
    tsc_khz: 400_000,
    x2apic: true,
    apic_bus_khz: 1_000_000,
    rdtscp: true,
    invpcid: true,
    xsaves: true,
    fast_strings: true,
};

fn bochs() -> CpuidTable {
    CpuidTable::new(play(BOCHS_ICELAKE), &OPTIONS, 0)
}

fn server(options: Options, apic_id: u32) -> CpuidTable {
    CpuidTable::new(play(SAPPHIRE_RAPIDS), &options, apic_id)
}

#[test]
fn the_emulated_cpus_traps_are_cured() {
    let table = bochs();
    assert_eq!(table.lookup(0, 0)[EAX], 0xd, "no leaf 0x15 or 0x16");
    assert_eq!(table.lookup(1, 0)[ECX] & 1 << 3, 0, "MONITOR");
    assert_eq!(table.lookup(7, 0)[ECX] & (1 << 3 | 1 << 4), 0, "PKU");
    // PKRU is gone and the area ends with the ZMM registers; the compacted format is not believed.
    assert_eq!(table.lookup(0xd, 0), [0xe7, 0x240, 0xa80, 0]);
    assert_eq!(table.lookup(0xd, 1), [0b101, 0, 0, 0]);
    assert_eq!(table.lookup(0xd, 9), [0; 4]);
    assert!(!table.has_xsaves());
}

#[test]
fn sizes_of_a_sound_cpu_follow_xcr0() {
    let mut table = server(OPTIONS, 0);
    assert!(table.has_xsaves());
    assert_eq!(table.lookup(0xd, 0), [0xe7, 576, 0xa80, 0]);
    table.set_xcr0(7);
    assert_eq!(table.lookup(0xd, 0)[EBX], 0x340);
    assert_eq!(table.lookup(0xd, 1)[EBX], 0x340);
    table.set_xcr0(0xe7);
    assert_eq!(table.lookup(0xd, 0)[EBX], 0xa80);
    // Without the gap that the standard format keeps for the bound registers.
    assert_eq!(table.lookup(0xd, 1)[EBX], 576 + 256 + 64 + 512 + 1024);
}

#[test]
fn a_component_that_does_not_fit_takes_its_instructions_along() {
    let play = play(SAPPHIRE_RAPIDS);
    let broken = |leaf, subleaf| match (leaf, subleaf) {
        (0xd, 6) => [0x200, 0x460, 0, 0], // over the opmask's end
        _ => play(leaf, subleaf),
    };
    let table = CpuidTable::new(broken, &OPTIONS, 0);
    assert_eq!(table.xcr0_supported(), 7);
    assert_eq!(table.lookup(7, 0)[EBX] & LEAF7_EBX_AVX512, 0);
    assert_ne!(table.lookup(7, 0)[EBX] & LEAF7_EBX_AVX2, 0);
    assert_eq!(table.lookup(0xd, 5), [0; 4]);

    let no_avx = |leaf, subleaf| match (leaf, subleaf) {
        (0xd, 2) => [0; 4],
        _ => play(leaf, subleaf),
    };
    let table = CpuidTable::new(no_avx, &OPTIONS, 0);
    assert_eq!(table.xcr0_supported(), 3);
    assert_eq!(table.lookup(1, 0)[ECX] & LEAF1_ECX_FMA_AVX_F16C, 0);
    assert_eq!(table.lookup(7, 0)[EBX] & LEAF7_EBX_AVX2, 0);
}

#[test]
fn features_without_support_are_hidden() {
    let table = server(OPTIONS, 0);
    let [_, ebx, ecx, edx] = table.lookup(7, 0);
    assert_eq!(
        ebx & (1 << 2 | 1 << 4 | 1 << 11 | 1 << 25),
        0,
        "SGX, TSX, PT"
    );
    assert_eq!(
        ecx & (1 << 3 | 1 << 5 | 1 << 7 | 1 << 16),
        0,
        "PKU, WAITPKG, CET, LA57"
    );
    assert_eq!(
        edx & (1 << 5 | 1 << 20 | 1 << 22 | 1 << 24 | 1 << 29),
        0,
        "UINTR, CET, AMX, ARCH_CAPABILITIES"
    );
    assert_eq!(table.lookup(7, 1)[EAX] & 1 << 26, 0, "LAM");
    assert_eq!(table.lookup(7, 2), [0; 4]);
    for leaf in [3, 5, 9, 0xa] {
        assert_eq!(table.lookup(leaf, 0), [0; 4], "leaf {leaf:#x}");
    }
    let none = Options {
        rdtscp: false,
        invpcid: false,
        xsaves: false,
        fast_strings: false,
        ..OPTIONS
    };
    assert_ne!(server(OPTIONS, 0).lookup(7, 0)[EDX] & 1 << 4, 0, "FSRM");
    let table = server(none, 0);
    assert_eq!(table.lookup(7, 0)[EBX] & 1 << 9, 0, "ERMS");
    assert_eq!(table.lookup(7, 0)[EDX] & 1 << 4, 0, "FSRM");
    assert_eq!(table.lookup(7, 1)[EAX] & 7 << 10, 0, "FZRM, FSRS, FSRC");
    assert!(!table.has_rdtscp() && !table.has_xsaves());
    assert_eq!(table.lookup(7, 0)[EBX] & 1 << 10, 0, "INVPCID");
    assert_eq!(table.lookup(7, 0)[ECX] & 1 << 22, 0, "RDPID");
}

/// Nothing passes that no list names, whatever the host claims.
#[test]
fn a_host_that_claims_everything_gets_only_the_lists() {
    let table = CpuidTable::new(|_, _| [u32::MAX; 4], &OPTIONS, 0);
    let [_, _, ecx, edx] = table.lookup(1, 0);
    assert_eq!(ecx & !(LEAF1_ECX | LEAF1_ECX_SET | LEAF1_ECX_X2APIC), 0);
    assert_eq!(edx & !(LEAF1_EDX | LEAF1_EDX_APIC), 0);
    assert_eq!(ecx & (1 << 5 | 1 << 6 | 1 << 27), 0, "VMX, SMX, OSXSAVE");
    let [_, ebx, ecx, edx] = table.lookup(7, 0);
    assert_eq!(
        ebx & !(LEAF7_EBX | LEAF7_EBX_SET | LEAF7_EBX_INVPCID | LEAF7_EBX_FAST_STRINGS),
        0
    );
    assert_eq!(ecx & !(LEAF7_ECX | LEAF7_ECX_RDPID), 0);
    assert_eq!(edx & !(LEAF7_EDX | LEAF7_EDX_FAST_STRINGS), 0);
    assert_eq!(
        table.xcr0_supported(),
        3,
        "sizes that wrap around are no sizes"
    );
}

#[test]
fn topology_names_every_vcpu() {
    let options = Options {
        vcpus: 3,
        ..OPTIONS
    };
    for id in 0..3 {
        let table = server(options, id);
        assert_eq!(table.lookup(1, 0)[EBX] >> 16, id << 8 | 4);
        assert_ne!(table.lookup(1, 0)[EDX] & LEAF1_EDX_HTT, 0);
        assert_eq!(table.lookup(0xb, 0), [0, 1, 0x100, id]);
        assert_eq!(table.lookup(0xb, 1), [2, 3, 0x201, id]);
        assert_eq!(table.lookup(0xb, 0x1234), [0, 0, 0x34, id]);
        let (l1, l3) = (table.lookup(4, 0)[EAX], table.lookup(4, 3)[EAX]);
        assert_eq!((l1 >> 14 & 0xfff, l1 >> 26), (0, 3));
        assert_eq!((l3 >> 14 & 0xfff, l3 >> 26), (3, 3));
        assert_eq!(table.lookup(4, 4), [0; 4]);
    }
    let single = bochs();
    assert_eq!(single.lookup(1, 0)[EDX] & LEAF1_EDX_HTT, 0);
    assert_eq!(single.lookup(0xb, 1), [0, 1, 0x201, 0]);
}

#[test]
fn leaves_out_of_range_give_the_highest_basic_leaf() {
    let table = bochs();
    for leaf in [
        0xe,
        0xf,
        0x10,
        0x15,
        0x3fff_ffff,
        0x4000_0100,
        0x8000_0009,
        u32::MAX,
    ] {
        for subleaf in [0, 1, 2, 7, 8, u32::MAX] {
            assert_eq!(
                table.lookup(leaf, subleaf),
                table.lookup(0xd, subleaf),
                "{leaf:#x}"
            );
        }
    }
}

#[test]
fn a_cpu_without_xsave_ends_with_leaf_b() {
    let play = play(BOCHS_ICELAKE);
    let old = |leaf, subleaf| {
        let mut row = play(leaf, subleaf);
        if leaf == 0 {
            row[EAX] = 0xb;
        }
        row
    };
    let mut table = CpuidTable::new(old, &OPTIONS, 5);
    table.set_xcr0(7);
    assert_eq!(table.lookup(0, 0)[EAX], 0xb);
    assert_eq!(
        table.lookup(1, 0)[ECX] & (LEAF1_ECX_XSAVE | LEAF1_ECX_FMA_AVX_F16C),
        0
    );
    assert_eq!(table.lookup(0xd, 3), [0, 0, 3, 5]);
    assert_eq!(cr4_allowed(&table) & 1 << 18, 0);
    assert!(!xcr0_valid(1, &table));
}

#[test]
fn the_hypervisor_leaves_are_kvms() {
    let table = bochs();
    let [highest, b, c, d] = table.lookup(0x4000_0000, 0);
    let name: Vec<u8> = [b, c, d].iter().flat_map(|r| r.to_le_bytes()).collect();
    assert_eq!((highest, &name[..]), (0x4000_0010, &b"KVMKVMKVM\0\0\0"[..]));
    assert_eq!(
        table.lookup(0x4000_0001, 0),
        [1 << 24 | 1 << 3 | 1 << 1, 0, 0, 0]
    );
    assert_eq!(table.lookup(0x4000_0002, 0), [0; 4]);
    assert_eq!(table.lookup(0x4000_0010, 9), [400_000, 1_000_000, 0, 0]);
    assert_ne!(table.lookup(1, 0)[ECX] & 1 << 31, 0);
}

#[test]
fn extended_leaves() {
    let table = server(OPTIONS, 0);
    assert_eq!(table.lookup(0x8000_0000, 0)[EAX], 0x8000_0008);
    assert_eq!(table.lookup(0x8000_0001, 0), [0, 0, 0x121, 0x2c10_0800]);
    assert_eq!(
        table.lookup(0x8000_0002, 0)[EAX],
        u32::from_le_bytes(*b"Inte")
    );
    assert_eq!(table.lookup(0x8000_0007, 0), [0, 0, 0, 1 << 8]);
    assert_eq!(table.lookup(0x8000_0008, 0), [0x3030, 0, 0, 0]);
    assert_eq!(bochs().physical_address_bits(), 40);
}

#[test]
fn the_bits_that_the_guest_moves() {
    let mut table = bochs();
    assert_eq!(table.lookup(1, 0)[ECX] & LEAF1_ECX_OSXSAVE, 0);
    table.set_osxsave(true);
    assert_ne!(table.lookup(1, 0)[ECX] & LEAF1_ECX_OSXSAVE, 0);
    table.set_apic_enabled(false);
    assert_eq!(table.lookup(1, 0)[EDX] & LEAF1_EDX_APIC, 0);
    table.set_osxsave(false);
    table.set_apic_enabled(true);
    assert_eq!(table, bochs());
}

#[test]
fn control_bits_follow_the_features() {
    let table = bochs();
    assert_eq!(efer_allowed(&table), 0xd01);
    let cr4 = cr4_allowed(&table);
    assert_eq!(cr4, 0x370fff & !(1 << 12), "no LA57, VMXE, SMXE, PKE, CET");
}

#[test]
fn xcr0_rules() {
    let table = bochs();
    for valid in [1, 3, 7, 0xe7] {
        assert!(xcr0_valid(valid, &table), "{valid:#x}");
    }
    for invalid in [
        0,
        2,
        5,
        0xe3,
        0x27,
        0x67,
        0x1f,
        0x207,
        0x6_0007,
        1 << 63 | 1,
    ] {
        assert!(!xcr0_valid(invalid, &table), "{invalid:#x}");
    }
}
