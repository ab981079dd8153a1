//! From real mode, in which a start-up interrupt leaves a CPU, to 64-bit code on a stack.
//!
//! The code is copied to a page below 1 MiB, since the interrupt names a page
//! there, and executed where it lies: so the page is mapped at its own address, executable and
//! not writable, as long as CPUs are being started. Behind the code are the values that it loads.
//! Paging and long mode are entered at once (SDM 3, 11.8.5 allows it from real mode too, as CR0.PE
//! and CR0.PG may be set together); CR3 takes 32 bits there, so that a copy of the root of
//! the page tables is in the page behind, and the real one is loaded in 64-bit code.

use super::Cpu;
use crate::addr::{Hpa, Hva, PAGE_SIZE};
use crate::arch::{cpu, msr};
use crate::host::memory::paging::{self, FirmwareAccess, MapError};
use core::arch::global_asm;
use core::mem::offset_of;
use vireo_handoff::{BootInfo, MemoryKind};
use x86::msr::{IA32_EFER, IA32_PAT};
use x86_64::registers::control::{Cr0, Cr4};

/// Offset of [`Values`] in the page.
const VALUES: usize = 0x800;
/// The code's page, and that of the root.
const PAGES: u64 = 2;
/// Start-up vectors 0xa0 and up are reserved (SDM 3, 10.4.3), and that is where video memory is.
const END: u64 = 0xa_0000;

/// 64-bit code, ring 0, accessed.
const CODE: u64 = 0x00af_9b00_0000_ffff;
const CODE_SELECTOR: u16 = 8;

/// EFER: long mode is active, which the CPU sets.
const EFER_LMA: u64 = 1 << 10;
/// CR4: VMX operation is allowed, which each CPU decides.
const CR4_VMXE: u64 = 1 << 13;
/// CR4: process-context identifiers, which can be set in long mode only.
const CR4_PCIDE: u64 = 1 << 17;

/// What the code loads.
#[repr(C)]
struct Values {
    gdt: [u64; 2],
    gdt_limit: u16,
    gdt_base: [u16; 2],
    far_offset: [u16; 2],
    far_selector: u16,
    low_root: u32,
    cr0: u32,
    cr4: u32,
    efer: u32,
    pat: u64,
    root: u64,
    stack: u64,
    cpu: u64,
    main: u64,
}

global_asm!(
    ".pushsection .rodata.trampoline, \"a\"",
    ".code16",
    ".global vireo_trampoline",
    "vireo_trampoline:",
    "cli",
    "cld",
    "mov ax, cs",
    "mov ds, ax",
    "xor ebx, ebx",
    "mov bx, ax",
    "shl ebx, 4",
    "mov eax, dword ptr [{values} + {low_root}]",
    "mov cr3, eax",
    "mov eax, dword ptr [{values} + {cr4}]",
    "mov cr4, eax",
    "mov ecx, {ia32_efer}",
    "xor edx, edx",
    "mov eax, dword ptr [{values} + {efer}]",
    "wrmsr",
    "lgdt [{values} + {gdt_limit}]",
    "mov eax, dword ptr [{values} + {cr0}]",
    "mov cr0, eax",
    // A far jump through memory with a 32-bit offset: JMP m16:32.
    ".byte 0x66, 0xff, 0x2e",
    ".word {values} + {far_offset}",
    ".code64",
    ".global vireo_trampoline_long",
    "vireo_trampoline_long:",
    "mov ebx, ebx",
    "add rbx, {values}",
    "xor eax, eax",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov ecx, {ia32_pat}",
    "mov eax, dword ptr [rbx + {pat}]",
    "mov edx, dword ptr [rbx + {pat} + 4]",
    "wrmsr",
    "mov rsp, qword ptr [rbx + {stack}]",
    "mov rdi, qword ptr [rbx + {cpu}]",
    "mov rdx, qword ptr [rbx + {main}]",
    "mov rax, qword ptr [rbx + {root}]",
    "mov cr3, rax",
    "xor ebp, ebp",
    "call rdx",
    "ud2",
    ".global vireo_trampoline_end",
    "vireo_trampoline_end:",
    ".popsection",
    values = const VALUES,
    low_root = const offset_of!(Values, low_root),
    cr4 = const offset_of!(Values, cr4),
    efer = const offset_of!(Values, efer),
    cr0 = const offset_of!(Values, cr0),
    gdt_limit = const offset_of!(Values, gdt_limit),
    far_offset = const offset_of!(Values, far_offset),
    pat = const offset_of!(Values, pat),
    stack = const offset_of!(Values, stack),
    cpu = const offset_of!(Values, cpu),
    main = const offset_of!(Values, main),
    root = const offset_of!(Values, root),
    ia32_efer = const IA32_EFER,
    ia32_pat = const IA32_PAT,
);

unsafe extern "C" {
    static vireo_trampoline: u8;
    static vireo_trampoline_long: u8;
    static vireo_trampoline_end: u8;
}

/// The page that CPUs are started in. Unmapped when dropped.
pub(super) struct Trampoline {
    page: Hpa,
}

impl Trampoline {
    /// Takes the highest pages below 640 KiB that are RAM and free.
    ///
    /// # Errors
    /// When there are none, or no memory for the page tables.
    ///
    /// # Safety
    /// Nobody else uses memory below 1 MiB.
    pub(super) unsafe fn new(boot: &BootInfo) -> Result<Self, MapError> {
        let page = place(boot).ok_or(MapError::OutOfMemory)?;
        // SAFETY: free RAM, as the caller says, in the lower half where nothing of ours is.
        unsafe { paging::map_firmware(page, PAGE_SIZE, FirmwareAccess::Code)? };
        let code = paging::to_virt(page).0 as *mut u8;
        let root = cpu::page_table_root();
        let long = offset_of_label(&raw const vireo_trampoline_long);
        let low = |value: u64| [value as u16, (value >> 16) as u16];
        let base = page.0 + VALUES as u64;
        // SAFETY: EFER and PAT are in every CPU with long mode.
        let (efer, pat) = unsafe { (msr::read(IA32_EFER), msr::read(IA32_PAT)) };
        let values = Values {
            gdt: [0, CODE],
            gdt_limit: (size_of::<[u64; 2]>() - 1) as u16,
            gdt_base: low(base + offset_of!(Values, gdt) as u64),
            far_offset: low(page.0 + long as u64),
            far_selector: CODE_SELECTOR,
            low_root: (page.0 + PAGE_SIZE) as u32,
            cr0: Cr0::read_raw() as u32,
            cr4: (Cr4::read_raw() & !(CR4_VMXE | CR4_PCIDE)) as u32,
            efer: (efer & !EFER_LMA) as u32,
            pat,
            root: root.0,
            stack: 0,
            cpu: 0,
            main: super::main as *const () as u64,
        };
        // SAFETY: both pages are ours and in the direct map; the code is shorter than `VALUES`
        // (checked by a test of the image), and the root is a page of entries.
        unsafe {
            let len = offset_of_label(&raw const vireo_trampoline_end);
            code.copy_from_nonoverlapping(&raw const vireo_trampoline, len.min(VALUES));
            code.add(VALUES).cast::<Values>().write(values);
            code.add(PAGE_SIZE as usize)
                .copy_from_nonoverlapping(paging::to_virt(root).0 as *const u8, PAGE_SIZE as usize);
        }
        Ok(Self { page })
    }

    /// The number of the page, which a start-up interrupt names.
    pub(super) const fn page(&self) -> u8 {
        (self.page.0 / PAGE_SIZE) as u8
    }

    /// Whom the next start-up interrupt brings up, and on which stack.
    pub(super) fn aim(&mut self, cpu: &'static Cpu, stack: Hva) {
        let values = paging::to_virt(self.page).0 + VALUES as u64;
        let values = values as *mut Values;
        // SAFETY: written in `new`; CPUs that were started before have read theirs, and the next
        // one reads after the interrupt, before which the writes are visible (`local_apic::send`).
        unsafe {
            (&raw mut (*values).stack).write_volatile(stack.0);
            (&raw mut (*values).cpu).write_volatile(core::ptr::from_ref(cpu) as u64);
        }
    }
}

impl Drop for Trampoline {
    fn drop(&mut self) {
        // SAFETY: every CPU that has come through it is out of it.
        unsafe { paging::unmap_firmware(Hva(self.page.0)) };
    }
}

fn offset_of_label(label: *const u8) -> usize {
    label as usize - &raw const vireo_trampoline as usize
}

/// The highest place for it.
fn place(boot: &BootInfo) -> Option<Hpa> {
    boot.memory
        .iter()
        .filter(|region| region.kind == MemoryKind::Usable && region.start < END)
        .filter_map(|region| {
            let end = (region.start + region.len).min(END) & !(PAGE_SIZE - 1);
            let start = end.checked_sub(PAGES * PAGE_SIZE)?;
            // Page 0 has the real-mode interrupt vectors, which firmware may look at.
            (start >= region.start.max(PAGE_SIZE)).then_some(Hpa(start))
        })
        .max_by_key(|page| page.0)
}
