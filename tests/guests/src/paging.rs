//! Pages of 4 KiB with other rights than the flat map's: a window of 2 MiB at
//! [`WINDOW`], empty at first.

use crate::cell::Shared;
use crate::cpu::{self, invlpg};
use crate::entry::TABLES;

/// Its first address: page-map entry 1.
pub const WINDOW: u64 = 1 << 39;
pub const PAGE: u64 = 4096;

/// Bits of an entry.
pub mod entry {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITABLE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const UNCACHEABLE: u64 = 3 << 3;
    pub const NO_EXECUTE: u64 = 1 << 63;
}

/// Page-directory pointers, page directory, page table.
#[repr(C, align(4096))]
struct Window([[u64; 512]; 3]);

static TABLES_OF_WINDOW: Shared<Window> = Shared::new(Window([[0; 512]; 3]));

/// A page that a check may do anything with.
#[repr(C, align(4096))]
struct Page([u8; PAGE as usize]);

static SCRATCH: Shared<[Page; 4]> = Shared::new([const { Page([0; PAGE as usize]) }; 4]);

/// The address of one of four pages that belong to nobody.
pub fn scratch(index: u64) -> u64 {
    SCRATCH.address() + PAGE * (index & 3)
}

/// Makes page `index` (0 to 511) of the window the page at `physical`, with these
/// bits (0 removes it), and returns its address.
pub fn map(index: u64, physical: u64, bits: u64) -> u64 {
    use crate::memory::write64;
    use entry::{PRESENT, USER, WRITABLE};
    let all = PRESENT | WRITABLE | USER;
    let tables = TABLES_OF_WINDOW.address();
    write64(TABLES.address() + 8, tables | all);
    write64(tables, (tables + PAGE) | all);
    write64(tables + PAGE, (tables + 2 * PAGE) | all);
    let index = index & 511;
    write64(
        table_entry(index),
        if bits == 0 { 0 } else { physical | bits },
    );
    let address = WINDOW + PAGE * index;
    invlpg(address);
    address
}

/// Opens the flat map's first 64 MiB to level 3, or closes it.
pub fn open_to_level_3(open: bool) {
    use crate::memory::{read64, write64};
    const LARGE_PAGES: u64 = 32;
    let first = TABLES.address();
    let pages = (0..LARGE_PAGES).map(|index| first + 2 * PAGE + 8 * index);
    for entry in [first, first + PAGE].into_iter().chain(pages) {
        let value = read64(entry) & !entry::USER;
        write64(entry, value | if open { entry::USER } else { 0 });
    }
    cpu::set_cr3(cpu::cr3());
}

/// Where the table's entry for page `index` of the window is.
pub fn table_entry(index: u64) -> u64 {
    TABLES_OF_WINDOW.address() + 2 * PAGE + 8 * (index & 511)
}
