//! GDT, TSS and IDT of the hypervisor's own CPUs.
//!
//! NMI, double fault and machine check run on stacks of their own (IST),
//! because they may arrive when the current stack is what is broken. The
//! bootstrap processor's are static at first, so that exceptions are reported
//! from the first instruction on; [`guard_stacks`] replaces them by mapped
//! ones with guard pages.
//!
//! All 256 vectors enter through one stub, since the compiler's own interrupt
//! ABI is not stable.

use super::memory::paging::MapError;
use super::memory::stack::Stack;
use super::{interrupts, panic};
use crate::addr::Hva;
use crate::arch::{cpu, fpu, msr};
use alloc::boxed::Box;
use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::mem::size_of;
use spin::Once;
use x86_64::PrivilegeLevel::Ring0;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::{lgdt, lidt, load_tss};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;

/// 64-bit code, ring 0.
pub const CODE: SegmentSelector = SegmentSelector::new(1, Ring0);
/// Data, ring 0.
pub const DATA: SegmentSelector = SegmentSelector::new(2, Ring0);
/// The task-state segment; its descriptor takes two entries.
pub const TASK: SegmentSelector = SegmentSelector::new(3, Ring0);

const NMI: usize = 2;
const DOUBLE_FAULT: usize = 8;
const INVALID_OPCODE: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;
const MACHINE_CHECK: usize = 18;

/// Vectors that have a stack of their own, in the order of their IST entries.
const IST_VECTORS: [usize; 3] = [NMI, DOUBLE_FAULT, MACHINE_CHECK];
/// Pages of one such stack.
const IST_PAGES: u64 = 4;

/// GDT and TSS of one CPU.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct CpuTables {
    gdt: UnsafeCell<[u64; 5]>,
    tss: UnsafeCell<TaskStateSegment>,
}

// SAFETY: both are written by their own CPU only, in `load` and `set_stacks`,
// and read by that CPU's hardware.
unsafe impl Sync for CpuTables {}
// SAFETY: plain data.
unsafe impl Send for CpuTables {}

impl CpuTables {
    fn new(stack_tops: [Hva; IST_VECTORS.len()]) -> Self {
        let mut tss = TaskStateSegment::new();
        let mut stacks = tss.interrupt_stack_table;
        for (entry, top) in stacks.iter_mut().zip(stack_tops) {
            *entry = VirtAddr::new_truncate(top.0);
        }
        tss.interrupt_stack_table = stacks;
        Self {
            gdt: UnsafeCell::new([0; 5]),
            tss: UnsafeCell::new(tss),
        }
    }

    /// The GDT, whose TSS descriptor holds this object's address.
    fn entries(&'static self) -> [u64; 5] {
        // SAFETY: the tables are static, so the pointer stays valid.
        let (low, high) = match unsafe { Descriptor::tss_segment_unchecked(self.tss.get()) } {
            Descriptor::SystemSegment(low, high) => (low, high),
            Descriptor::UserSegment(low) => (low, 0),
        };
        [0, CODE_DESCRIPTOR, DATA_DESCRIPTOR, low, high]
    }

    /// Linear address of the GDT, for the VMCS host state.
    pub fn gdt_base(&self) -> Hva {
        Hva(self.gdt.get() as u64)
    }

    /// Linear address of the TSS, for the VMCS host state.
    pub fn tss_base(&self) -> Hva {
        Hva(self.tss.get() as u64)
    }

    /// Makes these the calling CPU's tables, and the common IDT its IDT.
    ///
    /// # Safety
    /// The calling CPU must be the only one that ever loads them, with
    /// interrupts off.
    pub unsafe fn load(&'static self) {
        let gdt = DescriptorTablePointer {
            limit: (size_of::<[u64; 5]>() - 1) as u16,
            base: VirtAddr::new_truncate(self.gdt_base().0),
        };
        let idt = DescriptorTablePointer {
            limit: (size_of::<[Gate; 256]>() - 1) as u16,
            base: VirtAddr::new_truncate(idt_base().0),
        };
        // SAFETY: only this CPU uses these tables, and not yet.
        unsafe { self.gdt.get().write(self.entries()) };
        // SAFETY: the tables live forever; the GDT has the selectors that are
        // loaded next, and code and data are the flat segments that the
        // running code assumes. The TSS is not busy: nobody loaded it before.
        unsafe {
            lgdt(&gdt);
            CS::set_reg(CODE);
            SS::set_reg(DATA);
            DS::set_reg(DATA);
            ES::set_reg(DATA);
            FS::set_reg(SegmentSelector::NULL);
            GS::set_reg(SegmentSelector::NULL);
            load_tss(TASK);
            lidt(&idt);
        }
    }

    /// Replaces the interrupt stacks.
    ///
    /// # Safety
    /// Only for the calling CPU's own tables, outside those interrupts.
    unsafe fn set_stacks(&self, tops: [Hva; IST_VECTORS.len()]) {
        for (index, top) in tops.into_iter().enumerate() {
            // SAFETY: in bounds (the table has seven entries); the CPU reads
            // an entry only when it delivers such an interrupt, and finds
            // either stack usable.
            unsafe {
                let entry = (&raw mut (*self.tss.get()).interrupt_stack_table)
                    .cast::<VirtAddr>()
                    .add(index);
                entry.write_unaligned(VirtAddr::new_truncate(top.0));
            }
        }
    }
}

/// Flat 64-bit code: present, ring 0, readable, accessed, L (SDM volume 3, 3.4.5).
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
/// Flat data: present, ring 0, writable, accessed.
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// One interrupt gate (SDM volume 3, 7.14.1).
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Gate {
    offset_low: u16,
    selector: u16,
    /// Index into the interrupt stack table, 0 for none.
    ist: u8,
    /// Present, DPL 0, 64-bit interrupt gate: 0x8e.
    access: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

impl Gate {
    const fn new(handler: u64, ist: u8) -> Self {
        Self {
            offset_low: handler as u16,
            selector: CODE.0,
            ist,
            access: 0x8e,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            reserved: 0,
        }
    }
}

/// The IST entry of a vector, counted from 1 as a gate does; 0 for none.
fn ist_of(vector: usize) -> u8 {
    IST_VECTORS
        .iter()
        .position(|&v| v == vector)
        .map_or(0, |index| index as u8 + 1)
}

static IDT: Once<[Gate; 256]> = Once::new();
static BOOTSTRAP: Once<CpuTables> = Once::new();

/// A stack in `.bss` for the time before memory can be mapped.
#[repr(C, align(16))]
struct EarlyStack(UnsafeCell<[u8; 16 * 1024]>);

// SAFETY: only the bootstrap processor's hardware uses it.
unsafe impl Sync for EarlyStack {}

static EARLY_STACKS: [EarlyStack; IST_VECTORS.len()] =
    [const { EarlyStack(UnsafeCell::new([0; 16 * 1024])) }; IST_VECTORS.len()];

fn early_tops() -> [Hva; IST_VECTORS.len()] {
    EARLY_STACKS
        .each_ref()
        .map(|stack| Hva(stack.0.get() as u64 + 16 * 1024))
}

/// Linear address of the IDT, common to all CPUs.
pub fn idt_base() -> Hva {
    let idt = IDT.call_once(|| {
        core::array::from_fn(|vector| Gate::new(stub_address(vector), ist_of(vector)))
    });
    Hva(idt.as_ptr() as u64)
}

/// Loads the bootstrap processor's tables. Before this an exception resets the machine.
///
/// # Safety
/// Once, on the bootstrap processor, with interrupts off.
pub unsafe fn init() {
    // SAFETY: the caller's.
    unsafe { bootstrap().load() };
    cpu::enable_machine_checks();
}

/// The bootstrap processor's tables.
pub fn bootstrap() -> &'static CpuTables {
    BOOTSTRAP.call_once(|| CpuTables::new(early_tops()))
}

/// Gives the bootstrap processor interrupt stacks with guard pages.
///
/// # Errors
/// When memory runs out.
///
/// # Safety
/// On the bootstrap processor, after `memory::init`.
pub unsafe fn guard_stacks() -> Result<(), MapError> {
    let tops = guarded_stacks()?;
    // SAFETY: the bootstrap processor's own tables, per the caller.
    unsafe { bootstrap().set_stacks(tops) };
    Ok(())
}

/// Tables for one more CPU, which that CPU then loads ([`CpuTables::load`]).
///
/// # Errors
/// When memory runs out.
pub fn for_another_cpu() -> Result<&'static CpuTables, MapError> {
    Ok(Box::leak(Box::new(CpuTables::new(guarded_stacks()?))))
}

/// Interrupt stacks are for ever, so they are never given back.
fn guarded_stacks() -> Result<[Hva; IST_VECTORS.len()], MapError> {
    let mut tops = [Hva(0); IST_VECTORS.len()];
    for top in &mut tops {
        *top = Stack::new(IST_PAGES)?.leak();
    }
    Ok(tops)
}

/// What the stub leaves on the stack: the general registers, the vector, the
/// error code (0 where there is none), and what the CPU pushed (SDM volume 3, 7.14.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct InterruptFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Vectors for which the CPU pushes an error code: 8, 10 to 14, 17, 21, 29, 30
/// (SDM volume 3, table 7-1; AMD volume 2, table 8-1 for 29 and 30).
const WITH_ERROR_CODE: u64 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

/// Bytes from one vector's stub to the next.
const STUB_SIZE: usize = 16;

// The CPU aligns the stack to 16 bytes before it pushes; frame and registers
// are 22 quadwords, so the stack is aligned again at the call.
global_asm!(
    ".balign 16",
    ".global vireo_interrupt_stubs",
    "vireo_interrupt_stubs:",
    ".set vireo_vector, 0",
    ".rept 256",
    ".balign {stub_size}",
    ".if (vireo_vector >= 32) || ((({with_error_code} >> vireo_vector) & 1) == 0)",
    "push 0",
    ".endif",
    "push vireo_vector",
    "jmp vireo_interrupt_common",
    ".set vireo_vector, vireo_vector + 1",
    ".endr",
    "vireo_interrupt_common:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    "call {entry}",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    stub_size = const STUB_SIZE,
    with_error_code = const WITH_ERROR_CODE,
    entry = sym interrupt_entry,
);

unsafe extern "C" {
    fn vireo_interrupt_stubs();
}

fn stub_address(vector: usize) -> u64 {
    (vireo_interrupt_stubs as *const () as usize + vector * STUB_SIZE) as u64
}

/// Every exception and interrupt that arrives while the hypervisor runs.
extern "C" fn interrupt_entry(frame: &mut InterruptFrame) {
    match frame.vector {
        vector if vector == NMI as u64 => interrupts::nmi(),
        vector if vector >= u64::from(interrupts::FIRST) => interrupts::dispatch(vector as u8),
        vector => match recovery(vector, frame.rip) {
            Some(rip) => frame.rip = rip,
            None => panic::exception(frame, cpu::cr2()),
        },
    }
}

/// Where execution resumes after an exception at `rip`, where one may come.
fn recovery(vector: u64, rip: u64) -> Option<u64> {
    match vector {
        GENERAL_PROTECTION => msr::recovery(rip).or_else(|| fpu::recovery(rip)),
        INVALID_OPCODE => fpu::recovery(rip),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_has_the_bits_of_the_manual() {
        // SAFETY: `Gate` is 16 bytes without padding.
        let words: [u64; 2] = unsafe { core::mem::transmute(Gate::new(0xffff_ffff_8012_3456, 2)) };
        assert_eq!(words, [0x8012_8e02_0008_3456, 0x0000_0000_ffff_ffff]);
    }

    #[test]
    fn every_stub_pushes_its_vector_over_an_error_code() {
        for vector in 0..256 {
            // SAFETY: the stubs are 256 times 16 readable bytes of code.
            let code = unsafe {
                core::slice::from_raw_parts(stub_address(vector) as *const u8, STUB_SIZE)
            };
            let has_code = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
            let push_vector = match code {
                [0x6a, 0, rest @ ..] if !has_code => rest,
                rest => {
                    assert!(
                        has_code,
                        "vector {vector} leaves out the error code: {code:x?}"
                    );
                    rest
                }
            };
            let pushed = match push_vector {
                [0x6a, byte, 0xeb | 0xe9, ..] => i64::from(*byte as i8),
                [0x68, a, b, c, d, 0xeb | 0xe9, ..] => {
                    i64::from(i32::from_le_bytes([*a, *b, *c, *d]))
                }
                _ => panic!("vector {vector}: {code:x?}"),
            };
            assert_eq!(pushed, vector as i64);
        }
    }

    #[test]
    fn only_the_three_that_need_it_have_a_stack_of_their_own() {
        let with: Vec<_> = (0..256)
            .filter(|&v| ist_of(v) != 0)
            .map(|v| (v, ist_of(v)))
            .collect();
        assert_eq!(with, [(2, 1), (8, 2), (18, 3)]);
    }
}
