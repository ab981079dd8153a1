//! The VMCS: its region, and its fields typed by width and by whether they can
//! be written, so that a field cannot be misused (SDM 3, chapter 25 and appendix B).

#[cfg(feature = "count-vmcs")]
use super::count;
use super::operation::VmxError;
use crate::addr::Hpa;
use crate::host::memory::{self, frames::FrameRange};
use core::arch::asm;
use core::marker::PhantomData;

/// Marks a field that VMWRITE may change.
pub struct ReadWrite;
/// Marks a VM-exit information field.
pub struct ReadOnly;

/// A field that holds a `V`.
pub struct Field<V, A = ReadWrite> {
    encoding: u32,
    marker: PhantomData<(V, A)>,
}

impl<V, A> Clone for Field<V, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V, A> Copy for Field<V, A> {}

impl<V, A> Field<V, A> {
    /// Its encoding, for the stubs.
    pub const fn encoding(self) -> u32 {
        self.encoding
    }

    const fn new(encoding: u32) -> Self {
        Self {
            encoding,
            marker: PhantomData,
        }
    }
}

/// The value of a field: 16, 32 or 64 bits (natural width is 64 here).
pub trait Value: Copy {
    fn widen(self) -> u64;
    fn narrow(bits: u64) -> Self;
}

macro_rules! value {
    ($($type:ty)*) => { $(
        impl Value for $type {
            #[inline(always)]
            fn widen(self) -> u64 { self.into() }
            #[inline(always)]
            #[allow(clippy::cast_possible_truncation)]
            fn narrow(bits: u64) -> Self { bits as $type }
        }
    )* };
}
value!(u16 u32 u64);

macro_rules! fields {
    ($(#[$doc:meta])* $visibility:vis $module:ident: $area:ident, $access:ident { $($name:ident: $type:ty = $encoding:ident;)* }) => {
        $(#[$doc])*
        $visibility mod $module {
            use super::{Field, $access};
            use x86::vmx::vmcs::$area as encoding;
            $(pub const $name: Field<$type, $access> = Field::new(encoding::$encoding);)*

            /// All of these, by their names, with their encodings.
            pub const ALL: &[(&str, u32)] = &[$((stringify!($name), encoding::$encoding)),*];
        }
    };
}

fields! {
    /// Controls (B.1.1, B.2.1, B.3.1, B.4.1).
    pub control: control, ReadWrite {
        VPID: u16 = VPID;
        POSTED_INTERRUPT_VECTOR: u16 = POSTED_INTERRUPT_NOTIFICATION_VECTOR;
        POSTED_INTERRUPT_DESCRIPTOR: u64 = POSTED_INTERRUPT_DESC_ADDR_FULL;
        VIRTUAL_APIC: u64 = VIRT_APIC_ADDR_FULL;
        APIC_ACCESS: u64 = APIC_ACCESS_ADDR_FULL;
        EOI_EXIT_0: u64 = EOI_EXIT0_FULL;
        EOI_EXIT_1: u64 = EOI_EXIT1_FULL;
        EOI_EXIT_2: u64 = EOI_EXIT2_FULL;
        EOI_EXIT_3: u64 = EOI_EXIT3_FULL;
        TPR_THRESHOLD: u32 = TPR_THRESHOLD;
        IO_BITMAP_A: u64 = IO_BITMAP_A_ADDR_FULL;
        IO_BITMAP_B: u64 = IO_BITMAP_B_ADDR_FULL;
        MSR_BITMAP: u64 = MSR_BITMAPS_ADDR_FULL;
        TSC_OFFSET: u64 = TSC_OFFSET_FULL;
        EPT_POINTER: u64 = EPTP_FULL;
        XSS_EXITING: u64 = XSS_EXITING_BITMAP_FULL;
        PIN: u32 = PINBASED_EXEC_CONTROLS;
        PRIMARY: u32 = PRIMARY_PROCBASED_EXEC_CONTROLS;
        SECONDARY: u32 = SECONDARY_PROCBASED_EXEC_CONTROLS;
        EXIT: u32 = VMEXIT_CONTROLS;
        ENTRY: u32 = VMENTRY_CONTROLS;
        EXCEPTION_BITMAP: u32 = EXCEPTION_BITMAP;
        PAGE_FAULT_MASK: u32 = PAGE_FAULT_ERR_CODE_MASK;
        PAGE_FAULT_MATCH: u32 = PAGE_FAULT_ERR_CODE_MATCH;
        CR3_TARGET_COUNT: u32 = CR3_TARGET_COUNT;
        PLE_GAP: u32 = PLE_GAP;
        PLE_WINDOW: u32 = PLE_WINDOW;
        EXIT_MSR_STORE_COUNT: u32 = VMEXIT_MSR_STORE_COUNT;
        EXIT_MSR_LOAD_COUNT: u32 = VMEXIT_MSR_LOAD_COUNT;
        ENTRY_MSR_LOAD_COUNT: u32 = VMENTRY_MSR_LOAD_COUNT;
        ENTRY_INTERRUPTION_INFO: u32 = VMENTRY_INTERRUPTION_INFO_FIELD;
        ENTRY_ERROR_CODE: u32 = VMENTRY_EXCEPTION_ERR_CODE;
        ENTRY_INSTRUCTION_LENGTH: u32 = VMENTRY_INSTRUCTION_LEN;
        CR0_MASK: u64 = CR0_GUEST_HOST_MASK;
        CR4_MASK: u64 = CR4_GUEST_HOST_MASK;
        CR0_SHADOW: u64 = CR0_READ_SHADOW;
        CR4_SHADOW: u64 = CR4_READ_SHADOW;
    }
}

fields! {
    /// Guest state (B.1.2, B.2.3, B.3.3, B.4.3).
    pub guest: guest, ReadWrite {
        ES_SELECTOR: u16 = ES_SELECTOR;
        CS_SELECTOR: u16 = CS_SELECTOR;
        SS_SELECTOR: u16 = SS_SELECTOR;
        DS_SELECTOR: u16 = DS_SELECTOR;
        FS_SELECTOR: u16 = FS_SELECTOR;
        GS_SELECTOR: u16 = GS_SELECTOR;
        LDTR_SELECTOR: u16 = LDTR_SELECTOR;
        TR_SELECTOR: u16 = TR_SELECTOR;
        INTERRUPT_STATUS: u16 = INTERRUPT_STATUS;
        LINK_POINTER: u64 = LINK_PTR_FULL;
        DEBUGCTL: u64 = IA32_DEBUGCTL_FULL;
        PAT: u64 = IA32_PAT_FULL;
        EFER: u64 = IA32_EFER_FULL;
        PDPTE0: u64 = PDPTE0_FULL;
        PDPTE1: u64 = PDPTE1_FULL;
        PDPTE2: u64 = PDPTE2_FULL;
        PDPTE3: u64 = PDPTE3_FULL;
        ES_LIMIT: u32 = ES_LIMIT;
        CS_LIMIT: u32 = CS_LIMIT;
        SS_LIMIT: u32 = SS_LIMIT;
        DS_LIMIT: u32 = DS_LIMIT;
        FS_LIMIT: u32 = FS_LIMIT;
        GS_LIMIT: u32 = GS_LIMIT;
        LDTR_LIMIT: u32 = LDTR_LIMIT;
        TR_LIMIT: u32 = TR_LIMIT;
        GDTR_LIMIT: u32 = GDTR_LIMIT;
        IDTR_LIMIT: u32 = IDTR_LIMIT;
        ES_ACCESS_RIGHTS: u32 = ES_ACCESS_RIGHTS;
        CS_ACCESS_RIGHTS: u32 = CS_ACCESS_RIGHTS;
        SS_ACCESS_RIGHTS: u32 = SS_ACCESS_RIGHTS;
        DS_ACCESS_RIGHTS: u32 = DS_ACCESS_RIGHTS;
        FS_ACCESS_RIGHTS: u32 = FS_ACCESS_RIGHTS;
        GS_ACCESS_RIGHTS: u32 = GS_ACCESS_RIGHTS;
        LDTR_ACCESS_RIGHTS: u32 = LDTR_ACCESS_RIGHTS;
        TR_ACCESS_RIGHTS: u32 = TR_ACCESS_RIGHTS;
        INTERRUPTIBILITY: u32 = INTERRUPTIBILITY_STATE;
        ACTIVITY: u32 = ACTIVITY_STATE;
        SYSENTER_CS: u32 = IA32_SYSENTER_CS;
        PREEMPTION_TIMER: u32 = VMX_PREEMPTION_TIMER_VALUE;
        CR0: u64 = CR0;
        CR3: u64 = CR3;
        CR4: u64 = CR4;
        ES_BASE: u64 = ES_BASE;
        CS_BASE: u64 = CS_BASE;
        SS_BASE: u64 = SS_BASE;
        DS_BASE: u64 = DS_BASE;
        FS_BASE: u64 = FS_BASE;
        GS_BASE: u64 = GS_BASE;
        LDTR_BASE: u64 = LDTR_BASE;
        TR_BASE: u64 = TR_BASE;
        GDTR_BASE: u64 = GDTR_BASE;
        IDTR_BASE: u64 = IDTR_BASE;
        DR7: u64 = DR7;
        RSP: u64 = RSP;
        RIP: u64 = RIP;
        RFLAGS: u64 = RFLAGS;
        PENDING_DEBUG: u64 = PENDING_DBG_EXCEPTIONS;
        SYSENTER_ESP: u64 = IA32_SYSENTER_ESP;
        SYSENTER_EIP: u64 = IA32_SYSENTER_EIP;
    }
}

fields! {
    /// Host state (B.1.3, B.2.4, B.3.4, B.4.4), which is nobody's business outside `vmx`.
    pub(super) host: host, ReadWrite {
        ES_SELECTOR: u16 = ES_SELECTOR;
        CS_SELECTOR: u16 = CS_SELECTOR;
        SS_SELECTOR: u16 = SS_SELECTOR;
        DS_SELECTOR: u16 = DS_SELECTOR;
        FS_SELECTOR: u16 = FS_SELECTOR;
        GS_SELECTOR: u16 = GS_SELECTOR;
        TR_SELECTOR: u16 = TR_SELECTOR;
        PAT: u64 = IA32_PAT_FULL;
        EFER: u64 = IA32_EFER_FULL;
        SYSENTER_CS: u32 = IA32_SYSENTER_CS;
        CR0: u64 = CR0;
        CR3: u64 = CR3;
        CR4: u64 = CR4;
        FS_BASE: u64 = FS_BASE;
        GS_BASE: u64 = GS_BASE;
        TR_BASE: u64 = TR_BASE;
        GDTR_BASE: u64 = GDTR_BASE;
        IDTR_BASE: u64 = IDTR_BASE;
        SYSENTER_ESP: u64 = IA32_SYSENTER_ESP;
        SYSENTER_EIP: u64 = IA32_SYSENTER_EIP;
        RSP: u64 = RSP;
        RIP: u64 = RIP;
    }
}

fields! {
    /// VM-exit information, read-only (B.2.2, B.3.2, B.4.2).
    pub information: ro, ReadOnly {
        GUEST_PHYSICAL_ADDRESS: u64 = GUEST_PHYSICAL_ADDR_FULL;
        INSTRUCTION_ERROR: u32 = VM_INSTRUCTION_ERROR;
        EXIT_REASON: u32 = EXIT_REASON;
        INTERRUPTION_INFO: u32 = VMEXIT_INTERRUPTION_INFO;
        INTERRUPTION_ERROR_CODE: u32 = VMEXIT_INTERRUPTION_ERR_CODE;
        IDT_VECTORING_INFO: u32 = IDT_VECTORING_INFO;
        IDT_VECTORING_ERROR_CODE: u32 = IDT_VECTORING_ERR_CODE;
        INSTRUCTION_LENGTH: u32 = VMEXIT_INSTRUCTION_LEN;
        INSTRUCTION_INFO: u32 = VMEXIT_INSTRUCTION_INFO;
        EXIT_QUALIFICATION: u64 = EXIT_QUALIFICATION;
        GUEST_LINEAR_ADDRESS: u64 = GUEST_LINEAR_ADDR;
    }
}

/// The VMCS that is current on this CPU.
///
/// There is one value of this type for each VMCS, made by [`Vmcs::load`]; it
/// must not leave the CPU, so it is not `Send`.
pub struct Vmcs {
    region: Hpa,
    not_send: PhantomData<*const ()>,
}

/// Every field that is used here, by area and name, with its encoding.
pub fn fields() -> impl Iterator<Item = (&'static str, &'static str, u32)> {
    let areas = [
        ("guest", guest::ALL),
        ("control", control::ALL),
        ("information", information::ALL),
        ("host", host::ALL),
    ];
    let named = |(area, all): (_, &'static [(&'static str, u32)])| {
        all.iter()
            .map(move |&(name, encoding)| (area, name, encoding))
    };
    areas.into_iter().flat_map(named)
}

impl Vmcs {
    /// Clears the region at `region`, a frame that becomes this value's own, and makes it current.
    ///
    /// # Errors
    /// What VMCLEAR or VMPTRLD says.
    ///
    /// # Safety
    /// The CPU is in VMX root operation; `region` is a page of its own that
    /// begins with the CPU's revision identifier, stays allocated as long as
    /// this value, and no other VMCS is used on this CPU meanwhile.
    pub unsafe fn load(region: Hpa) -> Result<Self, VmxError> {
        // SAFETY: the caller's promise covers both instructions.
        unsafe {
            VmxError::check(x86::bits64::vmx::vmclear(region.0))?;
            VmxError::check(x86::bits64::vmx::vmptrld(region.0))?;
        }
        Ok(Self {
            region,
            not_send: PhantomData,
        })
    }

    /// Makes it the current VMCS of its CPU again, where others have been meanwhile.
    pub fn make_current(&self) {
        // SAFETY: `load` has made it a VMCS of this CPU, which it is until it is dropped.
        let current = VmxError::check(unsafe { x86::bits64::vmx::vmptrld(self.region.0) });
        debug_assert!(current.is_ok());
    }

    /// Reads a field. A field that this CPU does not have reads as 0.
    #[inline(always)]
    pub fn read<V: Value, A>(&self, field: Field<V, A>) -> V {
        V::narrow(self.read_raw(field.encoding))
    }

    /// Reads a field that every CPU with VT-x has.
    #[inline(always)]
    pub fn read_basic<V: Value, A>(&self, field: Field<V, A>) -> V {
        #[cfg(feature = "count-vmcs")]
        count::read();
        let bits: u64;
        // SAFETY: as in `read_raw`; the field exists, so the register is written.
        unsafe {
            asm!("vmread {}, {}", out(reg) bits, in(reg) u64::from(field.encoding), options(nomem, nostack));
        }
        V::narrow(bits)
    }

    /// Reads by encoding, for reports that walk over fields.
    #[inline(always)]
    pub fn read_raw(&self, encoding: u32) -> u64 {
        #[cfg(feature = "count-vmcs")]
        count::read();
        let mut bits = 0u64;
        // SAFETY: `self` says that a VMCS is current; VMREAD touches nothing else. For an
        // unknown field it fails and leaves `bits` as it is.
        unsafe {
            asm!("vmread {}, {}", inout(reg) bits, in(reg) u64::from(encoding), options(nomem, nostack));
        }
        bits
    }

    /// Writes a field; a field that this CPU does not have is left alone.
    #[inline(always)]
    pub fn write<V: Value>(&mut self, field: Field<V, ReadWrite>, value: V) {
        #[cfg(feature = "count-vmcs")]
        count::write();
        // SAFETY: `self` says that a VMCS is current. What is written takes effect at the next
        // entry, whose caller answers for the state as a whole.
        unsafe {
            asm!("vmwrite {}, {}", in(reg) u64::from(field.encoding), in(reg) value.widen(), options(nomem, nostack));
        }
    }
}

impl Drop for Vmcs {
    /// Takes the VMCS off this CPU and gives its region back.
    fn drop(&mut self) {
        // SAFETY: the region is a VMCS (`load`), and nothing reads it afterwards.
        let cleared = VmxError::check(unsafe { x86::bits64::vmx::vmclear(self.region.0) });
        if cleared.is_ok() {
            let range = FrameRange {
                start: self.region,
                count: 1,
            };
            // SAFETY: the CPU has written the VMCS back and forgotten it; nobody else knew of it.
            let freed = unsafe { memory::free(range) };
            debug_assert!(freed.is_ok());
        }
    }
}
