//! The guest's segment registers.

use super::*;

#[test]
fn guest_segments_outside_virtual_8086_mode() {
    let section = "27.3.1.2";
    let base = long_mode();
    each_alone(
        &base,
        section,
        &[
            (CS.base, 1 << 32),
            (SS.base, 1 << 32),
            (DS.base, 1 << 32),
            (ES.base, 1 << 32),
            (FS.base, CROOKED),
            (GS.base, CROOKED),
            (TR.base, CROOKED),
            (LDTR.base, CROOKED),
            (TR.selector, 4),
            (LDTR.selector, 4),
            (CS.access_rights, 0xa098),
            (CS.access_rights, 0xa08b),
            (CS.access_rights, 0xa0fb),
            (CS.access_rights, 0xa0ff),
            (CS.access_rights, 0xa0f3),
            (CS.access_rights, 0xa01b),
            (CS.access_rights, 0xa19b),
            (CS.access_rights, 0x2_a09b),
            (CS.access_rights, 0xe09b),
            (CS.access_rights, 0x209b),
            (SS.access_rights, 0xc091),
            (SS.access_rights, 0xc083),
            (SS.access_rights, 0xc013),
            (SS.access_rights, 0xc193),
            (SS.access_rights, 0x4093),
            (TR.access_rights, 0x83),
            (TR.access_rights, 0x9b),
            (TR.access_rights, 0x0b),
            (TR.access_rights, 0x18b),
            (TR.access_rights, 0x1_008b),
            (TR.access_rights, 0x808b),
            (LDTR.access_rights, 0x83),
            (LDTR.access_rights, 0x92),
            (LDTR.access_rights, 0x02),
            (LDTR.access_rights, 0x182),
        ],
    );
    each_yields_one(
        &base,
        section,
        &[
            (&[(CS.limit, 0xffff_f000)], CS.access_rights),
            (&[(SS.limit, 0xffff_fffe)], SS.access_rights),
            (&[(TR.limit, 0x10_0000)], TR.access_rights),
            (&[(LDTR.limit, 0x10_0000)], LDTR.access_rights),
        ],
    );
    for data in [DS, ES, FS, GS] {
        each_alone(
            &base,
            section,
            &[
                (data.access_rights, 0xc092),
                (data.access_rights, 0xc099),
                (data.access_rights, 0xc083),
                (data.access_rights, 0xc013),
                (data.access_rights, 0xc193),
                (data.access_rights, 0x4093),
            ],
        );
    }
    // An unusable register is not looked at, a null SS in 64-bit mode among them.
    for each in [SS, DS, ES, FS, GS, LDTR] {
        each_is_valid(&base, &[&segment(each, 0, 0, 0x1234_5678, 0x1_0000)]);
    }
    each_is_valid(
        &base,
        &[
            &[(CS.access_rights, 0xa09f)],
            &[(CS.access_rights, 0xa0fb), (SS.access_rights, 0xc0f3)],
            &[(CS.access_rights, 0xa09f), (SS.access_rights, 0xc0f3)],
            &[
                (FS.base, 0xffff_8000_0000_0000),
                (GS.base, 0x7fff_ffff_ffff),
            ],
        ],
    );
}

#[test]
fn guest_segments_of_a_restricted_guest() {
    let section = "27.3.1.2";
    let base = protected_mode().with(&[(SECONDARY, PROC2 & !UNRESTRICTED_GUEST)]);
    each_alone(
        &base,
        section,
        &[(CS.access_rights, 0xc093), (DS.access_rights, 0xc091 & !1)],
    );
    each_yields_one(
        &base,
        section,
        &[
            (&[(CS.selector, 0x13)], SS.selector),
            (&[(DS.selector, 0x1b)], DS.access_rights),
            (
                &[(CS.selector, 0x13), (SS.selector, 0x1b)],
                SS.access_rights,
            ),
        ],
    );
    each_is_valid(
        &base,
        &[
            &[(DS.selector, 0x1b), (DS.access_rights, 0xc0f3)],
            &[(DS.selector, 0x1b), (DS.access_rights, 0xc09f)],
            &[(TR.access_rights, 0x83)],
        ],
    );
}

#[test]
fn guest_segments_in_real_and_virtual_8086_mode() {
    let section = "27.3.1.2";
    each_yields_one(
        &real_mode(),
        section,
        &[(
            &[(SS.access_rights, 0xf3), (CS.access_rights, 0x9f)],
            SS.access_rights,
        )],
    );
    each_is_valid(&real_mode(), &[&[(CS.access_rights, 0x93)]]);
    for each in [CS, SS, DS, ES, FS, GS] {
        each_alone(
            &virtual_8086_mode(),
            section,
            &[
                (each.base, 0x1_2341),
                (each.limit, 0x1_ffff),
                (each.access_rights, 0x93),
            ],
        );
    }
}
