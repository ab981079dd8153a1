//! Checks of the VMX controls (SDM vol. 3, 27.2.1).

use super::fields::*;
use super::{Checker, Event, bits};

// Pin-based controls (SDM vol. 3, 25.6.1).
pub const EXTERNAL_INTERRUPT_EXITING: u64 = 1 << 0;
pub const NMI_EXITING: u64 = 1 << 3;
pub const VIRTUAL_NMIS: u64 = 1 << 5;
pub const PREEMPTION_TIMER: u64 = 1 << 6;
pub const POSTED_INTERRUPTS: u64 = 1 << 7;

// Primary processor-based controls (25.6.2).
pub const TPR_SHADOW: u64 = 1 << 21;
pub const NMI_WINDOW_EXITING: u64 = 1 << 22;
pub const IO_BITMAPS: u64 = 1 << 25;
pub const MONITOR_TRAP_FLAG: u64 = 1 << 27;
pub const USE_MSR_BITMAPS: u64 = 1 << 28;
pub const SECONDARY_CONTROLS: u64 = 1 << 31;

// Secondary processor-based controls (25.6.2).
pub const VIRTUALIZE_APIC_ACCESSES: u64 = 1 << 0;
pub const ENABLE_EPT: u64 = 1 << 1;
pub const VIRTUALIZE_X2APIC: u64 = 1 << 4;
pub const ENABLE_VPID: u64 = 1 << 5;
pub const UNRESTRICTED_GUEST: u64 = 1 << 7;
pub const APIC_REGISTER_VIRTUALIZATION: u64 = 1 << 8;
pub const VIRTUAL_INTERRUPT_DELIVERY: u64 = 1 << 9;
pub const ENABLE_VM_FUNCTIONS: u64 = 1 << 13;
pub const VMCS_SHADOWING: u64 = 1 << 14;
pub const ENABLE_PML: u64 = 1 << 17;
pub const EPT_VIOLATION_VE: u64 = 1 << 18;
pub const MODE_BASED_EXECUTE: u64 = 1 << 22;
pub const SUB_PAGE_WRITE: u64 = 1 << 23;
pub const PT_GUEST_PHYSICAL: u64 = 1 << 24;
pub const TSC_SCALING: u64 = 1 << 25;

// VM-exit controls (25.7.1).
pub const HOST_ADDRESS_SPACE_SIZE: u64 = 1 << 9;
pub const ACKNOWLEDGE_INTERRUPT: u64 = 1 << 15;
pub const EXIT_LOAD_PAT: u64 = 1 << 19;
pub const EXIT_LOAD_EFER: u64 = 1 << 21;
pub const SAVE_PREEMPTION_TIMER: u64 = 1 << 22;

// VM-entry controls (25.8.1).
pub const LOAD_DEBUG_CONTROLS: u64 = 1 << 2;
pub const IA32E_MODE_GUEST: u64 = 1 << 9;
pub const ENTRY_TO_SMM: u64 = 1 << 10;
pub const DEACTIVATE_DUAL_MONITOR: u64 = 1 << 11;
pub const ENTRY_LOAD_PAT: u64 = 1 << 14;
pub const ENTRY_LOAD_EFER: u64 = 1 << 15;
pub const ENTRY_LOAD_BNDCFGS: u64 = 1 << 16;

const PAGE: u64 = 4096;
const PAGE_RULE: &str = "must be a multiple of 4096";

pub(super) fn check(checker: &mut Checker<'_>) {
    checker.section("27.2.1.1");
    execution(checker);
    apic(checker);
    posted_interrupts(checker);
    ept(checker);
    functions(checker);
    checker.section("27.2.1.2");
    exit(checker);
    checker.section("27.2.1.3");
    entry(checker);
    injection(checker);
}

/// `capability` has the bits that must be 1 below, those that may be 1 above (SDM vol. 3, A.2).
fn reserved(checker: &mut Checker<'_>, field: Field, capability: u64) {
    let value = checker.read(field);
    checker.require(
        field,
        value & capability as u32 as u64 == capability as u32 as u64,
        "must set every bit that the capability MSR fixes to 1",
    );
    checker.require(
        field,
        value & !(capability >> 32) == 0,
        "must not set a bit that the capability MSR does not allow",
    );
}

fn execution(checker: &mut Checker<'_>) {
    let capabilities = checker.capabilities;
    reserved(checker, PIN_BASED, capabilities.pin_based);
    reserved(checker, PRIMARY, capabilities.primary);
    if checker.primary & SECONDARY_CONTROLS != 0 {
        reserved(checker, SECONDARY, capabilities.secondary);
    }
    let targets = checker.read(CR3_TARGET_COUNT);
    checker.require(
        CR3_TARGET_COUNT,
        targets <= capabilities.misc >> 16 & 0x1ff,
        "must not be above the number that IA32_VMX_MISC reports",
    );
    if checker.primary & IO_BITMAPS != 0 {
        checker.require_physical(IO_BITMAP_A, PAGE, PAGE_RULE);
        checker.require_physical(IO_BITMAP_B, PAGE, PAGE_RULE);
    }
    if checker.primary & USE_MSR_BITMAPS != 0 {
        checker.require_physical(MSR_BITMAPS, PAGE, PAGE_RULE);
    }
    let virtual_nmis = checker.pin_based & VIRTUAL_NMIS != 0;
    checker.require(
        PIN_BASED,
        !virtual_nmis || checker.pin_based & NMI_EXITING != 0,
        "virtual NMIs need NMI exiting",
    );
    checker.require(
        PRIMARY,
        virtual_nmis || checker.primary & NMI_WINDOW_EXITING == 0,
        "NMI-window exiting needs virtual NMIs",
    );
    if checker.secondary & ENABLE_VPID != 0 {
        let vpid = checker.read(VPID);
        checker.require(VPID, vpid != 0, "must not be 0 when VPIDs are enabled");
    }
    if checker.secondary & TSC_SCALING != 0 {
        let multiplier = checker.read(TSC_MULTIPLIER);
        checker.require(
            TSC_MULTIPLIER,
            multiplier != 0,
            "must not be 0 when TSC scaling is used",
        );
    }
}

fn apic(checker: &mut Checker<'_>) {
    let secondary = checker.secondary;
    let delivery = secondary & VIRTUAL_INTERRUPT_DELIVERY != 0;
    if checker.primary & TPR_SHADOW != 0 {
        checker.require_physical(VIRTUAL_APIC, PAGE, PAGE_RULE);
        let threshold = checker.read(TPR_THRESHOLD);
        checker.require(
            TPR_THRESHOLD,
            delivery || threshold >> 4 == 0,
            "bits 31:4 must be 0",
        );
    } else {
        let needs = VIRTUALIZE_X2APIC | APIC_REGISTER_VIRTUALIZATION | VIRTUAL_INTERRUPT_DELIVERY;
        checker.require(SECONDARY, secondary & needs == 0,
            "x2APIC virtualization, APIC-register virtualization and virtual-interrupt delivery need the TPR shadow");
    }
    if secondary & VIRTUALIZE_APIC_ACCESSES != 0 {
        checker.require_physical(APIC_ACCESS, PAGE, PAGE_RULE);
    }
    let both = VIRTUALIZE_APIC_ACCESSES | VIRTUALIZE_X2APIC;
    checker.require(
        SECONDARY,
        secondary & both != both,
        "virtualize APIC accesses and virtualize x2APIC mode exclude each other",
    );
    checker.require(
        PIN_BASED,
        !delivery || checker.pin_based & EXTERNAL_INTERRUPT_EXITING != 0,
        "virtual-interrupt delivery needs external-interrupt exiting",
    );
}

fn posted_interrupts(checker: &mut Checker<'_>) {
    if checker.pin_based & POSTED_INTERRUPTS == 0 {
        return;
    }
    checker.require(
        PIN_BASED,
        checker.secondary & VIRTUAL_INTERRUPT_DELIVERY != 0,
        "posted interrupts need virtual-interrupt delivery",
    );
    checker.require(
        EXIT,
        checker.exit & ACKNOWLEDGE_INTERRUPT != 0,
        "posted interrupts need acknowledge interrupt on exit",
    );
    let vector = checker.read(POSTED_INTERRUPT_VECTOR);
    checker.require(
        POSTED_INTERRUPT_VECTOR,
        vector <= 0xff,
        "must be a vector, 0 to 255",
    );
    checker.require_physical(POSTED_INTERRUPT_DESCRIPTOR, 64, "must be a multiple of 64");
}

fn ept(checker: &mut Checker<'_>) {
    let secondary = checker.secondary;
    if secondary & ENABLE_EPT != 0 {
        eptp(checker);
    } else {
        for (control, rule) in [
            (UNRESTRICTED_GUEST, "unrestricted guest needs EPT"),
            (ENABLE_PML, "PML needs EPT"),
            (MODE_BASED_EXECUTE, "mode-based execute control needs EPT"),
            (SUB_PAGE_WRITE, "sub-page write permissions need EPT"),
            (
                PT_GUEST_PHYSICAL,
                "Intel PT with guest physical addresses needs EPT",
            ),
        ] {
            checker.require(SECONDARY, secondary & control == 0, rule);
        }
    }
    for (control, field) in [
        (ENABLE_PML, PML),
        (SUB_PAGE_WRITE, SPPTP),
        (EPT_VIOLATION_VE, VE_INFORMATION),
    ] {
        if secondary & control != 0 {
            checker.require_physical(field, PAGE, PAGE_RULE);
        }
    }
}

fn eptp(checker: &mut Checker<'_>) {
    let pointer = checker.read(EPTP);
    let capabilities = checker.capabilities.ept_vpid;
    let memory_type = match pointer & 7 {
        0 => capabilities.uncacheable_tables(),
        6 => capabilities.write_back_tables(),
        _ => false,
    };
    checker.require(
        EPTP,
        memory_type,
        "bits 2:0 must be a memory type that the CPU supports",
    );
    // 3 stands for four levels, 4 for five (IA32_VMX_EPT_VPID_CAP, bit 7).
    let length = match pointer >> 3 & 7 {
        3 => capabilities.four_levels(),
        4 => capabilities.0 >> 7 & 1 != 0,
        _ => false,
    };
    checker.require(
        EPTP,
        length,
        "bits 5:3 must be a page-walk length that the CPU supports, less 1",
    );
    checker.require(
        EPTP,
        pointer >> 6 & 1 == 0 || capabilities.accessed_dirty(),
        "bit 6 must be 0 where the CPU has no accessed and dirty bits",
    );
    // Bit 7 exists where bit 23 of the capabilities is set.
    let reserved = if capabilities.0 >> 23 & 1 != 0 {
        0xf00
    } else {
        0xf80
    };
    checker.require(EPTP, pointer & reserved == 0, "bits 11:7 are reserved");
    checker.require_physical_width(EPTP);
}

fn functions(checker: &mut Checker<'_>) {
    if checker.secondary & ENABLE_VM_FUNCTIONS != 0 {
        let functions = checker.read(VM_FUNCTIONS);
        checker.require(
            VM_FUNCTIONS,
            functions & !checker.capabilities.vm_functions == 0,
            "must not set a bit that IA32_VMX_VMFUNC does not allow",
        );
        if functions & 1 != 0 {
            checker.require(
                VM_FUNCTIONS,
                checker.secondary & ENABLE_EPT != 0,
                "EPTP switching needs EPT",
            );
            checker.require_physical(EPTP_LIST, PAGE, PAGE_RULE);
        }
    }
    if checker.secondary & VMCS_SHADOWING != 0 {
        checker.require_physical(VMREAD_BITMAP, PAGE, PAGE_RULE);
        checker.require_physical(VMWRITE_BITMAP, PAGE, PAGE_RULE);
    }
}

/// An area of 16-byte entries.
fn msr_area(checker: &mut Checker<'_>, address: Field, count: Field) {
    let entries = checker.read(count);
    if entries == 0 {
        return;
    }
    let start = checker.read(address);
    checker.require(address, start & 0xf == 0, "must be a multiple of 16");
    let last = start.saturating_add(entries.saturating_mul(16) - 1);
    checker.require(
        address,
        checker.is_physical(last),
        "the area must not pass the physical-address width",
    );
}

fn exit(checker: &mut Checker<'_>) {
    reserved(checker, EXIT, checker.capabilities.exit);
    let saves_timer = checker.exit & SAVE_PREEMPTION_TIMER != 0;
    checker.require(
        EXIT,
        !saves_timer || checker.pin_based & PREEMPTION_TIMER != 0,
        "saving the VMX-preemption timer needs the timer active",
    );
    msr_area(checker, EXIT_MSR_STORE, EXIT_MSR_STORE_COUNT);
    msr_area(checker, EXIT_MSR_LOAD, EXIT_MSR_LOAD_COUNT);
}

fn entry(checker: &mut Checker<'_>) {
    reserved(checker, ENTRY, checker.capabilities.entry);
    checker.require(
        ENTRY,
        checker.entry & (ENTRY_TO_SMM | DEACTIVATE_DUAL_MONITOR) == 0,
        "entry to SMM and deactivating dual-monitor treatment must be 0 outside SMM",
    );
    msr_area(checker, ENTRY_MSR_LOAD, ENTRY_MSR_LOAD_COUNT);
}

fn injection(checker: &mut Checker<'_>) {
    const FIELD: Field = ENTRY_INTERRUPTION_INFORMATION;
    let Some(event) = checker.injected() else {
        return;
    };
    let information = checker.read(FIELD);
    let trap_flag = checker.capabilities.primary >> 32 & MONITOR_TRAP_FLAG != 0;
    checker.require(
        FIELD,
        event.kind != Event::RESERVED && (event.kind != Event::OTHER || trap_flag),
        "bits 10:8 must be an event type that the CPU supports",
    );
    let vector = match event.kind {
        Event::NMI => event.vector == 2,
        Event::HARDWARE_EXCEPTION => event.vector <= 31,
        Event::OTHER => event.vector == 0,
        _ => true,
    };
    checker.require(FIELD, vector, "the vector must fit the event type");
    error_code(checker, event);
    checker.require(
        FIELD,
        information & 0x7fff_f000 == 0,
        "bits 30:12 are reserved",
    );
    if (Event::SOFTWARE_INTERRUPT..=Event::SOFTWARE_EXCEPTION).contains(&event.kind) {
        let length = checker.read(ENTRY_INSTRUCTION_LENGTH);
        let shortest = if checker.capabilities.misc >> 30 & 1 != 0 {
            0
        } else {
            1
        };
        checker.require(
            ENTRY_INSTRUCTION_LENGTH,
            (shortest..=15).contains(&length),
            "must be 1 to 15, or 0 where IA32_VMX_MISC allows it, for a software event",
        );
    }
}

fn error_code(checker: &mut Checker<'_>, event: Event) {
    let protected =
        checker.secondary & UNRESTRICTED_GUEST == 0 || checker.read(GUEST_CR0) & bits::CR0_PE != 0;
    let possible = protected && event.kind == Event::HARDWARE_EXCEPTION;
    // #CP has an error code on CPUs with CET only, where CR4.CET can be set.
    let control_protection = checker.capabilities.cr4_fixed1 & bits::CR4_CET != 0;
    let usual = match event.vector {
        8 | 10..=14 | 17 => true,
        21 => control_protection,
        _ => false,
    };
    // IA32_VMX_BASIC bit 56: any hardware exception, with or without.
    let any = checker.capabilities.basic >> 56 & 1 != 0;
    let valid = match (possible, event.delivers_error_code) {
        (false, delivers) => !delivers,
        (true, delivers) => any || delivers == usual,
    };
    checker.require(
        ENTRY_INTERRUPTION_INFORMATION,
        valid,
        "bit 11 must tell whether the event has an error code",
    );
    if event.delivers_error_code {
        let code = checker.read(ENTRY_ERROR_CODE);
        checker.require(ENTRY_ERROR_CODE, code >> 16 == 0, "bits 31:16 must be 0");
    }
}
