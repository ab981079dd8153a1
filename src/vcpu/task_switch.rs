//! Task switches: one task state segment is stored, another one loaded (SDM 3, chapter 9).
//!
//! The CPU has found the new one and has checked its descriptor when it leaves the
//! switch to the hypervisor (SDM 3, 26.4.2). It is done on a copy of the registers,
//! [`Task`], which is the guest's from the moment at which the new task begins: what is
//! wrong with a task's own segments is an exception of that task.

mod vcpu;

#[cfg(test)]
mod tests;

use super::fault::{Exception, SegmentFault};
use super::segmentation::{
    self, Addressing, DescriptorTables, Purpose, Rights, Segment, SegmentRegister,
};
use crate::arch::registers::GeneralRegisters;

/// What has asked for the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Call,
    Iret,
    Jump,
    /// A task gate in the IDT, and the event's error code.
    Gate(Option<u32>),
}

impl Source {
    /// The new task can return to the old one.
    const fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Gate(_))
    }
}

/// The registers that a task has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    /// With RSP.
    pub general: GeneralRegisters,
    /// Behind the instruction that switches.
    pub rip: u64,
    pub rflags: u64,
    /// In the order of [`Segment`].
    pub segments: [SegmentRegister; 6],
    pub tr: SegmentRegister,
    pub cr0: u64,
    pub dr7: u64,
}

/// The memory and the registers that change on the way.
pub trait TaskMachine: DescriptorTables {
    fn set_ldtr(&mut self, ldtr: SegmentRegister);

    /// The page tables of the new task.
    fn set_cr3(&mut self, cr3: u32);

    /// Writes to the new task's stack, at its privilege level.
    ///
    /// # Errors
    /// #PF.
    fn store_stack(&mut self, linear: u64, bytes: &[u8], cpl: u8) -> Result<(), Exception>;
}

const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_NT: u64 = 1 << 14;
const RFLAGS_VM: u64 = 1 << 17;
/// Those that there are.
const RFLAGS_DEFINED: u64 = 0x3f_7fd7;
const CR0_TS: u64 = 1 << 3;
const CR0_PG: u64 = 1 << 31;
/// L0 to L3, and LE.
const DR7_LOCAL: u64 = 0x155;

const BUSY: u32 = 1 << 1;
const BUSY_IN_DESCRIPTOR: u64 = 1 << 41;
/// Set in the type of a TSS of 32 bits.
const WIDE: u32 = 1 << 3;

/// A code segment of level 3.
const CODE_3: Rights = Rights(0xfb);

const CS: usize = Segment::Cs as usize;
const SS: usize = Segment::Ss as usize;
/// The order in which segments are loaded behind CS and SS.
const OTHERS: [Segment; 4] = [Segment::Ds, Segment::Es, Segment::Fs, Segment::Gs];

/// A task state segment as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Image {
    cr3: u32,
    rip: u32,
    rflags: u32,
    general: [u32; 8],
    /// In the order of [`Segment`]; one of 16 bits has four.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Bytes from the start of a TSS: all of it, what the CPU stores, and its fields.
struct Layout {
    size: usize,
    /// From RIP to the last segment.
    stored: core::ops::Range<usize>,
    field: usize,
    cr3: Option<usize>,
    ldt: usize,
    segments: usize,
}

const WIDE_LAYOUT: Layout = Layout {
    size: 104,
    stored: 0x20..0x60,
    field: 4,
    cr3: Some(0x1c),
    ldt: 0x60,
    segments: 6,
};
const NARROW_LAYOUT: Layout = Layout {
    size: 44,
    stored: 0x0e..0x2a,
    field: 2,
    cr3: None,
    ldt: 0x2a,
    segments: 4,
};

fn layout(rights: Rights) -> &'static Layout {
    if rights.0 & WIDE != 0 {
        &WIDE_LAYOUT
    } else {
        &NARROW_LAYOUT
    }
}

impl Layout {
    fn number(&self, bytes: &[u8], at: usize) -> u32 {
        let mut number = [0; 4];
        for (to, from) in number
            .iter_mut()
            .zip(bytes.iter().skip(at).take(self.field))
        {
            *to = *from;
        }
        u32::from_le_bytes(number)
    }

    fn parse(&self, bytes: &[u8]) -> Image {
        let field = |index: usize| self.number(bytes, self.stored.start + self.field * index);
        let mut selectors = [0; 6];
        for (index, selector) in selectors.iter_mut().enumerate().take(self.segments) {
            *selector = field(10 + index) as u16;
        }
        Image {
            cr3: self.cr3.map_or(0, |at| self.number(bytes, at)),
            rip: field(0),
            rflags: field(1),
            general: core::array::from_fn(|index| field(2 + index)),
            selectors,
            ldt: self.number(bytes, self.ldt) as u16,
            // The word behind the LDT's selector, in the larger one.
            trap: self.cr3.is_some() && bytes.get(0x64).is_some_and(|flags| flags & 1 != 0),
        }
    }

    /// What is stored of `task`: how many of the bytes.
    fn store(&self, task: &Task, bytes: &mut [u8; 64]) -> usize {
        let general = (0..8).map(|index| task.general.get(index) as u32);
        let selectors = task.segments.iter().map(|segment| segment.selector.into());
        let fields = [task.rip as u32, task.rflags as u32]
            .into_iter()
            .chain(general)
            .chain(selectors.take(self.segments));
        for (place, value) in bytes.chunks_exact_mut(self.field).zip(fields) {
            for (to, from) in place.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
        }
        self.stored.len()
    }
}

/// What the new task begins with, beside its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    Plain,
    /// The debug trap of its TSS.
    Trap,
}

/// Leaves `task` for the one whose TSS `selector` selects: stores its registers, and which of the two
/// is busy.
///
/// # Errors
/// The exception, in this task.
pub fn leave(
    task: &Task,
    machine: &mut impl TaskMachine,
    selector: u16,
    source: Source,
) -> Result<Entering, Exception> {
    // The CPU has checked all this, but the table may have changed meanwhile.
    let fault = match source {
        Source::Iret => SegmentFault::InvalidTss,
        _ => SegmentFault::GeneralProtection,
    };
    let (address, descriptor) = segmentation::descriptor(machine, selector, fault)?;
    let rights = descriptor.rights();
    let busy = rights.0 & BUSY != 0;
    let is_tss = rights.kind() & !(WIDE | BUSY) == 1;
    if !is_tss || busy != (source == Source::Iret) {
        return Err(fault.of(selector));
    }
    if !rights.is_present() {
        return Err(SegmentFault::NotPresent.of(selector));
    }
    let (old, new) = (layout(task.tr.rights), layout(rights));
    if (descriptor.limit() as usize) < new.size - 1 {
        return Err(SegmentFault::InvalidTss.of(selector));
    }
    let base = descriptor.base();
    let mut bytes = [0; WIDE_LAYOUT.size];
    let part = bytes.get_mut(..new.size).unwrap_or_default();
    machine.load_system(base, part)?;

    // All that is written, before anything else has changed. A task that is left for good is not
    // nested any more.
    let mut stored = *task;
    if source == Source::Iret {
        stored.rflags &= !RFLAGS_NT;
    }
    let mut store = [0; 64];
    let count = old.store(&stored, &mut store);
    let at = task.tr.base.wrapping_add(old.stored.start as u64);
    machine.store_system(at, store.get(..count).unwrap_or_default())?;
    if source.nests() {
        machine.store_system(base, &task.tr.selector.to_le_bytes())?;
    } else {
        set_available(machine, task.tr.selector)?;
    }
    if source != Source::Iret {
        let [.., byte, _, _] = (descriptor.0 | BUSY_IN_DESCRIPTOR).to_le_bytes();
        machine.store_system(address.wrapping_add(5), &[byte])?;
    }
    if base == task.tr.base {
        // A task that comes back to itself finds what it has just stored.
        machine.load_system(base, part)?;
    }
    let mut tr = descriptor.register(selector);
    tr.rights.0 |= BUSY;
    Ok(Entering {
        image: new.parse(part),
        tr,
        source,
    })
}

/// The old task is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entering {
    image: Image,
    tr: SegmentRegister,
    source: Source,
}

impl Entering {
    /// Makes `task` the new one.
    ///
    /// # Errors
    /// The exception, in the new task.
    pub fn enter(
        self,
        task: &mut Task,
        machine: &mut impl TaskMachine,
    ) -> Result<Beginning, Exception> {
        let Self {
            mut image,
            tr,
            source,
        } = self;
        if source.nests() {
            image.rflags |= RFLAGS_NT as u32;
        }
        task.tr = tr;
        task.cr0 |= CR0_TS;
        task.dr7 &= !DR7_LOCAL;
        task.rip = image.rip.into();
        task.rflags = u64::from(image.rflags) & RFLAGS_DEFINED | RFLAGS_FIXED;
        let field = layout(tr.rights).field;
        for (index, value) in (0..).zip(image.general) {
            // The upper halves of what 16 bits load are undefined.
            task.general.set(index, value.into());
        }
        if field == 2 {
            task.rflags &= 0xffff;
        } else if task.cr0 & CR0_PG != 0 {
            machine.set_cr3(image.cr3);
        }
        load_segments(task, machine, &image)?;
        if let Source::Gate(Some(error_code)) = source {
            push(task, machine, error_code, field)?;
        }
        Ok(if image.trap {
            Beginning::Trap
        } else {
            Beginning::Plain
        })
    }
}

/// Marks the TSS of `selector` as available.
fn set_available(machine: &mut impl TaskMachine, selector: u16) -> Result<(), Exception> {
    let fault = SegmentFault::InvalidTss;
    let (address, descriptor) = segmentation::descriptor(machine, selector, fault)?;
    let [.., byte, _, _] = (descriptor.0 & !BUSY_IN_DESCRIPTOR).to_le_bytes();
    machine.store_system(address.wrapping_add(5), &[byte])
}

/// LDTR and the segment registers of the new task.
fn load_segments(
    task: &mut Task,
    machine: &mut impl TaskMachine,
    image: &Image,
) -> Result<(), Exception> {
    // Until they are loaded none is usable, and the privilege level is 3, so that a fault finds the
    // stack of its handler in the TSS; CS has to be usable.
    let old_cs = task.segments[CS];
    for (segment, selector) in task.segments.iter_mut().zip(image.selectors) {
        let mut register = SegmentRegister::null(selector);
        register.rights.0 |= 3 << 5;
        *segment = register;
    }
    task.segments[CS] = SegmentRegister {
        selector: image.selectors[CS],
        rights: CODE_3,
        ..old_cs
    };
    let virtual_8086 = task.rflags & RFLAGS_VM != 0;
    if virtual_8086 {
        for (segment, selector) in task.segments.iter_mut().zip(image.selectors) {
            *segment = SegmentRegister::paragraph(selector);
        }
    }
    machine.set_ldtr(SegmentRegister::null(image.ldt));
    let ldtr = load_ldtr(machine, image.ldt)?;
    machine.set_ldtr(ldtr);
    if virtual_8086 {
        return Ok(());
    }
    let cpl = (image.selectors[CS] & 3) as u8;
    let code = segmentation::load_code(machine, image.selectors[CS], false, Purpose::TaskSwitch)?;
    let mut load = |segment: Segment| {
        let selector = image.selectors[segment as usize];
        let purpose = Purpose::TaskSwitch;
        segmentation::load_data(machine, segment, selector, cpl, false, purpose)
    };
    let stack = load(Segment::Ss)?;
    task.segments[CS] = code;
    task.segments[SS] = stack;
    for segment in OTHERS {
        task.segments[segment as usize] = load(segment)?;
    }
    if task.rip > code.limit.into() {
        return Err(Exception::GeneralProtection);
    }
    Ok(())
}

fn load_ldtr(machine: &mut impl TaskMachine, selector: u16) -> Result<SegmentRegister, Exception> {
    const LOCAL: u16 = 1 << 2;
    let fault = SegmentFault::InvalidTss;
    if segmentation::is_null(selector) {
        return Ok(SegmentRegister::null(selector));
    }
    if selector & LOCAL != 0 {
        return Err(fault.of(selector));
    }
    let (_, descriptor) = segmentation::descriptor(machine, selector, fault)?;
    let rights = descriptor.rights();
    if rights.kind() != segmentation::kind::LDT || !rights.is_present() {
        return Err(fault.of(selector));
    }
    Ok(descriptor.register(selector))
}

/// The error code of the event, on the new task's stack.
fn push(
    task: &mut Task,
    machine: &mut impl TaskMachine,
    error_code: u32,
    bytes: usize,
) -> Result<(), Exception> {
    let stack = task.segments[SS];
    let virtual_8086 = task.rflags & RFLAGS_VM != 0;
    let (addressing, cpl) = if virtual_8086 {
        (Addressing::Virtual8086, 3)
    } else {
        (Addressing::Protected, stack.rights.dpl())
    };
    let mask = if stack.rights.is_big() {
        0xffff_ffff
    } else {
        0xffff
    };
    let top = task.general.rsp.wrapping_sub(bytes as u64) & mask;
    let linear = stack.linear(Segment::Ss, addressing, top, bytes as u64, true)?;
    let image = error_code.to_le_bytes();
    machine.store_stack(linear, image.get(..bytes).unwrap_or_default(), cpl)?;
    task.general.rsp = task.general.rsp & !mask | top;
    Ok(())
}
