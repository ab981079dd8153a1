//! Controls and host state.

use super::*;

#[test]
fn execution_controls() {
    let base = long_mode();
    let section = "27.2.1.1";
    each_alone(
        &base,
        section,
        &[
            (PIN_BASED, PIN & !2),
            (PIN_BASED, PIN | 1 << 8),
            (PIN_BASED, PIN & !NMI_EXITING),
            (PRIMARY, PROC & !2),
            (PRIMARY, PROC | 1),
            (SECONDARY, PROC2 | 1 << 15),
            (
                SECONDARY,
                PROC2 | VIRTUALIZE_APIC_ACCESSES | VIRTUALIZE_X2APIC,
            ),
            (SECONDARY, PROC2 & !ENABLE_EPT),
            (SECONDARY, ENABLE_PML),
            (SECONDARY, MODE_BASED_EXECUTE),
            (SECONDARY, SUB_PAGE_WRITE),
            (CR3_TARGET_COUNT, 5),
            (IO_BITMAP_A, 0x1800),
            (IO_BITMAP_A, WIDE),
            (IO_BITMAP_B, 0x2001),
            (MSR_BITMAPS, 0x3010),
            (MSR_BITMAPS, WIDE),
            (VIRTUAL_APIC, 0x4008),
            (TPR_THRESHOLD, 0x10),
            (VPID, 0),
            (TSC_MULTIPLIER, 0),
            (EPTP, 0x5059),
            (EPTP, 0x505e & !0x38),
            (EPTP, 0x505e | 0x38),
            (EPTP, 0x50de),
            (EPTP, 0x585e),
            (EPTP, WIDE | 0x5e),
        ],
    );
    let secondary = |bits| (SECONDARY, PROC2 | bits);
    each_yields_one(
        &base,
        section,
        &[
            (
                &[
                    (PIN_BASED, PIN & !VIRTUAL_NMIS),
                    (PRIMARY, PROC | NMI_WINDOW_EXITING),
                ],
                PRIMARY,
            ),
            (
                &[(PRIMARY, PROC & !TPR_SHADOW), secondary(VIRTUALIZE_X2APIC)],
                SECONDARY,
            ),
            (
                &[secondary(VIRTUALIZE_APIC_ACCESSES), (APIC_ACCESS, 0x800)],
                APIC_ACCESS,
            ),
            (
                &[secondary(VIRTUAL_INTERRUPT_DELIVERY), (PIN_BASED, PIN & !1)],
                PIN_BASED,
            ),
            (&[secondary(ENABLE_PML), (PML, 1)], PML),
            (&[secondary(SUB_PAGE_WRITE), (SPPTP, 1)], SPPTP),
            (
                &[secondary(EPT_VIOLATION_VE), (VE_INFORMATION, 1)],
                VE_INFORMATION,
            ),
            (
                &[secondary(ENABLE_VM_FUNCTIONS), (VM_FUNCTIONS, 2)],
                VM_FUNCTIONS,
            ),
            (
                &[
                    secondary(ENABLE_VM_FUNCTIONS),
                    (VM_FUNCTIONS, 1),
                    (EPTP_LIST, 8),
                ],
                EPTP_LIST,
            ),
            (
                &[(SECONDARY, ENABLE_VM_FUNCTIONS), (VM_FUNCTIONS, 1)],
                VM_FUNCTIONS,
            ),
            (
                &[secondary(VMCS_SHADOWING), (VMREAD_BITMAP, 1)],
                VMREAD_BITMAP,
            ),
            (
                &[secondary(VMCS_SHADOWING), (VMWRITE_BITMAP, WIDE)],
                VMWRITE_BITMAP,
            ),
        ],
    );
    let posted = base.with(&[
        (PIN_BASED, PIN | POSTED_INTERRUPTS),
        secondary(VIRTUAL_INTERRUPT_DELIVERY),
    ]);
    each_alone(
        &posted,
        section,
        &[
            (EXIT, EXITS & !ACKNOWLEDGE_INTERRUPT),
            (POSTED_INTERRUPT_VECTOR, 0x100),
            (POSTED_INTERRUPT_DESCRIPTOR, 0x20),
            (POSTED_INTERRUPT_DESCRIPTOR, WIDE),
        ],
    );
    each_yields_one(&posted, section, &[(&[(SECONDARY, PROC2)], PIN_BASED)]);
    each_is_valid(&posted, &[&[], &[(TPR_THRESHOLD, 0x10)]]);
    // Fields of controls that are off are free.
    each_is_valid(
        &base,
        &[
            &[(PRIMARY, PROC & !IO_BITMAPS), (IO_BITMAP_A, 1)],
            &[
                (PRIMARY, PROC & !SECONDARY_CONTROLS),
                (SECONDARY, u64::MAX >> 32),
            ],
            &[(APIC_ACCESS, 1), (PML, 1), (POSTED_INTERRUPT_DESCRIPTOR, 1)],
        ],
    );
}

#[test]
fn exit_and_entry_controls() {
    let base = long_mode();
    each_alone(
        &base,
        "27.2.1.2",
        &[(EXIT, EXITS & !1), (EXIT, EXITS | 1 << 23)],
    );
    each_yields_one(
        &base,
        "27.2.1.2",
        &[
            (&[(PIN_BASED, PIN & !PREEMPTION_TIMER)], EXIT),
            (
                &[(EXIT_MSR_STORE_COUNT, 1), (EXIT_MSR_STORE, 8)],
                EXIT_MSR_STORE,
            ),
            (
                &[(EXIT_MSR_LOAD_COUNT, 2), (EXIT_MSR_LOAD, WIDE - 16)],
                EXIT_MSR_LOAD,
            ),
        ],
    );
    let entry = ENTRIES | IA32E_MODE_GUEST;
    each_alone(
        &base,
        "27.2.1.3",
        &[
            (ENTRY, entry & !1),
            (ENTRY, entry | 1 << 17),
            (ENTRY, entry | ENTRY_TO_SMM),
            (ENTRY, entry | DEACTIVATE_DUAL_MONITOR),
        ],
    );
    each_yields_one(
        &base,
        "27.2.1.3",
        &[(
            &[(ENTRY_MSR_LOAD_COUNT, 1), (ENTRY_MSR_LOAD, 8)],
            ENTRY_MSR_LOAD,
        )],
    );
    each_is_valid(
        &base,
        &[
            &[(EXIT_MSR_LOAD_COUNT, 1), (EXIT_MSR_LOAD, WIDE - 16)],
            &[(EXIT_MSR_LOAD, 1)],
        ],
    );
}

#[test]
fn injected_events() {
    const EVENT: Field = ENTRY_INTERRUPTION_INFORMATION;
    let base = long_mode();
    each_alone(
        &base,
        "27.2.1.3",
        &[
            (EVENT, VALID | 1 << 8 | 0x20),
            (EVENT, VALID | 2 << 8 | 3),
            (EVENT, VALID | 3 << 8 | 32),
            (EVENT, VALID | 7 << 8 | 1),
            (EVENT, VALID | 3 << 8 | 13),
            (EVENT, VALID | 1 << 11 | 3 << 8 | 6),
            (EVENT, VALID | 1 << 11 | 0x20),
            (EVENT, VALID | 1 << 12 | 0x20),
        ],
    );
    let fault = VALID | 1 << 11 | 3 << 8 | 13;
    let software = VALID | 4 << 8 | 0x80;
    each_yields_one(
        &base,
        "27.2.1.3",
        &[
            (
                &[(EVENT, fault), (ENTRY_ERROR_CODE, 0x1_0000)],
                ENTRY_ERROR_CODE,
            ),
            (
                &[(EVENT, software), (ENTRY_INSTRUCTION_LENGTH, 16)],
                ENTRY_INSTRUCTION_LENGTH,
            ),
        ],
    );
    // In real mode no exception has an error code.
    each_alone(&real_mode(), "27.2.1.3", &[(EVENT, fault)]);
    each_is_valid(&real_mode(), &[&[(EVENT, fault & !(1 << 11))]]);
    each_is_valid(
        &base,
        &[
            &[(EVENT, fault)],
            &[(EVENT, VALID | 0x20)],
            &[(EVENT, VALID | 2 << 8 | 2)],
            &[(EVENT, VALID | 7 << 8)],
            &[(EVENT, software)],
            &[(EVENT, software), (ENTRY_INSTRUCTION_LENGTH, 2)],
            &[(EVENT, 0x7fff_ffff)],
        ],
    );
    let state = base.with(&[(EVENT, software)]);
    let no_zero_length = Capabilities {
        misc: CPU.misc & !(1 << 30),
        ..CPU
    };
    assert_eq!(
        check(&state, &no_zero_length)[0].field,
        ENTRY_INSTRUCTION_LENGTH.name
    );
    let free_error_code = Capabilities {
        basic: CPU.basic | 1 << 56,
        ..CPU
    };
    assert_eq!(
        check(&base.with(&[(EVENT, fault & !(1 << 11))]), &free_error_code),
        []
    );
}

#[test]
fn host_state() {
    let base = long_mode();
    each_alone(
        &base,
        "27.2.2",
        &[
            (HOST_CR0, 0x8001_0013),
            (HOST_CR0, 1 << 32 | 0x8001_0033),
            (HOST_CR4, 0x20),
            (HOST_CR4, 0x2020 | 1 << 12),
            (HOST_CR3, WIDE),
            (HOST_SYSENTER_ESP, CROOKED),
            (HOST_SYSENTER_EIP, CROOKED),
            (HOST_PAT, PAT | 2 << 24),
            (HOST_EFER, 0xd03),
            (HOST_EFER, 0x901),
            (HOST_EFER, 0xc01),
        ],
    );
    each_alone(
        &base,
        "27.2.3",
        &[
            (HOST_ES, 3),
            (HOST_CS, 0xc),
            (HOST_CS, 0),
            (HOST_SS, 0x13),
            (HOST_DS, 1),
            (HOST_FS, 2),
            (HOST_GS, 4),
            (HOST_TR, 0),
            (HOST_TR, 0x1c),
            (HOST_FS_BASE, CROOKED),
            (HOST_GS_BASE, CROOKED),
            (HOST_TR_BASE, CROOKED),
            (HOST_GDTR_BASE, CROOKED),
            (HOST_IDTR_BASE, CROOKED),
        ],
    );
    each_alone(&base, "27.2.4", &[(HOST_CR4, 0x2000), (HOST_RIP, CROOKED)]);
    each_yields_one(
        &base,
        "27.2.4",
        &[(
            &[(EXIT, EXITS & !HOST_ADDRESS_SPACE_SIZE), (HOST_EFER, 1)],
            EXIT,
        )],
    );
}

#[test]
fn rules_that_depend_on_the_cpu() {
    let fields = |state: &State, cpu: &Capabilities| -> Vec<_> {
        let found = check(state, cpu);
        found.iter().map(|each| each.field).collect()
    };
    let base = long_mode();
    let no_dirty_bits = Capabilities {
        ept_vpid: EptVpidCapabilities(CPU.ept_vpid.0 & !(1 << 21)),
        ..CPU
    };
    assert_eq!(fields(&base, &no_dirty_bits), [EPTP.name]);
    let tracing = Capabilities {
        secondary: CPU.secondary | PT_GUEST_PHYSICAL << 32,
        ..CPU
    };
    let state = base.with(&[(SECONDARY, PT_GUEST_PHYSICAL)]);
    assert_eq!(fields(&state, &tracing), [SECONDARY.name]);
    let with_cet = Capabilities {
        cr4_fixed1: CPU.cr4_fixed1 | bits::CR4_CET,
        ..CPU
    };
    for (cr0, cr4) in [(HOST_CR0, HOST_CR4), (GUEST_CR0, GUEST_CR4)] {
        let state = base.with(&[(cr4, 0x2020 | bits::CR4_CET)]);
        assert_eq!(fields(&state, &with_cet), [""; 0]);
        let state = state.with(&[(cr0, 0x8000_0033)]);
        assert_eq!(fields(&state, &with_cet), [cr4.name]);
    }
}
