use std::collections::BTreeMap;

use super::check;
use super::control::*;
use super::fields::*;
use super::*;

mod controls;
mod guest;
mod segments;

/// The emulated CPU's MSRs, with posted interrupts and mode-based execute control added.
const CPU: Capabilities = Capabilities {
    basic: 0x00d8_1000_0000_0004,
    pin_based: 0x0000_00ff_0000_0016,
    primary: 0xfff9_fffe_0400_6172,
    secondary: 0x02d7_7fff_0000_0000,
    exit: 0x007f_ffff_0003_6dfb,
    entry: 0x0001_ffff_0000_11ff,
    misc: 0x6004_01e0,
    cr0_fixed0: 0x8000_0021,
    cr0_fixed1: 0xffff_ffff,
    cr4_fixed0: 0x2000,
    cr4_fixed1: 0x77_2fff,
    ept_vpid: EptVpidCapabilities(0x0f01_0633_4141),
    vm_functions: 1,
    physical_address_width: 39,
    linear_address_width: 48,
};

const PIN: u64 = 0x7f;
const PROC: u64 = 0x0400_6172 | SECONDARY_CONTROLS | USE_MSR_BITMAPS | IO_BITMAPS | TPR_SHADOW;
const PROC2: u64 = ENABLE_EPT | ENABLE_VPID | UNRESTRICTED_GUEST | TSC_SCALING;
const EXITS: u64 = 0x3_6dfb
    | HOST_ADDRESS_SPACE_SIZE
    | ACKNOWLEDGE_INTERRUPT
    | EXIT_LOAD_PAT
    | EXIT_LOAD_EFER
    | SAVE_PREEMPTION_TIMER;
const ENTRIES: u64 = 0x11ff | ENTRY_LOAD_PAT | ENTRY_LOAD_EFER;
const PAT: u64 = 0x0007_0406_0007_0406;
const WIDE: u64 = 1 << 39;
const CROOKED: u64 = 0x8000_0000_0000;
const VALID: u64 = 1 << 31;

#[derive(Clone)]
struct State(BTreeMap<u32, u64>);

impl FieldReader for State {
    fn read(&self, encoding: u32) -> u64 {
        self.0.get(&encoding).copied().unwrap_or(0)
    }
}

impl State {
    fn with(&self, changes: &[(Field, u64)]) -> Self {
        let mut state = self.clone();
        state.0.extend(
            changes
                .iter()
                .map(|(field, value)| (field.encoding, *value)),
        );
        state
    }

    fn violations(&self) -> Vec<Violation> {
        check(self, &CPU)
    }
}

fn segment(of: Segment, selector: u64, base: u64, limit: u64, rights: u64) -> [(Field, u64); 4] {
    [
        (of.selector, selector),
        (of.base, base),
        (of.limit, limit),
        (of.access_rights, rights),
    ]
}

/// Controls and host, with a guest in 64-bit mode at privilege level 0.
fn long_mode() -> State {
    let mut state = State(BTreeMap::new()).with(&[
        (PIN_BASED, PIN),
        (PRIMARY, PROC),
        (SECONDARY, PROC2),
        (EXIT, EXITS),
        (ENTRY, ENTRIES | IA32E_MODE_GUEST),
        (IO_BITMAP_A, 0x1000),
        (IO_BITMAP_B, 0x2000),
        (MSR_BITMAPS, 0x3000),
        (VIRTUAL_APIC, 0x4000),
        (EPTP, 0x505e),
        (VPID, 1),
        (TSC_MULTIPLIER, 1 << 48),
        (HOST_CR0, 0x8001_0033),
        (HOST_CR3, 0x6000),
        (HOST_CR4, 0x2020),
        (HOST_EFER, 0xd01),
        (HOST_PAT, PAT),
        (HOST_CS, 0x08),
        (HOST_SS, 0x10),
        (HOST_TR, 0x18),
        (HOST_RIP, 0xffff_ffff_8000_0000),
        (GUEST_CR0, 0x8001_0033),
        (GUEST_CR3, 0x7000),
        (GUEST_CR4, 0x2020),
        (GUEST_DR7, 0x400),
        (GUEST_RIP, 0xffff_ffff_8100_0000),
        (GUEST_RFLAGS, 0x202),
        (GUEST_EFER, 0xd01),
        (GUEST_PAT, PAT),
        (GUEST_GDTR_LIMIT, 0x7f),
        (GUEST_IDTR_LIMIT, 0xfff),
        (LINK_POINTER, u64::MAX),
    ]);
    for data in [SS, DS, ES, FS, GS] {
        state = state.with(&segment(data, 0x18, 0, 0xffff_ffff, 0xc093));
    }
    state
        .with(&segment(CS, 0x10, 0, 0xffff_ffff, 0xa09b))
        .with(&segment(TR, 0x40, 0, 0x67, 0x8b))
        .with(&segment(LDTR, 0x48, 0, 0xffff, 0x82))
}

/// As after reset.
fn real_mode() -> State {
    let mut state = long_mode().with(&[
        (ENTRY, ENTRIES),
        (GUEST_CR0, 0x6000_0030),
        (GUEST_CR3, 0),
        (GUEST_CR4, 0x2000),
        (GUEST_EFER, 0),
        (GUEST_RIP, 0xfff0),
        (GUEST_RFLAGS, 2),
    ]);
    for data in [SS, DS, ES, FS, GS] {
        state = state.with(&segment(data, 0, 0, 0xffff, 0x93));
    }
    state.with(&segment(CS, 0xf000, 0xffff_0000, 0xffff, 0x9b))
}

/// 32-bit protected mode with PAE paging.
fn protected_mode() -> State {
    long_mode().with(&[
        (ENTRY, ENTRIES),
        (GUEST_EFER, 0),
        (GUEST_RIP, 0x10_0000),
        (CS.access_rights, 0xc09b),
        (GUEST_PDPTE0, 0x1001),
        (GUEST_PDPTE1, 0x1e6),
    ])
}

fn virtual_8086_mode() -> State {
    let mut state = protected_mode().with(&[(GUEST_RFLAGS, 0x2_0202), (GUEST_RIP, 0x100)]);
    for each in [CS, SS, DS, ES, FS, GS] {
        state = state.with(&segment(each, 0x1234, 0x1_2340, 0xffff, 0xf3));
    }
    state
}

/// Each case: what is changed, and the field that alone is then wrong.
type Case<'a> = (&'a [(Field, u64)], Field);

fn each_yields_one(base: &State, section: &str, cases: &[Case<'_>]) {
    for (changes, field) in cases {
        let found = base.with(changes).violations();
        let found: Vec<_> = found
            .iter()
            .map(|each| (each.field, each.section))
            .collect();
        let changes: Vec<_> = changes
            .iter()
            .map(|(field, value)| format!("{} = {value:#x}", field.name))
            .collect();
        assert_eq!(found, [(field.name, section)], "with {changes:?}");
    }
}

fn each_is_valid(base: &State, cases: &[&[(Field, u64)]]) {
    for changes in cases {
        assert_eq!(base.with(changes).violations(), [], "with {changes:x?}");
    }
}

/// One change to one field, which is then wrong.
fn each_alone(base: &State, section: &str, cases: &[(Field, u64)]) {
    for case in cases {
        each_yields_one(base, section, &[(&[*case], case.0)]);
    }
}

#[test]
fn valid_states_have_no_violation() {
    for state in [
        long_mode(),
        real_mode(),
        protected_mode(),
        virtual_8086_mode(),
    ] {
        assert_eq!(state.violations(), []);
    }
    // Without unrestricted guest, all but real mode.
    for state in [long_mode(), protected_mode(), virtual_8086_mode()] {
        let mut changes = vec![(SECONDARY, PROC2 & !UNRESTRICTED_GUEST)];
        if state.read(GUEST_RFLAGS.encoding) & bits::RFLAGS_VM == 0 {
            changes.push((CS.selector, 0x10));
        }
        assert_eq!(state.with(&changes).violations(), []);
    }
}

#[test]
fn a_violation_is_one_line() {
    let found = long_mode().with(&[(GUEST_CR3, WIDE)]).violations();
    assert_eq!(
        found[0].to_string(),
        "guest CR3 is 0x8000000000: must not set bits beyond the physical-address width \
         (SDM vol. 3, 27.3.1.1)"
    );
}
