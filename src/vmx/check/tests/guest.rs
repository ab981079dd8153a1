//! The guest, but for its segment registers.

use super::*;

#[test]
fn guest_control_registers_and_msrs() {
    let section = "27.3.1.1";
    let base = long_mode();
    let entry = ENTRIES | IA32E_MODE_GUEST;
    each_alone(
        &base,
        section,
        &[
            (GUEST_CR0, 0x8001_0013),
            (GUEST_CR0, 1 << 32 | 0x8001_0033),
            (GUEST_CR0, 0x8001_0032),
            (GUEST_CR0, 0x0001_0033),
            (GUEST_CR3, WIDE),
            (GUEST_CR4, 0x20),
            (GUEST_CR4, 0x2020 | 1 << 12),
            (GUEST_CR4, 0x2000),
            (GUEST_DR7, 1 << 32 | 0x400),
            (GUEST_DEBUGCTL, 1 << 3),
            (GUEST_DEBUGCTL, 1 << 16),
            (GUEST_SYSENTER_ESP, CROOKED),
            (GUEST_SYSENTER_EIP, CROOKED),
            (GUEST_PAT, PAT | 2 << 24),
            (GUEST_PAT, 8 << 56),
            (GUEST_EFER, 0xd03),
            (GUEST_EFER, 0xc01),
        ],
    );
    each_yields_one(
        &base,
        section,
        &[
            (
                &[(ENTRY, entry | ENTRY_LOAD_BNDCFGS), (GUEST_BNDCFGS, 4)],
                GUEST_BNDCFGS,
            ),
            (
                &[
                    (ENTRY, entry | ENTRY_LOAD_BNDCFGS),
                    (GUEST_BNDCFGS, CROOKED),
                ],
                GUEST_BNDCFGS,
            ),
        ],
    );
    each_alone(
        &protected_mode(),
        section,
        &[(GUEST_CR4, 0x2_2020), (GUEST_EFER, 0xd00)],
    );
    each_alone(&real_mode(), section, &[(GUEST_EFER, 0x400)]);
    // LME may be set before paging is on; CD and NW are nobody's business.
    each_is_valid(&real_mode(), &[&[(GUEST_EFER, 0x100)]]);
    each_is_valid(
        &base,
        &[
            &[(GUEST_CR0, 0xe001_0033)],
            &[(GUEST_CR4, 0x2_2020)],
            &[(ENTRY, entry & !ENTRY_LOAD_EFER), (GUEST_EFER, 2)],
            &[(ENTRY, entry & !ENTRY_LOAD_PAT), (GUEST_PAT, 2)],
        ],
    );
    let restricted = real_mode().with(&[(SECONDARY, PROC2 & !UNRESTRICTED_GUEST)]);
    assert_eq!(restricted.violations()[0].field, GUEST_CR0.name);
}

#[test]
fn guest_tables_instruction_pointer_and_flags() {
    each_alone(
        &long_mode(),
        "27.3.1.3",
        &[
            (GUEST_GDTR_BASE, CROOKED),
            (GUEST_IDTR_BASE, CROOKED),
            (GUEST_GDTR_LIMIT, 0x1_0000),
            (GUEST_IDTR_LIMIT, 0x1_0000),
        ],
    );
    let section = "27.3.1.4";
    each_alone(
        &long_mode(),
        section,
        &[
            (GUEST_RIP, 1 << 48),
            (GUEST_RFLAGS, 0x200),
            (GUEST_RFLAGS, 0x20a),
            (GUEST_RFLAGS, 0x222),
            (GUEST_RFLAGS, 0x8202),
            (GUEST_RFLAGS, 1 << 22 | 0x202),
        ],
    );
    each_alone(&protected_mode(), section, &[(GUEST_RIP, 1 << 32)]);
    each_yields_one(
        &long_mode(),
        section,
        &[
            (&[(CS.access_rights, 0xc09b)], GUEST_RIP),
            (
                &[
                    (GUEST_RFLAGS, 2),
                    (ENTRY_INTERRUPTION_INFORMATION, VALID | 0x20),
                ],
                GUEST_RFLAGS,
            ),
        ],
    );
    // Not canonical, and yet allowed.
    each_is_valid(
        &long_mode(),
        &[
            &[(GUEST_RIP, CROOKED)],
            &[(GUEST_RFLAGS, 0x3f_7dd7 & !(1 << 17))],
        ],
    );
    let in_8086 = virtual_8086_mode();
    each_yields_one(
        &in_8086,
        section,
        &[(
            &[
                (ENTRY, ENTRIES | IA32E_MODE_GUEST),
                (GUEST_EFER, 0xd00),
                (TR.access_rights, 0x8b),
            ],
            GUEST_RFLAGS,
        )],
    );
}

#[test]
fn guest_non_register_state() {
    let section = "27.3.1.5";
    let base = long_mode();
    const EVENT: Field = ENTRY_INTERRUPTION_INFORMATION;
    let interrupt = (EVENT, VALID | 0x20);
    let nmi = (EVENT, VALID | 2 << 8 | 2);
    let machine_check = (EVENT, VALID | 3 << 8 | 18);
    let invalid_opcode = (EVENT, VALID | 3 << 8 | 6);
    each_alone(
        &base,
        section,
        &[
            (ACTIVITY_STATE, 4),
            (INTERRUPTIBILITY_STATE, 1 << 5),
            (INTERRUPTIBILITY_STATE, 3),
            (INTERRUPTIBILITY_STATE, 4),
            (INTERRUPTIBILITY_STATE, 0x12),
            (PENDING_DEBUG_EXCEPTIONS, 0x10),
            (PENDING_DEBUG_EXCEPTIONS, 1 << 13),
            (PENDING_DEBUG_EXCEPTIONS, 1 << 15),
            (PENDING_DEBUG_EXCEPTIONS, 1 << 17),
            (PENDING_DEBUG_EXCEPTIONS, 1 << 16),
            (LINK_POINTER, 0x800),
            (LINK_POINTER, WIDE),
        ],
    );
    let halted = (ACTIVITY_STATE, 1);
    let shut_down = (ACTIVITY_STATE, 2);
    let waiting = (ACTIVITY_STATE, 3);
    let stepping = (GUEST_RFLAGS, 0x302);
    each_yields_one(
        &base,
        section,
        &[
            (
                &[
                    halted,
                    (SS.access_rights, 0xc0f3),
                    (CS.access_rights, 0xa0fb),
                ],
                ACTIVITY_STATE,
            ),
            (&[halted, (INTERRUPTIBILITY_STATE, 1)], ACTIVITY_STATE),
            (&[halted, invalid_opcode], ACTIVITY_STATE),
            (&[shut_down, interrupt], ACTIVITY_STATE),
            (&[waiting, nmi], ACTIVITY_STATE),
            (
                &[(INTERRUPTIBILITY_STATE, 1), (GUEST_RFLAGS, 2)],
                INTERRUPTIBILITY_STATE,
            ),
            (
                &[(INTERRUPTIBILITY_STATE, 1), interrupt],
                INTERRUPTIBILITY_STATE,
            ),
            (
                &[(INTERRUPTIBILITY_STATE, 2), interrupt],
                INTERRUPTIBILITY_STATE,
            ),
            (&[(INTERRUPTIBILITY_STATE, 2), nmi], INTERRUPTIBILITY_STATE),
            (&[(INTERRUPTIBILITY_STATE, 1), nmi], INTERRUPTIBILITY_STATE),
            (&[(INTERRUPTIBILITY_STATE, 8), nmi], INTERRUPTIBILITY_STATE),
            (&[halted, stepping], PENDING_DEBUG_EXCEPTIONS),
            (
                &[(INTERRUPTIBILITY_STATE, 1), stepping],
                PENDING_DEBUG_EXCEPTIONS,
            ),
            (
                &[halted, (PENDING_DEBUG_EXCEPTIONS, 1 << 14)],
                PENDING_DEBUG_EXCEPTIONS,
            ),
        ],
    );
    each_is_valid(
        &base,
        &[
            &[halted, interrupt],
            &[halted, nmi],
            &[halted, machine_check],
            &[halted, (EVENT, VALID | 7 << 8)],
            &[shut_down, machine_check],
            &[waiting],
            &[halted, stepping, (PENDING_DEBUG_EXCEPTIONS, 1 << 14)],
            &[halted, stepping, (GUEST_DEBUGCTL, 2)],
            &[stepping],
            &[(PENDING_DEBUG_EXCEPTIONS, 1 << 16 | 1 << 12)],
            &[(LINK_POINTER, 0x1000)],
        ],
    );
    let no_waiting = Capabilities {
        misc: CPU.misc & !(1 << 8),
        ..CPU
    };
    let found = check(&base.with(&[waiting]), &no_waiting);
    assert_eq!(found[0].field, ACTIVITY_STATE.name);
}

#[test]
fn guest_page_directory_pointers() {
    let section = "27.3.1.6";
    for field in [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3] {
        each_alone(
            &protected_mode(),
            section,
            &[
                (field, 0x1003),
                (field, 0x1101),
                (field, WIDE | 1),
                (field, 1 << 63 | 1),
            ],
        );
        each_is_valid(&long_mode(), &[&[(field, 0x1003)]]);
    }
}
