//! The GDT, with a segment of each kind that a check needs, and the TSS.

use crate::cell::Shared;
use core::arch::asm;

/// Selectors.
pub mod selector {
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE_32: u16 = 0x18;
    pub const CODE_16: u16 = 0x20;
    pub const DATA_16: u16 = 0x28;
    pub const USER_DATA: u16 = 0x33;
    pub const USER_CODE: u16 = 0x3b;
    pub const TSS: u16 = 0x40;
    /// Two 32-bit task state segments.
    pub const TASK_A: u16 = 0x50;
    pub const TASK_B: u16 = 0x58;
}

const ENTRIES: usize = 12;
/// Bytes of the 64-bit TSS, which has no I/O bitmap.
const TSS_SIZE: usize = 104;
/// Bytes of the stacks in the TSS.
const STACK: usize = 16 * 1024;

/// What LGDT and LIDT load.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub struct TableRegister<T> {
    pub limit: u16,
    pub base: *const T,
}

#[repr(C, align(16))]
struct Stack([u8; STACK]);

pub static GDT: Shared<[u64; ENTRIES]> = Shared::new([
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x0000_9b00_0000_ffff,
    0x0000_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
    0,
    0,
]);

/// For LGDT.
pub static GDTR: Shared<TableRegister<[u64; ENTRIES]>> = Shared::new(TableRegister {
    limit: 8 * ENTRIES as u16 - 1,
    base: GDT.pointer(),
});

/// In halves of the fields of 8 bytes, which are not aligned.
static TSS: Shared<[u32; TSS_SIZE / 4]> = Shared::new([0; TSS_SIZE / 4]);
static KERNEL_STACK: Shared<Stack> = Shared::new(Stack([0; STACK]));
static FAULT_STACK: Shared<Stack> = Shared::new(Stack([0; STACK]));

/// The interrupt stack table's entry for double faults.
pub const FAULT_STACK_INDEX: u8 = 1;
/// The entries whose stacks a check chooses, see [`set_interrupt_stack`].
pub const SPARE_STACK_INDEX: u8 = 2;
pub const NMI_STACK_INDEX: u8 = 3;

/// Loads the TSS. The GDT is loaded already.
pub fn init() {
    set_stack(1, KERNEL_STACK.address() + STACK as u64);
    set_stack(9, FAULT_STACK.address() + STACK as u64);
    let tss = TSS.address();
    set_system_segment(selector::TSS, tss, TSS_SIZE as u32 - 1, 0x89);
    GDT.put(usize::from(selector::TSS / 8) + 1, tss >> 32);
    // SAFETY: the descriptor was just made, and is not busy.
    unsafe { asm!("ltr {:x}", in(reg) selector::TSS) };
}

/// Where the stack of an interrupt gate with this `index` (1 to 7) ends.
pub fn set_interrupt_stack(index: u8, end: u64) {
    set_stack(7 + 2 * usize::from(index), end);
}

/// Writes the lower half of a system segment's descriptor.
pub fn set_system_segment(selector: u16, base: u64, limit: u32, access: u8) {
    let descriptor = u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56;
    GDT.put(usize::from(selector / 8), descriptor);
}

/// The descriptor of `selector`.
pub fn descriptor(selector: u16) -> u64 {
    GDT.at(usize::from(selector / 8))
}

fn set_stack(word: usize, end: u64) {
    TSS.put(word, end as u32);
    TSS.put(word + 1, (end >> 32) as u32);
}
