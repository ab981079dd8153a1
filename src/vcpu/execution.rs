//! What instructions are emulated on: this vCPU's registers, and what the guest has at its
//! linear addresses, piece by piece: memory, device registers, or nothing.

use super::Vcpu;
use super::breakpoints::DataBreakpoints;
use super::emulate::{Intent, Machine, SystemSegment, Table, VectorRegister};
use super::fault::Exception;
use super::segmentation::{
    Addressing, DescriptorTables, Rights, Segment, SegmentRegister, TableRegister,
};
use super::walk::{self, Operation, Paging, PhysicalMark, PhysicalRead, WalkError};
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::arch::fpu::{FpuInstruction, Image};
use crate::arch::{cpu, port, vector};
use crate::devices::{Width, pc};
use crate::vm::memory::GuestMemory;
use crate::vm::slots::SlotKind;
use crate::vmx::vmcs::{Field, guest};

const CR0_PE: u64 = 1;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_AC: u64 = 1 << 18;

/// The fields of one segment register.
struct Fields {
    selector: Field<u16>,
    base: Field<u64>,
    limit: Field<u32>,
    rights: Field<u32>,
}

macro_rules! fields {
    ($selector:ident $base:ident $limit:ident $rights:ident) => {
        Fields {
            selector: guest::$selector,
            base: guest::$base,
            limit: guest::$limit,
            rights: guest::$rights,
        }
    };
}

/// Those of a [`Segment`].
const fn fields(segment: Segment) -> Fields {
    match segment {
        Segment::Es => fields!(ES_SELECTOR ES_BASE ES_LIMIT ES_ACCESS_RIGHTS),
        Segment::Cs => fields!(CS_SELECTOR CS_BASE CS_LIMIT CS_ACCESS_RIGHTS),
        Segment::Ss => fields!(SS_SELECTOR SS_BASE SS_LIMIT SS_ACCESS_RIGHTS),
        Segment::Ds => fields!(DS_SELECTOR DS_BASE DS_LIMIT DS_ACCESS_RIGHTS),
        Segment::Fs => fields!(FS_SELECTOR FS_BASE FS_LIMIT FS_ACCESS_RIGHTS),
        Segment::Gs => fields!(GS_SELECTOR GS_BASE GS_LIMIT GS_ACCESS_RIGHTS),
    }
}

const fn system_fields(segment: SystemSegment) -> Fields {
    match segment {
        SystemSegment::Ldtr => fields!(LDTR_SELECTOR LDTR_BASE LDTR_LIMIT LDTR_ACCESS_RIGHTS),
        SystemSegment::Tr => fields!(TR_SELECTOR TR_BASE TR_LIMIT TR_ACCESS_RIGHTS),
    }
}

impl PhysicalRead for GuestMemory {
    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        GuestMemory::read_u64(self, gpa).ok()
    }

    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        GuestMemory::read_u32(self, gpa).ok()
    }
}

impl PhysicalMark for GuestMemory {
    fn replace(&self, gpa: Gpa, bytes: usize, old: u64, new: u64) -> bool {
        GuestMemory::replace(self, gpa, bytes, old, new)
    }
}

/// Who accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accessor {
    /// An instruction, at its privilege level.
    Instruction,
    /// The same at level 3, or below.
    User(bool),
    /// The CPU itself, in descriptor tables and task state segments.
    System,
}

impl Vcpu {
    pub(super) fn addressing(&self) -> Addressing {
        if self.vmcs.read(guest::EFER) & EFER_LMA != 0
            && Rights(self.vmcs.read(guest::CS_ACCESS_RIGHTS)).is_long()
        {
            Addressing::Long
        } else if self.vmcs.read(guest::CR0) & CR0_PE == 0 {
            Addressing::Real
        } else if self.vmcs.read(guest::RFLAGS) & RFLAGS_VM != 0 {
            Addressing::Virtual8086
        } else {
            Addressing::Protected
        }
    }

    pub(super) fn segment(&self, segment: Segment) -> SegmentRegister {
        self.read_segment(&fields(segment))
    }

    #[cold]
    pub(super) fn segment_base(&self, segment: Segment) -> u64 {
        self.vmcs.read(fields(segment).base)
    }

    pub(super) fn set_segment(&mut self, segment: Segment, register: SegmentRegister) {
        self.write_segment(&fields(segment), register);
    }

    pub(super) fn system_segment(&self, segment: SystemSegment) -> SegmentRegister {
        self.read_segment(&system_fields(segment))
    }

    pub(super) fn set_system_segment(&mut self, segment: SystemSegment, register: SegmentRegister) {
        self.write_segment(&system_fields(segment), register);
    }

    fn read_segment(&self, fields: &Fields) -> SegmentRegister {
        SegmentRegister {
            selector: self.vmcs.read(fields.selector),
            base: self.vmcs.read(fields.base),
            limit: self.vmcs.read(fields.limit),
            rights: Rights(self.vmcs.read(fields.rights)),
        }
    }

    fn write_segment(&mut self, fields: &Fields, register: SegmentRegister) {
        self.vmcs.write(fields.selector, register.selector);
        self.vmcs.write(fields.base, register.base);
        self.vmcs.write(fields.limit, register.limit);
        self.vmcs.write(fields.rights, register.rights.0);
    }

    pub(super) fn paging(&self) -> Paging {
        Paging {
            cr0: self.cr0(),
            cr3: self.vmcs.read(guest::CR3),
            cr4: self.cr4(),
            efer: self.vmcs.read(guest::EFER),
            rflags: self.vmcs.read(guest::RFLAGS),
            physical_bits: self.cpuid.physical_address_bits(),
        }
    }

    /// Where an access that is made goes.
    fn translate(
        &self,
        address: Gva,
        operation: Operation,
        accessor: Accessor,
    ) -> Result<Gpa, Exception> {
        let mut paging = self.paging();
        let user = match accessor {
            Accessor::Instruction => self.cpl() == 3,
            Accessor::User(user) => user,
            Accessor::System => {
                // RFLAGS.AC lifts SMAP only for what is explicit (SDM 3, 5.6).
                paging.rflags &= !RFLAGS_AC;
                false
            }
        };
        let access = walk::Access { operation, user };
        match walk::walk_and_mark(&self.vm.memory, &paging, address, access) {
            Ok(translation) => Ok(translation.gpa),
            Err(WalkError::PageFault(error_code)) => Err(Exception::PageFault {
                error_code,
                address: address.0,
            }),
            Err(WalkError::NonCanonical | WalkError::NoMemory(_)) => {
                Err(Exception::GeneralProtection)
            }
        }
    }

    /// Fetches code to the end of `bytes` or of the page, whichever comes first: how many
    /// bytes.
    pub(super) fn fetch(&self, address: Gva, bytes: &mut [u8]) -> Result<usize, Exception> {
        let in_page = (PAGE_SIZE - address.offset_in(PAGE_SIZE)) as usize;
        let count = in_page.min(bytes.len());
        let part = bytes.get_mut(..count).unwrap_or_default();
        let gpa = self.translate(address, Operation::Execute, Accessor::Instruction)?;
        // What is not memory cannot have been executed.
        Ok(self.vm.memory.read(gpa, part).map_or(0, |()| count))
    }

    /// Reads what lies at `gpa` in one page.
    fn read_physical(&mut self, gpa: Gpa, bytes: &mut [u8]) {
        if self.vm.memory.load(gpa, bytes).is_ok() {
            return;
        }
        for (gpa, width, range) in chunks(gpa, bytes.len()) {
            let value = self.device_read(gpa, width).to_le_bytes();
            let chunk = bytes.get_mut(range).unwrap_or_default();
            for (byte, value) in chunk.iter_mut().zip(value) {
                *byte = value;
            }
        }
    }

    /// Writes there.
    fn write_physical(&mut self, gpa: Gpa, bytes: &[u8]) {
        match self.vm.memory.slots().find(gpa).map(|slot| slot.kind) {
            // The slot has the whole page.
            Some(SlotKind::Ram) => {
                let _ = self.vm.memory.store(gpa, bytes);
                return;
            }
            // The write vanishes.
            Some(SlotKind::Rom) => return,
            None => {}
        }
        for (gpa, width, range) in chunks(gpa, bytes.len()) {
            let mut value = [0; 8];
            let chunk = bytes.get(range).unwrap_or_default();
            for (value, byte) in value.iter_mut().zip(chunk) {
                *value = *byte;
            }
            self.device_write(gpa, width, u64::from_le_bytes(value));
        }
    }
}

/// The accesses that `bytes` bytes of a device at `gpa` are made with: one, if that has a
/// width, else as few as there are aligned ones.
fn chunks(gpa: Gpa, bytes: usize) -> impl Iterator<Item = (Gpa, Width, core::ops::Range<usize>)> {
    const WIDEST: u64 = 8;
    let mut done = 0;
    core::iter::from_fn(move || {
        let left = bytes.checked_sub(done).filter(|left| *left != 0)? as u64;
        let at = gpa.wrapping_add(done as u64);
        let width = Width::from_bytes(left).unwrap_or_else(|| {
            let aligned = 1 << at.0.trailing_zeros().min(WIDEST.ilog2());
            let largest = 1 << left.min(WIDEST).ilog2();
            Width::from_bytes(u64::min(aligned, largest)).unwrap_or(Width::Byte)
        });
        let start = done;
        done += width.bytes() as usize;
        Some((at, width, start..done))
    })
}

/// A page that an instruction has accessed, and where it is.
#[derive(Clone, Copy)]
pub(super) struct Known {
    pub page: Gva,
    pub frame: Gpa,
    /// It may be written.
    pub write: bool,
}

/// A vCPU that executes an instruction here.
pub(super) struct Execution<'a> {
    pub(super) vcpu: &'a mut Vcpu,
    addressing: Addressing,
    /// Translations of this exit: of a source and a destination.
    known: [Option<Known>; 2],
    /// Those that accesses by the instruction meet.
    pub(super) breakpoints: DataBreakpoints,
    /// SS was loaded.
    pub(super) loaded_stack_segment: bool,
}

impl<'a> Execution<'a> {
    /// `known` is what the exit has said about the page that was accessed.
    pub(super) fn new(
        vcpu: &'a mut Vcpu,
        known: Option<Known>,
        breakpoints: DataBreakpoints,
    ) -> Self {
        Self {
            addressing: vcpu.addressing(),
            known: [known, None],
            breakpoints,
            loaded_stack_segment: false,
            vcpu,
        }
    }

    fn translate(&mut self, address: Gva, operation: Operation) -> Result<Gpa, Exception> {
        let write = operation == Operation::Write;
        let page = address.align_down(PAGE_SIZE);
        let offset = address.offset_in(PAGE_SIZE);
        for known in self.known.iter().flatten() {
            if known.page == page && known.write >= write {
                return Ok(known.frame.wrapping_add(offset));
            }
        }
        let gpa = self
            .vcpu
            .translate(address, operation, Accessor::Instruction)?;
        let frame = gpa.align_down(PAGE_SIZE);
        // The older one goes.
        self.known = [Some(Known { page, frame, write }), self.known[0]];
        Ok(gpa)
    }

    /// Translates all of it before any of it is accessed: where the first bytes are, how
    /// many, and where the others are.
    fn pieces(
        &mut self,
        linear: u64,
        bytes: usize,
        mut translate: impl FnMut(&mut Self, Gva) -> Result<Gpa, Exception>,
    ) -> Result<(Gpa, usize, Gpa), Exception> {
        let address = Gva(linear);
        let in_page = (PAGE_SIZE - address.offset_in(PAGE_SIZE)) as usize;
        let first = translate(self, address)?;
        if bytes <= in_page {
            return Ok((first, bytes, first));
        }
        let mut next = address.align_down(PAGE_SIZE).wrapping_add(PAGE_SIZE);
        if self.addressing != Addressing::Long {
            next.0 &= 0xffff_ffff;
        }
        Ok((first, in_page, translate(self, next)?))
    }

    /// Writes as code at privilege level `cpl` would.
    pub(super) fn store_at_level(
        &mut self,
        linear: u64,
        bytes: &[u8],
        cpl: u8,
    ) -> Result<(), Exception> {
        let accessor = Accessor::User(cpl == 3);
        let pieces = self.pieces(linear, bytes.len(), |this, at| {
            this.vcpu.translate(at, Operation::Write, accessor)
        })?;
        self.write_pieces(pieces, bytes);
        Ok(())
    }

    fn read_pieces(&mut self, (first, count, second): (Gpa, usize, Gpa), bytes: &mut [u8]) {
        let (head, tail) = bytes.split_at_mut(count.min(bytes.len()));
        self.vcpu.read_physical(first, head);
        if !tail.is_empty() {
            self.vcpu.read_physical(second, tail);
        }
    }

    fn write_pieces(&mut self, (first, count, second): (Gpa, usize, Gpa), bytes: &[u8]) {
        let (head, tail) = bytes.split_at(count.min(bytes.len()));
        self.vcpu.write_physical(first, head);
        if !tail.is_empty() {
            self.vcpu.write_physical(second, tail);
        }
    }
}

impl DescriptorTables for Execution<'_> {
    fn gdtr(&self) -> TableRegister {
        self.table(Table::Gdt)
    }

    fn ldtr(&self) -> SegmentRegister {
        self.vcpu.system_segment(SystemSegment::Ldtr)
    }

    fn load_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Exception> {
        let pieces = self.pieces(linear, bytes.len(), |this, at| {
            this.vcpu.translate(at, Operation::Read, Accessor::System)
        })?;
        self.read_pieces(pieces, bytes);
        Ok(())
    }

    fn store_system(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Exception> {
        let pieces = self.pieces(linear, bytes.len(), |this, at| {
            this.vcpu.translate(at, Operation::Write, Accessor::System)
        })?;
        self.write_pieces(pieces, bytes);
        Ok(())
    }
}

impl Machine for Execution<'_> {
    fn load(&mut self, linear: u64, bytes: &mut [u8], intent: Intent) -> Result<(), Exception> {
        let operation = match intent {
            Intent::Read => Operation::Read,
            Intent::Modify => Operation::Write,
        };
        let pieces = self.pieces(linear, bytes.len(), |this, at| {
            this.translate(at, operation)
        })?;
        self.read_pieces(pieces, bytes);
        self.breakpoints.note(linear, bytes.len(), false);
        Ok(())
    }

    fn store(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Exception> {
        let pieces = self.pieces(linear, bytes.len(), |this, at| {
            this.translate(at, Operation::Write)
        })?;
        self.write_pieces(pieces, bytes);
        self.breakpoints.note(linear, bytes.len(), true);
        Ok(())
    }

    fn check_store(&mut self, linear: u64, bytes: usize) -> Result<(), Exception> {
        self.pieces(linear, bytes, |this, at| {
            this.translate(at, Operation::Write)
        })
        .map(|_| ())
    }

    fn addressing(&self) -> Addressing {
        self.addressing
    }

    fn is_ia32e(&self) -> bool {
        self.vcpu.vmcs.read(guest::EFER) & EFER_LMA != 0
    }

    fn cpl(&self) -> u8 {
        self.vcpu.cpl()
    }

    fn cr0(&self) -> u64 {
        self.vcpu.cr0()
    }

    fn cr4(&self) -> u64 {
        self.vcpu.cr4()
    }

    fn xcr0(&self) -> u64 {
        if self.cr4() & CR4_OSXSAVE == 0 {
            return 0;
        }
        // SAFETY: the guest has XSAVE on, so that this CPU and the host have it.
        unsafe { cpu::xcr0() }
    }

    fn segment(&self, segment: Segment) -> SegmentRegister {
        self.vcpu.segment(segment)
    }

    fn set_segment(&mut self, segment: Segment, register: SegmentRegister) {
        self.vcpu.set_segment(segment, register);
        self.addressing = self.vcpu.addressing();
    }

    fn system_segment(&self, segment: SystemSegment) -> SegmentRegister {
        self.vcpu.system_segment(segment)
    }

    fn set_system_segment(&mut self, segment: SystemSegment, register: SegmentRegister) {
        self.vcpu.set_system_segment(segment, register);
    }

    fn table(&self, table: Table) -> TableRegister {
        let vmcs = &self.vcpu.vmcs;
        let (base, limit) = match table {
            Table::Gdt => (vmcs.read(guest::GDTR_BASE), vmcs.read(guest::GDTR_LIMIT)),
            Table::Idt => (vmcs.read(guest::IDTR_BASE), vmcs.read(guest::IDTR_LIMIT)),
        };
        TableRegister {
            base,
            limit: limit as u16,
        }
    }

    fn set_table(&mut self, table: Table, TableRegister { base, limit }: TableRegister) {
        let vmcs = &mut self.vcpu.vmcs;
        match table {
            Table::Gdt => {
                vmcs.write(guest::GDTR_BASE, base);
                vmcs.write(guest::GDTR_LIMIT, limit.into());
            }
            Table::Idt => {
                vmcs.write(guest::IDTR_BASE, base);
                vmcs.write(guest::IDTR_LIMIT, limit.into());
            }
        }
    }

    fn load_msw(&mut self, value: u16) -> Result<(), Exception> {
        self.vcpu.load_msw(value)
    }

    fn unblock_nmis(&mut self) {
        self.vcpu.unblock_nmis();
    }

    fn hold_interrupts(&mut self) {
        self.loaded_stack_segment = true;
    }

    fn post_code(&mut self) -> u8 {
        // SAFETY: the guest reads this one itself.
        unsafe { port::inb(pc::POST_CODE) }
    }

    fn set_post_code(&mut self, code: u8) {
        // SAFETY: the guest writes this one itself.
        unsafe { port::outb(pc::POST_CODE, code) }
    }

    fn vector(&mut self, register: VectorRegister, bytes: &mut [u8]) {
        let mut image = [0u8; 32];
        let at = image.as_mut_ptr();
        // SAFETY: the guest has it switched on; the largest has 32 bytes.
        unsafe {
            match register {
                VectorRegister::Mmx(number) => vector::store_mmx_register(number, at),
                VectorRegister::Xmm(number) => vector::store_xmm_register(number, at),
                VectorRegister::Ymm(number) => vector::store_ymm_register(number, at),
            }
        }
        for (byte, value) in bytes.iter_mut().zip(image) {
            *byte = value;
        }
    }

    fn set_vector(&mut self, register: VectorRegister, bytes: &[u8], vex: bool) {
        let mut image = [0u8; 32];
        for (value, byte) in image.iter_mut().zip(bytes) {
            *value = *byte;
        }
        let at = image.as_ptr();
        // SAFETY: as in `vector`.
        unsafe {
            match register {
                VectorRegister::Mmx(number) => vector::load_mmx_register(number, at),
                VectorRegister::Xmm(number) if vex => {
                    vector::load_xmm_register_by_vex(number, at);
                }
                VectorRegister::Xmm(number) => vector::load_xmm_register(number, at),
                VectorRegister::Ymm(number) => vector::load_ymm_register(number, at),
            }
        }
    }

    fn x87_exception_is_pending(&self) -> bool {
        vector::x87_exception_is_pending()
    }

    fn execute(&mut self, what: FpuInstruction, image: &mut Image, components: u64) -> bool {
        // SAFETY: the trait's conditions; the hypervisor handles exceptions.
        unsafe { what.execute(image, components) }
    }

    fn xsave_size(&self, components: u64, compacted: bool) -> usize {
        self.vcpu.cpuid.xsave_size(components, compacted) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_sees_as_few_accesses_as_possible() {
        let widths = |gpa, bytes| -> Vec<(u64, u64)> {
            chunks(Gpa(gpa), bytes)
                .map(|(gpa, width, range)| {
                    assert_eq!(range.len() as u64, width.bytes());
                    (gpa.0, width.bytes())
                })
                .collect()
        };
        assert_eq!(widths(0x1001, 4), [(0x1001, 4)]);
        assert_eq!(widths(0x1ffd, 3), [(0x1ffd, 1), (0x1ffe, 2)]);
        assert_eq!(widths(0x1000, 6), [(0x1000, 4), (0x1004, 2)]);
        assert_eq!(widths(0x1000, 16), [(0x1000, 8), (0x1008, 8)]);
        assert_eq!(widths(0x1001, 7), [(0x1001, 1), (0x1002, 2), (0x1004, 4)]);
        assert_eq!(widths(0x1000, 0), []);
    }
}
