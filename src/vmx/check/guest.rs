//! Checks of the guest-state area (SDM vol. 3, 27.3.1), but for segment registers.

use super::control::*;
use super::fields::*;
use super::{Checker, Event, bits, segments};

/// The encodings of the guest activity state (SDM vol. 3, 25.4.2).
const ACTIVE: u64 = 0;
const HLT: u64 = 1;
const SHUTDOWN: u64 = 2;
const WAIT_FOR_SIPI: u64 = 3;

// Interruptibility state (SDM vol. 3, 25.4.2).
const BLOCKING_BY_STI: u64 = 1 << 0;
const BLOCKING_BY_MOV_SS: u64 = 1 << 1;
const BLOCKING_BY_SMI: u64 = 1 << 2;
const BLOCKING_BY_NMI: u64 = 1 << 3;
const ENCLAVE_INTERRUPTION: u64 = 1 << 4;

pub(super) fn check(checker: &mut Checker<'_>) {
    checker.section("27.3.1.1");
    control_registers(checker);
    msrs(checker);
    checker.section("27.3.1.2");
    segments::check(checker);
    checker.section("27.3.1.3");
    descriptor_tables(checker);
    checker.section("27.3.1.4");
    rip_and_rflags(checker);
    checker.section("27.3.1.5");
    activity(checker);
    interruptibility(checker);
    pending_debug_exceptions(checker);
    link_pointer(checker);
    checker.section("27.3.1.6");
    pdptes(checker);
}

fn control_registers(checker: &mut Checker<'_>) {
    let capabilities = checker.capabilities;
    let long = checker.entry & IA32E_MODE_GUEST != 0;
    let cr0 = checker.read(GUEST_CR0);
    let mut unchecked = bits::CR0_NW | bits::CR0_CD;
    if checker.secondary & UNRESTRICTED_GUEST != 0 {
        unchecked |= bits::CR0_PE | bits::CR0_PG;
    }
    checker.require(
        GUEST_CR0,
        !cr0 & capabilities.cr0_fixed0 & !unchecked == 0
            && cr0 & !capabilities.cr0_fixed1 & !unchecked == 0,
        "every bit must be as IA32_VMX_CR0_FIXED0 and FIXED1 allow",
    );
    checker.require(
        GUEST_CR0,
        cr0 & bits::CR0_PG == 0 || cr0 & bits::CR0_PE != 0,
        "PG needs PE",
    );
    let cr4 = checker.read(GUEST_CR4);
    checker.require(
        GUEST_CR4,
        !cr4 & capabilities.cr4_fixed0 == 0 && cr4 & !capabilities.cr4_fixed1 == 0,
        "every bit must be as IA32_VMX_CR4_FIXED0 and FIXED1 allow",
    );
    checker.require(
        GUEST_CR4,
        cr4 & bits::CR4_CET == 0 || cr0 & bits::CR0_WP != 0,
        "CET needs CR0.WP",
    );
    if long {
        checker.require(
            GUEST_CR0,
            cr0 & bits::CR0_PG != 0,
            "an IA-32e mode guest needs PG",
        );
        checker.require(
            GUEST_CR4,
            cr4 & bits::CR4_PAE != 0,
            "an IA-32e mode guest needs PAE",
        );
    } else {
        checker.require(
            GUEST_CR4,
            cr4 & bits::CR4_PCIDE == 0,
            "PCIDE must be 0 outside IA-32e mode",
        );
    }
    checker.require_physical_width(GUEST_CR3);
}

fn msrs(checker: &mut Checker<'_>) {
    if checker.entry & LOAD_DEBUG_CONTROLS != 0 {
        let control = checker.read(GUEST_DEBUGCTL);
        checker.require(
            GUEST_DEBUGCTL,
            control & !0xffc7 == 0,
            "bits 5:3 and 63:16 are reserved",
        );
        let dr7 = checker.read(GUEST_DR7);
        checker.require(GUEST_DR7, dr7 >> 32 == 0, "bits 63:32 must be 0");
    }
    checker.require_canonical(GUEST_SYSENTER_ESP);
    checker.require_canonical(GUEST_SYSENTER_EIP);
    if checker.entry & ENTRY_LOAD_PAT != 0 {
        checker.require_pat(GUEST_PAT);
    }
    if checker.entry & ENTRY_LOAD_EFER != 0 {
        let efer = checker.read(GUEST_EFER);
        let lma = efer & bits::EFER_LMA != 0;
        checker.require(
            GUEST_EFER,
            efer & !bits::EFER_DEFINED == 0,
            "must not set a reserved bit",
        );
        checker.require(
            GUEST_EFER,
            lma == (checker.entry & IA32E_MODE_GUEST != 0),
            "LMA must be as the control IA-32e mode guest",
        );
        let paging = checker.read(GUEST_CR0) & bits::CR0_PG != 0;
        checker.require(
            GUEST_EFER,
            !paging || lma == (efer & bits::EFER_LME != 0),
            "LMA and LME must be equal when CR0.PG is 1",
        );
    }
    if checker.entry & ENTRY_LOAD_BNDCFGS != 0 {
        let bounds = checker.read(GUEST_BNDCFGS);
        checker.require(GUEST_BNDCFGS, bounds & 0xffc == 0, "bits 11:2 are reserved");
        checker.require_canonical(GUEST_BNDCFGS);
    }
}

fn descriptor_tables(checker: &mut Checker<'_>) {
    for (base, limit) in [
        (GUEST_GDTR_BASE, GUEST_GDTR_LIMIT),
        (GUEST_IDTR_BASE, GUEST_IDTR_LIMIT),
    ] {
        checker.require_canonical(base);
        let value = checker.read(limit);
        checker.require(limit, value >> 16 == 0, "bits 31:16 must be 0");
    }
}

fn rip_and_rflags(checker: &mut Checker<'_>) {
    let long = checker.entry & IA32E_MODE_GUEST != 0;
    let rip = checker.read(GUEST_RIP);
    if long && checker.read(CS.access_rights) & segments::LONG != 0 {
        // Not the same as canonical: the highest bit of the linear address is free.
        let above = (rip as i64) >> checker.capabilities.linear_address_width.min(63);
        checker.require(
            GUEST_RIP,
            above == 0 || above == -1,
            "bits beyond the linear-address width must be identical",
        );
    } else {
        checker.require(
            GUEST_RIP,
            rip >> 32 == 0,
            "bits 63:32 must be 0 outside 64-bit mode",
        );
    }
    let rflags = checker.read(GUEST_RFLAGS);
    checker.require(
        GUEST_RFLAGS,
        rflags & !0x3f_7fd7 == 0 && rflags & 2 != 0,
        "bits 63:22, 15, 5 and 3 must be 0, bit 1 must be 1",
    );
    let protected = checker.read(GUEST_CR0) & bits::CR0_PE != 0;
    checker.require(
        GUEST_RFLAGS,
        rflags & bits::RFLAGS_VM == 0 || protected && !long,
        "VM must be 0 in IA-32e mode and when CR0.PE is 0",
    );
    let interrupt = checker
        .injected()
        .is_some_and(|event| event.kind == Event::EXTERNAL_INTERRUPT);
    checker.require(
        GUEST_RFLAGS,
        !interrupt || rflags & bits::RFLAGS_IF != 0,
        "IF must be 1 when an external interrupt is injected",
    );
}

fn activity(checker: &mut Checker<'_>) {
    let state = checker.read(ACTIVITY_STATE);
    let supported = match state {
        ACTIVE => true,
        HLT..=WAIT_FOR_SIPI => checker.capabilities.misc >> (5 + state) & 1 != 0,
        _ => false,
    };
    checker.require(
        ACTIVITY_STATE,
        supported,
        "must be a state that the CPU supports",
    );
    let dpl = checker.read(SS.access_rights) >> 5 & 3;
    checker.require(
        ACTIVITY_STATE,
        state != HLT || dpl == 0,
        "HLT needs an SS.DPL of 0",
    );
    let blocking =
        checker.read(INTERRUPTIBILITY_STATE) & (BLOCKING_BY_STI | BLOCKING_BY_MOV_SS) != 0;
    checker.require(
        ACTIVITY_STATE,
        state == ACTIVE || !blocking,
        "must be active when STI or MOV SS block events",
    );
    if let Some(event) = checker.injected() {
        let fits = match (state, event.kind, event.vector) {
            (HLT, Event::EXTERNAL_INTERRUPT | Event::NMI, _)
            | (HLT, Event::HARDWARE_EXCEPTION, 1 | 18)
            | (HLT, Event::OTHER, 0)
            | (SHUTDOWN, Event::NMI, _)
            | (SHUTDOWN, Event::HARDWARE_EXCEPTION, 18) => true,
            (state, ..) => !(HLT..=WAIT_FOR_SIPI).contains(&state),
        };
        checker.require(
            ACTIVITY_STATE,
            fits,
            "the injected event must not be blocked by the state",
        );
    }
}

fn interruptibility(checker: &mut Checker<'_>) {
    const FIELD: Field = INTERRUPTIBILITY_STATE;
    let state = checker.read(FIELD);
    let sti = state & BLOCKING_BY_STI != 0;
    let mov_ss = state & BLOCKING_BY_MOV_SS != 0;
    checker.require(FIELD, state >> 5 == 0, "bits 31:5 are reserved");
    checker.require(FIELD, !(sti && mov_ss), "STI and MOV SS cannot both block");
    let interrupts_on = checker.read(GUEST_RFLAGS) & bits::RFLAGS_IF != 0;
    checker.require(
        FIELD,
        !sti || interrupts_on,
        "STI cannot block when RFLAGS.IF is 0",
    );
    checker.require(
        FIELD,
        state & BLOCKING_BY_SMI == 0,
        "blocking by SMI must be 0 outside SMM",
    );
    checker.require(
        FIELD,
        state & ENCLAVE_INTERRUPTION == 0 || !mov_ss,
        "an enclave interruption excludes blocking by MOV SS",
    );
    match checker.injected().map(|event| event.kind) {
        Some(Event::EXTERNAL_INTERRUPT) => checker.require(
            FIELD,
            !sti && !mov_ss,
            "an external interrupt cannot be injected while STI or MOV SS block",
        ),
        Some(Event::NMI) => {
            checker.require(
                FIELD,
                !mov_ss,
                "an NMI cannot be injected while MOV SS blocks",
            );
            checker.require(
                FIELD,
                !sti,
                "some CPUs do not inject an NMI while STI blocks",
            );
            let virtual_nmis = checker.pin_based & VIRTUAL_NMIS != 0;
            checker.require(
                FIELD,
                !virtual_nmis || state & BLOCKING_BY_NMI == 0,
                "a virtual NMI cannot be injected while NMIs are blocked",
            );
        }
        _ => {}
    }
}

fn pending_debug_exceptions(checker: &mut Checker<'_>) {
    const FIELD: Field = PENDING_DEBUG_EXCEPTIONS;
    const RESERVED: u64 = !0x1_ffff | 1 << 15 | 1 << 13 | 0x7f0;
    const SINGLE_STEP: u64 = 1 << 14;
    const ENABLED_BREAKPOINT: u64 = 1 << 12;
    const RTM: u64 = 1 << 16;
    let pending = checker.read(FIELD);
    checker.require(
        FIELD,
        pending & RESERVED == 0,
        "bits 10:4, 13, 15 and 63:17 are reserved",
    );
    let interruptibility = checker.read(INTERRUPTIBILITY_STATE);
    let blocking = interruptibility & (BLOCKING_BY_STI | BLOCKING_BY_MOV_SS) != 0;
    if blocking || checker.read(ACTIVITY_STATE) == HLT {
        let stepping = checker.read(GUEST_RFLAGS) & bits::RFLAGS_TF != 0
            && checker.read(GUEST_DEBUGCTL) & bits::DEBUGCTL_BTF == 0;
        checker.require(FIELD, (pending & SINGLE_STEP != 0) == stepping,
            "while events are blocked or the guest is halted, BS must be as RFLAGS.TF is without BTF");
    }
    if pending & RTM != 0 {
        checker.require(
            FIELD,
            pending & !RTM == ENABLED_BREAKPOINT && interruptibility & BLOCKING_BY_MOV_SS == 0,
            "RTM goes with bit 12 alone, and not with blocking by MOV SS",
        );
    }
}

fn link_pointer(checker: &mut Checker<'_>) {
    if checker.read(LINK_POINTER) != u64::MAX {
        checker.require_physical(
            LINK_POINTER,
            4096,
            "must be a multiple of 4096, or all ones",
        );
    }
}

/// With EPT, the fields are what PAE paging uses.
fn pdptes(checker: &mut Checker<'_>) {
    let pae = checker.read(GUEST_CR0) & bits::CR0_PG != 0
        && checker.read(GUEST_CR4) & bits::CR4_PAE != 0
        && checker.entry & IA32E_MODE_GUEST == 0;
    if !pae || checker.secondary & ENABLE_EPT == 0 {
        return;
    }
    for field in [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3] {
        let entry = checker.read(field);
        if entry & 1 != 0 {
            checker.require(field, entry & 0x1e6 == 0, "bits 2:1 and 8:5 are reserved");
            checker.require_physical_width(field);
        }
    }
}
