//! Checks of the host-state area (SDM vol. 3, 27.2.2 to 27.2.4), for a host in 64-bit mode.

use super::control::{EXIT_LOAD_EFER, EXIT_LOAD_PAT, HOST_ADDRESS_SPACE_SIZE};
use super::fields::*;
use super::{Checker, bits};

pub(super) fn check(checker: &mut Checker<'_>) {
    checker.section("27.2.2");
    registers(checker);
    checker.section("27.2.3");
    segments(checker);
    checker.section("27.2.4");
    address_space(checker);
}

fn registers(checker: &mut Checker<'_>) {
    let capabilities = checker.capabilities;
    let cr0 = checker.read(HOST_CR0);
    let unchecked = bits::CR0_NW | bits::CR0_CD;
    checker.require(
        HOST_CR0,
        !cr0 & capabilities.cr0_fixed0 & !unchecked == 0
            && cr0 & !capabilities.cr0_fixed1 & !unchecked == 0,
        "every bit must be as IA32_VMX_CR0_FIXED0 and FIXED1 allow",
    );
    let cr4 = checker.read(HOST_CR4);
    checker.require(
        HOST_CR4,
        !cr4 & capabilities.cr4_fixed0 == 0 && cr4 & !capabilities.cr4_fixed1 == 0,
        "every bit must be as IA32_VMX_CR4_FIXED0 and FIXED1 allow",
    );
    checker.require(
        HOST_CR4,
        cr4 & bits::CR4_CET == 0 || cr0 & bits::CR0_WP != 0,
        "CET needs CR0.WP",
    );
    checker.require_physical_width(HOST_CR3);
    checker.require_canonical(HOST_SYSENTER_ESP);
    checker.require_canonical(HOST_SYSENTER_EIP);
    if checker.exit & EXIT_LOAD_PAT != 0 {
        checker.require_pat(HOST_PAT);
    }
    if checker.exit & EXIT_LOAD_EFER != 0 {
        let efer = checker.read(HOST_EFER);
        checker.require(
            HOST_EFER,
            efer & !bits::EFER_DEFINED == 0,
            "must not set a reserved bit",
        );
        let wide = checker.exit & HOST_ADDRESS_SPACE_SIZE != 0;
        checker.require(
            HOST_EFER,
            (efer & bits::EFER_LMA != 0) == wide && (efer & bits::EFER_LME != 0) == wide,
            "LMA and LME must be as the control host address-space size",
        );
    }
}

fn segments(checker: &mut Checker<'_>) {
    for field in [
        HOST_ES, HOST_CS, HOST_SS, HOST_DS, HOST_FS, HOST_GS, HOST_TR,
    ] {
        let selector = checker.read(field);
        checker.require(field, selector & 7 == 0, "RPL and TI must be 0");
    }
    for field in [HOST_CS, HOST_TR] {
        let selector = checker.read(field);
        checker.require(field, selector != 0, "must not be 0");
    }
    for field in [
        HOST_FS_BASE,
        HOST_GS_BASE,
        HOST_GDTR_BASE,
        HOST_IDTR_BASE,
        HOST_TR_BASE,
    ] {
        checker.require_canonical(field);
    }
}

fn address_space(checker: &mut Checker<'_>) {
    checker.require(
        EXIT,
        checker.exit & HOST_ADDRESS_SPACE_SIZE != 0,
        "host address-space size must be 1 for a host in 64-bit mode",
    );
    let cr4 = checker.read(HOST_CR4);
    checker.require(
        HOST_CR4,
        cr4 & bits::CR4_PAE != 0,
        "a host in 64-bit mode needs PAE",
    );
    checker.require_canonical(HOST_RIP);
}
