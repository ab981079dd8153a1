//! The hypervisor's place in memory, its page tables, and the way into it.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::arch::naked_asm;
use core::ops::Range;
use object::LittleEndian;
use object::elf::{FileHeader64, PF_W, PF_X, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use uefi::boot::{self, AllocateType};
use vireo_boot::paging::{Access, OutOfMemory, PageTables, TableMemory};
use vireo_handoff::layout;

/// The kernel, embedded: one file is flashed.
static KERNEL: &[u8] = include_bytes!(env!("VIREO_KERNEL"));

pub const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
/// Pages for tables that are allocated at a time.
const TABLES: u64 = 32;

/// Whole pages; their physical address. They are never given back.
pub fn pages(count: usize) -> Option<u64> {
    boot::allocate_pages(AllocateType::AnyPages, boot::MemoryType::LOADER_CODE, count)
        .ok()
        .map(|start| start.as_ptr() as u64)
}

struct Segment {
    virt: u64,
    phys: u64,
    len: u64,
    access: Access,
}

/// The kernel in memory.
pub struct Kernel {
    /// Where it lies physically, contiguous from [`layout::KERNEL`] on, whole pages.
    pub range: Range<u64>,
    entry: u64,
    segments: Vec<Segment>,
}

impl Kernel {
    /// Loads the segments.
    ///
    /// # Errors
    /// A sentence.
    pub fn place() -> Result<Self, String> {
        let broken = |_| "the embedded kernel is no ELF file".to_string();
        let header = FileHeader64::<LittleEndian>::parse(KERNEL).map_err(broken)?;
        let loads = header
            .program_headers(LittleEndian, KERNEL)
            .map_err(broken)?
            .iter()
            .filter(|segment| segment.p_type(LittleEndian) == PT_LOAD);
        let end = loads
            .clone()
            .map(|segment| segment.p_vaddr(LittleEndian) + segment.p_memsz(LittleEndian))
            .max()
            .ok_or("the embedded kernel is empty")?;
        let len = (end - layout::KERNEL).next_multiple_of(PAGE);
        let start = pages(((len + LARGE_PAGE) / PAGE) as usize)
            .ok_or("no memory is left for the hypervisor")?
            .next_multiple_of(LARGE_PAGE);
        // SAFETY: the block is inside the pages just allocated.
        unsafe { core::ptr::write_bytes(start as *mut u8, 0, len as usize) };
        let mut segments = Vec::new();
        for segment in loads {
            let data = segment
                .data(LittleEndian, KERNEL)
                .map_err(|()| "the embedded kernel is truncated")?;
            let virt = segment.p_vaddr(LittleEndian);
            let phys = start + (virt - layout::KERNEL);
            // SAFETY: the segment lies inside the block, whose length was taken from the last one.
            unsafe { core::ptr::copy_nonoverlapping(data.as_ptr(), phys as *mut u8, data.len()) };
            let flags = segment.p_flags(LittleEndian);
            let access = match (flags.contains(PF_W), flags.contains(PF_X)) {
                (true, true) => {
                    return Err("the kernel has a writable and executable segment".into());
                }
                (true, false) => Access::ReadWrite,
                (false, true) => Access::ReadExecute,
                (false, false) => Access::Read,
            };
            segments.push(Segment {
                virt,
                phys,
                len: segment.p_memsz(LittleEndian).next_multiple_of(PAGE),
                access,
            });
        }
        Ok(Self {
            range: start..start + len,
            entry: header.e_entry(LittleEndian),
            segments,
        })
    }

    /// The address space that `vireo_handoff` describes, over the memory `ram`.
    ///
    /// # Errors
    /// A sentence.
    pub fn map(&self, ram: &[Range<u64>]) -> Result<AddressSpace, String> {
        let no_memory = |_: OutOfMemory| "no memory is left for page tables".to_string();
        let mut tables = PageTables::new(Frames::default()).map_err(no_memory)?;
        for segment in &self.segments {
            tables
                .map(segment.virt, segment.phys, segment.len, segment.access)
                .map_err(no_memory)?;
        }
        tables
            .map_direct(layout::DIRECT_MAP, ram, self.range.clone())
            .map_err(no_memory)?;
        let gate = pages(1).ok_or("no memory is left for the way into the kernel")?;
        // SAFETY: the page is new, and the code is shorter than this and independent of its place.
        unsafe { core::ptr::copy_nonoverlapping(trampoline as *const u8, gate as *mut u8, 64) };
        tables
            .map(gate, gate, PAGE, Access::ReadExecute)
            .map_err(no_memory)?;
        Ok(AddressSpace {
            root: tables.root(),
            gate,
            entry: self.entry,
            tables: tables.into_memory().blocks,
        })
    }
}

/// Everything that the jump needs.
pub struct AddressSpace {
    root: u64,
    /// The page of the jump, mapped where it is.
    gate: u64,
    entry: u64,
    /// Where the tables lie.
    pub tables: Vec<Range<u64>>,
}

impl AddressSpace {
    /// Enters the kernel with the handoff at the physical address `handoff`.
    ///
    /// # Safety
    /// The firmware is no longer needed, and the handoff is complete.
    pub unsafe fn enter(&self, handoff: u64) -> ! {
        // SAFETY: the tables map the gate where it is, the kernel where it was linked, and the
        // handoff in the direct map; NXE comes before tables that use NX. Nothing is dropped: the
        // call does not return.
        unsafe {
            enable_protections();
            let gate: extern "sysv64" fn(u64, u64, u64) -> ! = core::mem::transmute(self.gate);
            gate(layout::DIRECT_MAP + handoff, self.root, self.entry)
        }
    }
}

/// Frames for tables, allocated in blocks.
#[derive(Default)]
struct Frames {
    blocks: Vec<Range<u64>>,
    free: Range<u64>,
}

impl TableMemory for Frames {
    fn allocate(&mut self) -> Option<u64> {
        if self.free.is_empty() {
            let start = pages(TABLES as usize)?;
            self.free = start..start + TABLES * PAGE;
            self.blocks.push(self.free.clone());
        }
        let frame = self.free.start;
        self.free.start += PAGE;
        // SAFETY: inside a block of our own, not in use; the firmware maps memory where it is.
        unsafe { core::ptr::write_bytes(frame as *mut u8, 0, PAGE as usize) };
        Some(frame)
    }

    fn read(&self, address: u64) -> u64 {
        // SAFETY: inside a frame from `allocate`.
        unsafe { (address as *const u64).read() }
    }

    fn write(&mut self, address: u64, value: u64) {
        // SAFETY: inside a frame from `allocate`.
        unsafe { (address as *mut u64).write(value) }
    }
}

/// EFER.NXE and CR0.WP, with interrupts off.
///
/// # Safety
/// At CPL 0, when the firmware is no longer needed.
unsafe fn enable_protections() {
    // SAFETY: every CPU with 64-bit mode that runs this has NX; the firmware's tables have no
    // reserved bit set.
    unsafe {
        core::arch::asm!(
            "cli",
            "mov ecx, 0xc0000080",
            "rdmsr",
            "or eax, 0x800",
            "wrmsr",
            "mov rax, cr0",
            "or rax, 0x10000",
            "mov cr0, rax",
            out("rax") _, out("rcx") _, out("rdx") _,
            options(nostack),
        );
    }
}

/// Switches to the tables in RSI and enters the kernel at RDX with RDI.
#[unsafe(naked)]
unsafe extern "sysv64" fn trampoline() {
    naked_asm!("mov cr3, rsi", "jmp rdx")
}
