//! The VMCS fields that the checks read, with the names that the SDM gives them.

use x86::vmx::vmcs::{control, guest, host};

/// A VMCS field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    pub encoding: u32,
    pub name: &'static str,
}

/// The four fields of one guest segment register.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub selector: Field,
    pub base: Field,
    pub limit: Field,
    pub access_rights: Field,
}

macro_rules! fields {
    ($($constant:ident = $encoding:path, $name:literal;)*) => {
        $(pub const $constant: Field = Field { encoding: $encoding, name: $name };)*
    };
}

macro_rules! segments {
    ($($constant:ident = $selector:path, $base:path, $limit:path, $access_rights:path, $name:literal;)*) => {
        $(pub const $constant: Segment = Segment {
            selector: Field { encoding: $selector, name: concat!("guest ", $name, " selector") },
            base: Field { encoding: $base, name: concat!("guest ", $name, " base") },
            limit: Field { encoding: $limit, name: concat!("guest ", $name, " limit") },
            access_rights: Field {
                encoding: $access_rights,
                name: concat!("guest ", $name, " access rights"),
            },
        };)*
    };
}

fields! {
    VPID = control::VPID, "VPID";
    POSTED_INTERRUPT_VECTOR = control::POSTED_INTERRUPT_NOTIFICATION_VECTOR, "posted-interrupt notification vector";
    IO_BITMAP_A = control::IO_BITMAP_A_ADDR_FULL, "address of I/O bitmap A";
    IO_BITMAP_B = control::IO_BITMAP_B_ADDR_FULL, "address of I/O bitmap B";
    MSR_BITMAPS = control::MSR_BITMAPS_ADDR_FULL, "address of MSR bitmaps";
    EXIT_MSR_STORE = control::VMEXIT_MSR_STORE_ADDR_FULL, "VM-exit MSR-store address";
    EXIT_MSR_STORE_COUNT = control::VMEXIT_MSR_STORE_COUNT, "VM-exit MSR-store count";
    EXIT_MSR_LOAD = control::VMEXIT_MSR_LOAD_ADDR_FULL, "VM-exit MSR-load address";
    EXIT_MSR_LOAD_COUNT = control::VMEXIT_MSR_LOAD_COUNT, "VM-exit MSR-load count";
    ENTRY_MSR_LOAD = control::VMENTRY_MSR_LOAD_ADDR_FULL, "VM-entry MSR-load address";
    ENTRY_MSR_LOAD_COUNT = control::VMENTRY_MSR_LOAD_COUNT, "VM-entry MSR-load count";
    PML = control::PML_ADDR_FULL, "PML address";
    VIRTUAL_APIC = control::VIRT_APIC_ADDR_FULL, "virtual-APIC address";
    APIC_ACCESS = control::APIC_ACCESS_ADDR_FULL, "APIC-access address";
    POSTED_INTERRUPT_DESCRIPTOR = control::POSTED_INTERRUPT_DESC_ADDR_FULL, "posted-interrupt descriptor address";
    VM_FUNCTIONS = control::VM_FUNCTION_CONTROLS_FULL, "VM-function controls";
    EPTP = control::EPTP_FULL, "EPT pointer";
    EPTP_LIST = control::EPTP_LIST_ADDR_FULL, "EPTP-list address";
    VMREAD_BITMAP = control::VMREAD_BITMAP_ADDR_FULL, "VMREAD-bitmap address";
    VMWRITE_BITMAP = control::VMWRITE_BITMAP_ADDR_FULL, "VMWRITE-bitmap address";
    VE_INFORMATION = control::VIRT_EXCEPTION_INFO_ADDR_FULL, "virtualization-exception information address";
    SPPTP = control::SUBPAGE_PERM_TABLE_PTR_FULL, "sub-page-permission-table pointer";
    TSC_MULTIPLIER = control::TSC_MULTIPLIER_FULL, "TSC multiplier";
    PIN_BASED = control::PINBASED_EXEC_CONTROLS, "pin-based VM-execution controls";
    PRIMARY = control::PRIMARY_PROCBASED_EXEC_CONTROLS, "primary processor-based VM-execution controls";
    SECONDARY = control::SECONDARY_PROCBASED_EXEC_CONTROLS, "secondary processor-based VM-execution controls";
    EXIT = control::VMEXIT_CONTROLS, "VM-exit controls";
    ENTRY = control::VMENTRY_CONTROLS, "VM-entry controls";
    CR3_TARGET_COUNT = control::CR3_TARGET_COUNT, "CR3-target count";
    TPR_THRESHOLD = control::TPR_THRESHOLD, "TPR threshold";
    ENTRY_INTERRUPTION_INFORMATION = control::VMENTRY_INTERRUPTION_INFO_FIELD, "VM-entry interruption information";
    ENTRY_ERROR_CODE = control::VMENTRY_EXCEPTION_ERR_CODE, "VM-entry exception error code";
    ENTRY_INSTRUCTION_LENGTH = control::VMENTRY_INSTRUCTION_LEN, "VM-entry instruction length";
    HOST_CR0 = host::CR0, "host CR0";
    HOST_CR3 = host::CR3, "host CR3";
    HOST_CR4 = host::CR4, "host CR4";
    HOST_RIP = host::RIP, "host RIP";
    HOST_GDTR_BASE = host::GDTR_BASE, "host GDTR base";
    HOST_IDTR_BASE = host::IDTR_BASE, "host IDTR base";
    HOST_FS_BASE = host::FS_BASE, "host FS base";
    HOST_GS_BASE = host::GS_BASE, "host GS base";
    HOST_TR_BASE = host::TR_BASE, "host TR base";
    HOST_SYSENTER_ESP = host::IA32_SYSENTER_ESP, "host IA32_SYSENTER_ESP";
    HOST_SYSENTER_EIP = host::IA32_SYSENTER_EIP, "host IA32_SYSENTER_EIP";
    HOST_PAT = host::IA32_PAT_FULL, "host IA32_PAT";
    HOST_EFER = host::IA32_EFER_FULL, "host IA32_EFER";
    HOST_ES = host::ES_SELECTOR, "host ES selector";
    HOST_CS = host::CS_SELECTOR, "host CS selector";
    HOST_SS = host::SS_SELECTOR, "host SS selector";
    HOST_DS = host::DS_SELECTOR, "host DS selector";
    HOST_FS = host::FS_SELECTOR, "host FS selector";
    HOST_GS = host::GS_SELECTOR, "host GS selector";
    HOST_TR = host::TR_SELECTOR, "host TR selector";
    GUEST_CR0 = guest::CR0, "guest CR0";
    GUEST_CR3 = guest::CR3, "guest CR3";
    GUEST_CR4 = guest::CR4, "guest CR4";
    GUEST_DR7 = guest::DR7, "guest DR7";
    GUEST_RIP = guest::RIP, "guest RIP";
    GUEST_RFLAGS = guest::RFLAGS, "guest RFLAGS";
    GUEST_SYSENTER_ESP = guest::IA32_SYSENTER_ESP, "guest IA32_SYSENTER_ESP";
    GUEST_SYSENTER_EIP = guest::IA32_SYSENTER_EIP, "guest IA32_SYSENTER_EIP";
    GUEST_DEBUGCTL = guest::IA32_DEBUGCTL_FULL, "guest IA32_DEBUGCTL";
    GUEST_PAT = guest::IA32_PAT_FULL, "guest IA32_PAT";
    GUEST_EFER = guest::IA32_EFER_FULL, "guest IA32_EFER";
    GUEST_BNDCFGS = guest::IA32_BNDCFGS_FULL, "guest IA32_BNDCFGS";
    GUEST_PDPTE0 = guest::PDPTE0_FULL, "guest PDPTE0";
    GUEST_PDPTE1 = guest::PDPTE1_FULL, "guest PDPTE1";
    GUEST_PDPTE2 = guest::PDPTE2_FULL, "guest PDPTE2";
    GUEST_PDPTE3 = guest::PDPTE3_FULL, "guest PDPTE3";
    GUEST_GDTR_BASE = guest::GDTR_BASE, "guest GDTR base";
    GUEST_GDTR_LIMIT = guest::GDTR_LIMIT, "guest GDTR limit";
    GUEST_IDTR_BASE = guest::IDTR_BASE, "guest IDTR base";
    GUEST_IDTR_LIMIT = guest::IDTR_LIMIT, "guest IDTR limit";
    ACTIVITY_STATE = guest::ACTIVITY_STATE, "guest activity state";
    INTERRUPTIBILITY_STATE = guest::INTERRUPTIBILITY_STATE, "guest interruptibility state";
    PENDING_DEBUG_EXCEPTIONS = guest::PENDING_DBG_EXCEPTIONS, "guest pending debug exceptions";
    LINK_POINTER = guest::LINK_PTR_FULL, "VMCS link pointer";
}

segments! {
    ES = guest::ES_SELECTOR, guest::ES_BASE, guest::ES_LIMIT, guest::ES_ACCESS_RIGHTS, "ES";
    CS = guest::CS_SELECTOR, guest::CS_BASE, guest::CS_LIMIT, guest::CS_ACCESS_RIGHTS, "CS";
    SS = guest::SS_SELECTOR, guest::SS_BASE, guest::SS_LIMIT, guest::SS_ACCESS_RIGHTS, "SS";
    DS = guest::DS_SELECTOR, guest::DS_BASE, guest::DS_LIMIT, guest::DS_ACCESS_RIGHTS, "DS";
    FS = guest::FS_SELECTOR, guest::FS_BASE, guest::FS_LIMIT, guest::FS_ACCESS_RIGHTS, "FS";
    GS = guest::GS_SELECTOR, guest::GS_BASE, guest::GS_LIMIT, guest::GS_ACCESS_RIGHTS, "GS";
    LDTR = guest::LDTR_SELECTOR, guest::LDTR_BASE, guest::LDTR_LIMIT, guest::LDTR_ACCESS_RIGHTS, "LDTR";
    TR = guest::TR_SELECTOR, guest::TR_BASE, guest::TR_LIMIT, guest::TR_ACCESS_RIGHTS, "TR";
}
