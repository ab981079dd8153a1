//! The hypervisor's own address space.
//!
//! The loader built it ([`vireo_handoff::layout`]); this module adopts its
//! tables and adds 4 KiB pages in the dynamic area: device registers and
//! stacks. An address there is used once and never again, and a page is left
//! unmapped behind every mapping. So an unmapping needs no shootdown: what
//! another CPU still holds in its TLB nobody will ask for.

use super::frames::{ALIGN_4K, FrameRange};
use crate::addr::{Hpa, Hva, PAGE_SIZE};
use crate::arch::{cpu, msr};
use spin::{Mutex, Once};
use vireo_handoff::layout;
use x86::msr::IA32_PAT;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
/// In a level-1 entry: the highest bit of the index into the PAT.
const PAT: u64 = 1 << 7;
/// In a level-2 or level-3 entry: maps a page instead of naming a table.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Addresses below are canonical without a sign.
const LOWER_HALF: u64 = 1 << 47;

/// Ordinary data: write-back, never executable.
const DATA: u64 = PRESENT | WRITABLE | NO_EXECUTE;
/// Device registers: PAT entry 3, which is UC at reset and for every firmware.
const DEVICE: u64 = DATA | WRITE_THROUGH | CACHE_DISABLE;
/// A framebuffer: PAT entry 5, which [`map_framebuffer`] makes write-combining.
const FRAMEBUFFER: u64 = DATA | PAT | WRITE_THROUGH;
/// The PAT entry of [`FRAMEBUFFER`]; nothing else is mapped with it.
const FRAMEBUFFER_PAT_ENTRY: u32 = 5;
/// Write-combining, as a PAT entry (SDM volume 3, 12.12.2).
const WRITE_COMBINING: u64 = 1;

/// Why a mapping was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// No frame for the memory or for a page table.
    OutOfMemory,
    /// The dynamic area is used up, or the physical range wraps.
    OutOfAddresses,
    /// The address is mapped already.
    Occupied,
}

/// Where page tables live; on the machine that is the direct map.
trait TableMemory {
    fn read(&self, table: Hpa, index: usize) -> u64;
    fn write(&mut self, table: Hpa, index: usize, entry: u64);
    /// An empty table.
    fn allocate(&mut self) -> Option<Hpa>;
}

/// Four-level page tables (SDM volume 3, 5.5).
struct PageTables<M> {
    root: Hpa,
    memory: M,
}

/// The index into the table of `level` (4 is the root's).
fn index(address: Hva, level: u32) -> usize {
    (address.0 >> (12 + 9 * (level - 1)) & 0x1ff) as usize
}

impl<M: TableMemory> PageTables<M> {
    fn translate(&self, address: Hva) -> Option<Hpa> {
        let mut table = self.root;
        for level in (1..=4).rev() {
            let entry = self.memory.read(table, index(address, level));
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 1 || level < 4 && entry & LARGE != 0 {
                let size = PAGE_SIZE << (9 * (level - 1));
                return Some(Hpa(entry & ADDRESS & !(size - 1) | address.offset_in(size)));
            }
            table = Hpa(entry & ADDRESS);
        }
        None
    }

    /// Maps the 4 KiB page at `address` to the frame `to`.
    fn map(&mut self, address: Hva, to: Hpa, flags: u64) -> Result<(), MapError> {
        let mut table = self.root;
        for level in (2..=4).rev() {
            let entry = self.memory.read(table, index(address, level));
            table = if entry & PRESENT == 0 {
                let next = self.memory.allocate().ok_or(MapError::OutOfMemory)?;
                self.memory
                    .write(table, index(address, level), next.0 | PRESENT | WRITABLE);
                next
            } else if level < 4 && entry & LARGE != 0 {
                return Err(MapError::Occupied);
            } else {
                Hpa(entry & ADDRESS)
            };
        }
        if self.memory.read(table, index(address, 1)) & PRESENT != 0 {
            return Err(MapError::Occupied);
        }
        self.memory
            .write(table, index(address, 1), to.0 & ADDRESS | flags);
        Ok(())
    }

    /// Unmaps the 4 KiB page at `address`; the frame that it was mapped to.
    fn unmap(&mut self, address: Hva) -> Option<Hpa> {
        let mut table = self.root;
        for level in (2..=4).rev() {
            let entry = self.memory.read(table, index(address, level));
            if entry & PRESENT == 0 || level < 4 && entry & LARGE != 0 {
                return None;
            }
            table = Hpa(entry & ADDRESS);
        }
        let entry = self.memory.read(table, index(address, 1));
        if entry & PRESENT == 0 {
            return None;
        }
        self.memory.write(table, index(address, 1), 0);
        Some(Hpa(entry & ADDRESS))
    }
}

/// Tables of the running CPU, through the direct map.
struct DirectMap;

impl DirectMap {
    fn entry(table: Hpa, index: usize) -> *mut u64 {
        (to_virt(table).0 as *mut u64).wrapping_add(index)
    }
}

impl TableMemory for DirectMap {
    fn read(&self, table: Hpa, index: usize) -> u64 {
        // SAFETY: `table` is the root or comes from a present entry, so it is
        // a page table, which is RAM in the direct map; the index has 9 bits.
        unsafe { Self::entry(table, index).read_volatile() }
    }

    fn write(&mut self, table: Hpa, index: usize, entry: u64) {
        // SAFETY: as for `read`; the only writer holds `DYNAMIC`. What is
        // written maps or unmaps only the dynamic area.
        unsafe { Self::entry(table, index).write_volatile(entry) };
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let frame = super::allocate(1, ALIGN_4K)?.start;
        // SAFETY: the frame is ours alone, and RAM in the direct map.
        unsafe { core::ptr::write_bytes(to_virt(frame).0 as *mut u8, 0, PAGE_SIZE as usize) };
        Some(frame)
    }
}

/// The part of the address space that is filled at run time.
struct Dynamic<M> {
    tables: PageTables<M>,
    /// Where the next mapping goes.
    next: Hva,
}

impl<M: TableMemory> Dynamic<M> {
    /// Maps `pages` frames from `start` on; all or nothing.
    fn map(&mut self, start: Hpa, pages: u64, flags: u64) -> Result<Hva, MapError> {
        // One more page stays unmapped: the guard of whatever comes next.
        let first = self
            .next
            .checked_add(PAGE_SIZE)
            .ok_or(MapError::OutOfAddresses)?;
        let len = pages
            .checked_mul(PAGE_SIZE)
            .ok_or(MapError::OutOfAddresses)?;
        let end = first
            .checked_add(len)
            .filter(|end| end.0 <= layout::KERNEL)
            .ok_or(MapError::OutOfAddresses)?;
        start
            .checked_add(len)
            .filter(|end| end.0 & !ADDRESS == 0)
            .ok_or(MapError::OutOfAddresses)?;
        self.next = end;
        for page in 0..pages {
            let offset = page * PAGE_SIZE;
            if let Err(error) = self
                .tables
                .map(Hva(first.0 + offset), Hpa(start.0 + offset), flags)
            {
                (0..page).for_each(|done| {
                    self.tables.unmap(Hva(first.0 + done * PAGE_SIZE));
                });
                return Err(error);
            }
        }
        Ok(first)
    }
}

/// One mapped page, for those who check.
#[cfg(any(test, feature = "selftest"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    pub virt: Hva,
    pub phys: Hpa,
    /// Bytes: 4 KiB, 2 MiB or 1 GiB.
    pub len: u64,
    pub writable: bool,
    pub executable: bool,
}

#[cfg(any(test, feature = "selftest"))]
impl<M: TableMemory> PageTables<M> {
    /// Visits every page that is mapped. Tables allow everything, pages decide.
    fn for_each_page(&self, visit: &mut dyn FnMut(Page)) {
        self.visit(self.root, 4, 0, visit);
    }

    fn visit(&self, table: Hpa, level: u32, base: u64, visit: &mut dyn FnMut(Page)) {
        let size = PAGE_SIZE << (9 * (level - 1));
        for index in 0..512 {
            let entry = self.memory.read(table, index);
            if entry & PRESENT == 0 {
                continue;
            }
            let virt = base + index as u64 * size;
            if level > 1 && (level == 4 || entry & LARGE == 0) {
                self.visit(Hpa(entry & ADDRESS), level - 1, virt, visit);
            } else {
                visit(Page {
                    virt: Hva(((virt << 16) as i64 >> 16) as u64),
                    phys: Hpa(entry & ADDRESS & !(size - 1)),
                    len: size,
                    writable: entry & WRITABLE != 0,
                    executable: entry & NO_EXECUTE == 0,
                });
            }
        }
    }
}

/// Visits every page that the running CPU's tables map.
#[cfg(feature = "selftest")]
pub fn for_each_page(mut visit: impl FnMut(Page)) {
    let tables = PageTables {
        root: cpu::page_table_root(),
        memory: DirectMap,
    };
    tables.for_each_page(&mut visit);
}

static DYNAMIC: Mutex<Option<Dynamic<DirectMap>>> = Mutex::new(None);

/// Where the kernel's image lies physically.
struct Image {
    start: Hpa,
    len: u64,
}

static IMAGE: Once<Image> = Once::new();

/// Adopts the page tables of the calling CPU.
///
/// # Safety
/// They must be the loader's, with the direct map that [`layout`] describes;
/// the image must lie where the arguments say.
pub(super) unsafe fn init(image_start: Hpa, image_len: u64) {
    IMAGE.call_once(|| Image {
        start: image_start,
        len: image_len,
    });
    *DYNAMIC.lock() = Some(Dynamic {
        tables: PageTables {
            root: cpu::page_table_root(),
            memory: DirectMap,
        },
        next: Hva(layout::DYNAMIC),
    });
}

/// Where RAM is found in the direct map.
#[inline]
pub const fn to_virt(address: Hpa) -> Hva {
    Hva(layout::DIRECT_MAP.wrapping_add(address.0))
}

/// The physical address of something in the direct map, the kernel's image or
/// the dynamic area; `None` where nothing is mapped.
#[inline]
pub fn to_phys(address: Hva) -> Option<Hpa> {
    if (layout::DIRECT_MAP..layout::DYNAMIC).contains(&address.0) {
        return Some(Hpa(address.0 - layout::DIRECT_MAP));
    }
    match (address.0.checked_sub(layout::KERNEL), IMAGE.get()) {
        (Some(offset), Some(image)) if offset < image.len => image.start.checked_add(offset),
        _ => translate(address),
    }
}

/// What the running CPU's page tables make of `address`. Takes no lock.
pub fn translate(address: Hva) -> Option<Hpa> {
    let canonical = (address.0 as i64) << 16 >> 16 == address.0 as i64;
    let tables = PageTables {
        root: cpu::page_table_root(),
        memory: DirectMap,
    };
    canonical.then(|| tables.translate(address))?
}

fn map(start: Hpa, pages: u64, flags: u64) -> Result<Hva, MapError> {
    DYNAMIC
        .lock()
        .as_mut()
        .ok_or(MapError::OutOfMemory)?
        .map(start, pages, flags)
}

/// Maps frames as ordinary memory, with an unmapped page on each side.
///
/// # Errors
/// When frames for page tables or addresses run out.
pub fn map_memory(frames: FrameRange) -> Result<Hva, MapError> {
    map(frames.start, frames.count, DATA)
}

/// Maps the `len` bytes of device registers at `start`, uncached; where they
/// are then. Neither needs to be page-aligned.
///
/// # Errors
/// When frames for page tables or addresses run out.
pub fn map_device(start: Hpa, len: u64) -> Result<Hva, MapError> {
    map_bytes(start, len, DEVICE)
}

fn map_bytes(start: Hpa, len: u64, flags: u64) -> Result<Hva, MapError> {
    let offset = start.offset_in(PAGE_SIZE);
    let bytes = offset.checked_add(len).ok_or(MapError::OutOfAddresses)?;
    let base = map(
        start.align_down(PAGE_SIZE),
        bytes.div_ceil(PAGE_SIZE),
        flags,
    )?;
    Ok(Hva(base.0 + offset))
}

/// Maps the `len` bytes of a framebuffer at `start`, write-combining where the
/// CPU can; where they are then.
///
/// # Errors
/// When frames for page tables or addresses run out.
pub fn map_framebuffer(start: Hpa, len: u64) -> Result<Hva, MapError> {
    let has_pat = cpu::cpuid()
        .get_feature_info()
        .is_some_and(|features| features.has_pat());
    if !has_pat {
        return map_device(start, len);
    }
    // SAFETY: a CPU with PAT has the MSR. No page was ever mapped by this entry, so no cache
    // line has its old type.
    unsafe {
        let shift = 8 * FRAMEBUFFER_PAT_ENTRY;
        let others = msr::read(IA32_PAT) & !(0xff << shift);
        msr::write(IA32_PAT, others | WRITE_COMBINING << shift);
    }
    map_bytes(start, len, FRAMEBUFFER)
}

/// What the firmware does with memory of its own that is mapped where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirmwareAccess {
    /// Executes it.
    Code,
    /// Reads and writes it.
    Data,
    /// Reads and writes registers there.
    Device,
}

/// Maps the `len` bytes of the firmware at `start` where they are, which is in
/// the lower half of the address space.
///
/// # Errors
/// When frames for page tables run out, or something is mapped there.
///
/// # Safety
/// The memory must be the firmware's, and nothing of ours lie in it.
pub unsafe fn map_firmware(start: Hpa, len: u64, access: FirmwareAccess) -> Result<(), MapError> {
    let flags = match access {
        FirmwareAccess::Code => PRESENT,
        FirmwareAccess::Data => DATA,
        FirmwareAccess::Device => DEVICE,
    };
    let mut dynamic = DYNAMIC.lock();
    let tables = &mut dynamic.as_mut().ok_or(MapError::OutOfMemory)?.tables;
    let end = start
        .checked_add(len)
        .filter(|end| end.0 <= LOWER_HALF)
        .ok_or(MapError::OutOfAddresses)?;
    for page in (start.0..end.0).step_by(PAGE_SIZE as usize) {
        tables.map(Hva(page), Hpa(page), flags)?;
    }
    Ok(())
}

/// Takes back a page of [`map_firmware`], on this CPU at once and on others when they load
/// CR3 or have no room for the translation.
///
/// # Safety
/// Nobody may use the page any more, on any CPU.
pub unsafe fn unmap_firmware(address: Hva) {
    if address.0 < LOWER_HALF
        && let Some(dynamic) = DYNAMIC.lock().as_mut()
    {
        dynamic.tables.unmap(address);
        cpu::invalidate_page(address);
    }
}

/// Unmaps one page of the dynamic area; the frame behind it.
///
/// # Safety
/// Nobody may use the page any more, on any CPU.
pub unsafe fn unmap(address: Hva) -> Option<Hpa> {
    if !(layout::DYNAMIC..layout::KERNEL).contains(&address.0) {
        return None;
    }
    let frame = DYNAMIC.lock().as_mut()?.tables.unmap(address)?;
    cpu::invalidate_page(address);
    Some(frame)
}

#[cfg(test)]
mod tests;
