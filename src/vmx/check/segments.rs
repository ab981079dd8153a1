//! Checks of the guest's segment registers (SDM vol. 3, 27.3.1.2).

use super::control::{IA32E_MODE_GUEST, UNRESTRICTED_GUEST};
use super::fields::*;
use super::{Checker, bits};

/// The bit L of access rights: 64-bit mode.
pub(super) const LONG: u64 = 1 << 13;
const DEFAULT_32: u64 = 1 << 14;
const GRANULARITY: u64 = 1 << 15;
const UNUSABLE: u64 = 1 << 16;
const RESERVED: u64 = 0xfffe_0f00;

/// Those that programs load: all but LDTR and TR.
const CODE_AND_DATA: [Segment; 6] = [CS, SS, DS, ES, FS, GS];
const DATA: [Segment; 4] = [DS, ES, FS, GS];

/// The access rights of a segment register (SDM vol. 3, 25.4.1).
#[derive(Clone, Copy)]
struct AccessRights(u64);

impl AccessRights {
    const fn kind(self) -> u64 {
        self.0 & 0xf
    }
    const fn is_code_or_data(self) -> bool {
        self.0 >> 4 & 1 != 0
    }
    const fn dpl(self) -> u64 {
        self.0 >> 5 & 3
    }
    const fn is_present(self) -> bool {
        self.0 >> 7 & 1 != 0
    }
    const fn is_usable(self) -> bool {
        self.0 & UNUSABLE == 0
    }
}

pub(super) fn check(checker: &mut Checker<'_>) {
    bases(checker);
    if checker.read(GUEST_RFLAGS) & bits::RFLAGS_VM != 0 {
        virtual_8086(checker);
    } else {
        code(checker);
        stack(checker);
        data(checker);
    }
    task(checker);
    local_table(checker);
}

fn access_rights(checker: &Checker<'_>, segment: Segment) -> AccessRights {
    AccessRights(checker.read(segment.access_rights))
}

fn bases(checker: &mut Checker<'_>) {
    for segment in [TR, FS, GS] {
        checker.require_canonical(segment.base);
    }
    for segment in [CS, SS, DS, ES] {
        let base = checker.read(segment.base);
        let checked = segment.base == CS.base || access_rights(checker, segment).is_usable();
        checker.require(
            segment.base,
            !checked || base >> 32 == 0,
            "bits 63:32 must be 0",
        );
    }
}

fn virtual_8086(checker: &mut Checker<'_>) {
    for segment in CODE_AND_DATA {
        let base = checker.read(segment.base);
        let selector = checker.read(segment.selector);
        checker.require(
            segment.base,
            base == selector << 4,
            "must be 16 times the selector in virtual-8086 mode",
        );
        let limit = checker.read(segment.limit);
        checker.require(
            segment.limit,
            limit == 0xffff,
            "must be ffffH in virtual-8086 mode",
        );
        let rights = checker.read(segment.access_rights);
        checker.require(
            segment.access_rights,
            rights == 0xf3,
            "must be f3H in virtual-8086 mode",
        );
    }
}

/// What holds for every register that is usable, but for LDTR and TR bit S.
fn descriptor(checker: &mut Checker<'_>, segment: Segment, code_or_data: bool) {
    let field = segment.access_rights;
    let rights = access_rights(checker, segment);
    checker.require(
        field,
        rights.is_code_or_data() == code_or_data,
        if code_or_data {
            "S must be 1"
        } else {
            "S must be 0"
        },
    );
    checker.require(field, rights.is_present(), "P must be 1");
    checker.require(
        field,
        rights.0 & RESERVED == 0,
        "bits 11:8 and 31:17 are reserved",
    );
    let limit = checker.read(segment.limit);
    let in_pages = rights.0 & GRANULARITY != 0;
    checker.require(
        field,
        !in_pages || limit & 0xfff == 0xfff,
        "G must be 0 unless bits 11:0 of the limit are all 1",
    );
    checker.require(
        field,
        in_pages || limit >> 20 == 0,
        "G must be 1 when the limit has a bit of 31:20",
    );
}

fn code(checker: &mut Checker<'_>) {
    let field = CS.access_rights;
    let rights = access_rights(checker, CS);
    let stack_dpl = access_rights(checker, SS).dpl();
    let unrestricted = checker.secondary & UNRESTRICTED_GUEST != 0;
    let kind = matches!(rights.kind(), 9 | 11 | 13 | 15) || rights.kind() == 3 && unrestricted;
    checker.require(
        field,
        kind,
        "the type must be 9, 11, 13 or 15, or 3 for an unrestricted guest",
    );
    let (dpl, rule) = match rights.kind() {
        3 => (rights.dpl() == 0, "DPL must be 0 for type 3"),
        9 | 11 => (
            rights.dpl() == stack_dpl,
            "DPL must be that of SS for types 9 and 11",
        ),
        13 | 15 => (
            rights.dpl() <= stack_dpl,
            "DPL must not be above that of SS for types 13 and 15",
        ),
        _ => (true, ""),
    };
    checker.require(field, dpl, rule);
    let long = checker.entry & IA32E_MODE_GUEST != 0 && rights.0 & LONG != 0;
    checker.require(
        field,
        !long || rights.0 & DEFAULT_32 == 0,
        "D must be 0 in 64-bit mode",
    );
    descriptor(checker, CS, true);
}

fn stack(checker: &mut Checker<'_>) {
    let rights = access_rights(checker, SS);
    let code_kind = access_rights(checker, CS).kind();
    let rpl = checker.read(SS.selector) & 3;
    let protected = checker.read(GUEST_CR0) & bits::CR0_PE != 0;
    if checker.secondary & UNRESTRICTED_GUEST == 0 {
        let code_rpl = checker.read(CS.selector) & 3;
        checker.require(SS.selector, rpl == code_rpl, "RPL must be that of CS");
        checker.require(
            SS.access_rights,
            rights.dpl() == rpl,
            "DPL must be the selector's RPL",
        );
    }
    checker.require(
        SS.access_rights,
        rights.dpl() == 0 || protected && code_kind != 3,
        "DPL must be 0 when CS has type 3 and when CR0.PE is 0",
    );
    if rights.is_usable() {
        checker.require(
            SS.access_rights,
            matches!(rights.kind(), 3 | 7),
            "the type must be 3 or 7",
        );
        descriptor(checker, SS, true);
    }
}

fn data(checker: &mut Checker<'_>) {
    let unrestricted = checker.secondary & UNRESTRICTED_GUEST != 0;
    for segment in DATA {
        let field = segment.access_rights;
        let rights = access_rights(checker, segment);
        if !rights.is_usable() {
            continue;
        }
        checker.require(field, rights.kind() & 1 != 0, "the type must be accessed");
        checker.require(
            field,
            rights.kind() & 8 == 0 || rights.kind() & 2 != 0,
            "a code segment must be readable",
        );
        let rpl = checker.read(segment.selector) & 3;
        checker.require(
            field,
            unrestricted || rights.kind() > 11 || rights.dpl() >= rpl,
            "DPL must not be below the selector's RPL for types 0 to 11",
        );
        descriptor(checker, segment, true);
    }
}

fn task(checker: &mut Checker<'_>) {
    let selector = checker.read(TR.selector);
    checker.require(TR.selector, selector & 4 == 0, "TI must be 0");
    let rights = access_rights(checker, TR);
    checker.require(TR.access_rights, rights.is_usable(), "TR must be usable");
    let long = checker.entry & IA32E_MODE_GUEST != 0;
    checker.require(
        TR.access_rights,
        rights.kind() == 11 || rights.kind() == 3 && !long,
        "the type must be 11 (busy TSS), or 3 outside IA-32e mode",
    );
    descriptor(checker, TR, false);
}

fn local_table(checker: &mut Checker<'_>) {
    let rights = access_rights(checker, LDTR);
    if !rights.is_usable() {
        return;
    }
    let selector = checker.read(LDTR.selector);
    checker.require(LDTR.selector, selector & 4 == 0, "TI must be 0");
    checker.require_canonical(LDTR.base);
    checker.require(
        LDTR.access_rights,
        rights.kind() == 2,
        "the type must be 2 (LDT)",
    );
    descriptor(checker, LDTR, false);
}
