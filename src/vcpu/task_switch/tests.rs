use super::*;
use crate::vcpu::segmentation::{Descriptor, TableRegister};

/// Where things are.
const GDT: u64 = 0x100;
const OLD: u64 = 0x400;
const NEW: u64 = 0x500;
const SMALL: u64 = 0x600;

const OLD_TASK: u16 = 0x28;
const NEW_TASK: u16 = 0x30;
const SMALL_TASK: u16 = 0x38;

/// Memory, and what the switch has loaded.
struct Ram {
    memory: Vec<u8>,
    ldtr: SegmentRegister,
    cr3: Option<u32>,
    /// The first address that is not there.
    end: u64,
}

impl Ram {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn at(&self, at: u64) -> u32 {
        let bytes = &self.memory[at as usize..][..4];
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    fn descriptor(&self, selector: u16) -> Descriptor {
        let at = GDT + u64::from(selector & !7);
        Descriptor(u64::from(self.at(at)) | u64::from(self.at(at + 4)) << 32)
    }

    fn check(&self, linear: u64, bytes: usize) -> Result<(), Exception> {
        if linear + bytes as u64 <= self.end {
            return Ok(());
        }
        let (error_code, address) = (0, linear);
        Err(Exception::PageFault {
            error_code,
            address,
        })
    }
}

impl DescriptorTables for Ram {
    fn gdtr(&self) -> TableRegister {
        TableRegister {
            base: GDT,
            limit: 0x5f,
        }
    }

    fn ldtr(&self) -> SegmentRegister {
        self.ldtr
    }

    fn load_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Exception> {
        self.check(linear, bytes.len())?;
        bytes.copy_from_slice(&self.memory[linear as usize..][..bytes.len()]);
        Ok(())
    }

    fn store_system(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Exception> {
        self.check(linear, bytes.len())?;
        self.put(linear, bytes);
        Ok(())
    }
}

impl TaskMachine for Ram {
    fn set_ldtr(&mut self, ldtr: SegmentRegister) {
        self.ldtr = ldtr;
    }

    fn set_cr3(&mut self, cr3: u32) {
        self.cr3 = Some(cr3);
    }

    fn store_stack(&mut self, linear: u64, bytes: &[u8], _: u8) -> Result<(), Exception> {
        self.store_system(linear, bytes)
    }
}

/// Two tasks of 32 bits and one of 16; the first is the current one.
fn start() -> (Ram, Task) {
    let mut ram = Ram {
        memory: vec![0; 0x1000],
        ldtr: SegmentRegister::null(0),
        cr3: None,
        end: 0x1000,
    };
    let table = [
        0u64,
        0x00cf_9b00_0000_ffff, // 0x08: code
        0x00cf_9300_0000_ffff, // 0x10: data
        0x00cf_fb00_0000_ffff, // 0x18: code of level 3
        0x00cf_f300_0000_ffff, // 0x20: data of level 3
        0x0000_8b00_0400_0067, // 0x28: a busy TSS
        0x0000_8900_0500_0067, // 0x30
        0x0000_8100_0600_002b, // 0x38: one of 16 bits
        0x0000_8200_0700_000f, // 0x40: an LDT
        0x00cf_1300_0000_ffff, // 0x48: data that is not present
        0x00cf_9f00_0000_ffff, // 0x50: conforming code
        0x0000_8900_0500_0066, // 0x58: a TSS that is too small
    ];
    ram.put(GDT, table.map(u64::to_le_bytes).as_flattened());
    set_32(&mut ram, NEW);
    let selectors = [0x10u16, 0x08, 0x10, 0x10, 0];
    for (index, value) in (0..).zip([0x40u16, 2, 11, 12, 13, 14, 0x800, 16, 17, 18]) {
        ram.put(SMALL + 0x0e + 2 * index, &value.to_le_bytes());
    }
    for (index, selector) in (0..).zip(selectors) {
        ram.put(SMALL + 0x22 + 2 * index, &selector.to_le_bytes());
    }
    let flat = |selector, rights| SegmentRegister {
        selector,
        base: 0,
        limit: u32::MAX,
        rights: Rights(rights),
    };
    let data = flat(0x10, 0xc093);
    let mut general = GeneralRegisters::default();
    (0..8).for_each(|index| general.set(index, 0x1000 + u64::from(index)));
    let task = Task {
        general,
        rip: 0x7777,
        rflags: 0x202,
        segments: [data, flat(0x08, 0xc09b), data, data, data, data],
        tr: ram.descriptor(OLD_TASK).register(OLD_TASK),
        cr0: CR0_PG | 1,
        dr7: 0x7ff,
    };
    (ram, task)
}

fn set_32(ram: &mut Ram, at: u64) {
    let fields = [0x9000u32, 0x8888, 0x46, 1, 2, 3, 4, 0x900, 6, 7, 8];
    for (index, value) in (0..).zip(fields) {
        ram.put(at + 0x1c + 4 * index, &value.to_le_bytes());
    }
    for (index, selector) in (0..).zip([0x10u32, 0x08, 0x10, 0x10, 0, 0x10, 0x40]) {
        ram.put(at + 0x48 + 4 * index, &selector.to_le_bytes());
    }
}

fn is_busy(ram: &Ram, selector: u16) -> bool {
    ram.descriptor(selector).rights().0 & BUSY != 0
}

fn switch(
    task: &mut Task,
    ram: &mut Ram,
    selector: u16,
    source: Source,
) -> Result<Beginning, Exception> {
    leave(task, ram, selector, source)?.enter(task, ram)
}

#[test]
fn a_task_comes_back_to_itself() {
    let (mut ram, mut task) = start();
    task.rflags |= RFLAGS_NT;
    let back = switch(&mut task, &mut ram, OLD_TASK, Source::Iret);
    assert_eq!(back, Ok(Beginning::Plain));
    assert_eq!((task.rip, task.rflags), (0x7777, 0x202));
    assert!(!is_busy(&ram, OLD_TASK));
}

#[test]
fn call_and_iret() {
    let (mut ram, mut task) = start();
    let before = task;
    let called = switch(&mut task, &mut ram, NEW_TASK, Source::Call);
    assert_eq!(called, Ok(Beginning::Plain));
    assert_eq!((task.rip, task.rflags), (0x8888, 0x4046));
    assert_eq!((task.general.rax, task.general.rdi), (1, 8));
    assert_eq!(task.general.rsp, 0x900);
    assert_eq!(ram.cr3, Some(0x9000));
    assert_eq!(task.cr0 & CR0_TS, CR0_TS);
    assert_eq!(task.dr7, 0x6aa);
    assert_eq!((ram.ldtr.base, ram.ldtr.limit), (0x700, 0xf));
    assert_eq!((task.tr.selector, task.tr.rights.0), (NEW_TASK, 0x8b));
    assert!(!task.segments[Segment::Fs as usize].rights.is_usable());
    assert!(is_busy(&ram, OLD_TASK) && is_busy(&ram, NEW_TASK));
    // The old one is stored, the new one knows it.
    assert_eq!((ram.at(OLD + 0x20), ram.at(OLD + 0x24)), (0x7777, 0x202));
    assert_eq!((ram.at(OLD + 0x28), ram.at(OLD + 0x5c)), (0x1000, 0x10));
    assert_eq!(ram.at(NEW) & 0xffff, u32::from(OLD_TASK));
    // Back: the CPU has the selector from the link. NT is not stored.
    set_32(&mut ram, OLD);
    ram.put(OLD + 0x20, &[0x77, 0x77]);
    let back = switch(&mut task, &mut ram, OLD_TASK, Source::Iret);
    assert_eq!(back, Ok(Beginning::Plain));
    assert_eq!((task.rip, task.tr.selector), (0x7777, OLD_TASK));
    assert_eq!((ram.at(NEW + 0x24), ram.at(NEW + 0x20)), (0x46, 0x8888));
    assert!(is_busy(&ram, OLD_TASK) && !is_busy(&ram, NEW_TASK));
    assert_eq!(before.segments[CS], task.segments[CS]);
}

#[test]
fn a_jump_leaves_no_way_back() {
    let (mut ram, mut task) = start();
    let jumped = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!((jumped, task.rflags), (Ok(Beginning::Plain), 0x46));
    assert!(!is_busy(&ram, OLD_TASK) && is_busy(&ram, NEW_TASK));
    assert_eq!(ram.at(NEW), 0);
}

#[test]
fn a_gate_pushes_the_error_code() {
    let (mut ram, mut task) = start();
    let gate = Source::Gate(Some(0x1234_5678));
    let done = switch(&mut task, &mut ram, NEW_TASK, gate);
    assert_eq!((done, task.general.rsp), (Ok(Beginning::Plain), 0x8fc));
    assert_eq!(ram.at(0x8fc), 0x1234_5678);
    assert_eq!(task.rflags & RFLAGS_NT, RFLAGS_NT);
    let (mut ram, mut task) = start();
    let done = switch(&mut task, &mut ram, SMALL_TASK, gate);
    assert_eq!((done, task.general.rsp), (Ok(Beginning::Plain), 0x7fe));
    assert_eq!(ram.at(0x7fe), 0x5678);
}

#[test]
fn sixteen_bits() {
    let (mut ram, mut task) = start();
    let done = switch(&mut task, &mut ram, SMALL_TASK, Source::Call);
    assert_eq!(done, Ok(Beginning::Plain));
    assert_eq!((task.rip, task.rflags), (0x40, 0x4002));
    assert_eq!(task.general.rcx, 0xc);
    assert_eq!(ram.cr3, None, "it has no page tables");
    assert!(!task.segments[Segment::Gs as usize].rights.is_usable());
    // From it to one of 32 bits: IP, FLAGS and AX are stored.
    task.general.rax = 0xabcd_1234;
    let done = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!(done, Ok(Beginning::Plain));
    assert_eq!(ram.at(SMALL + 0x10), 0x1234_4002);
    assert_eq!(ram.at(SMALL + 0x22) & 0xffff, 0x10);
}

#[test]
fn virtual_8086_and_level_3() {
    let (mut ram, mut task) = start();
    ram.put(NEW + 0x24, &0x2_0002u32.to_le_bytes());
    ram.put(NEW + 0x4c, &0x4200u32.to_le_bytes());
    let done = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!(done, Ok(Beginning::Plain));
    let code = task.segments[CS];
    assert_eq!(
        (code.base, code.limit, code.rights.0),
        (0x4_2000, 0xffff, 0xf3)
    );
    let (mut ram, mut task) = start();
    ram.put(NEW + 0x4c, &[0x1b]);
    for (field, selector) in [(0x50, 0x23), (0x48, 0x23), (0x54, 0x23), (0x5c, 0x23)] {
        ram.put(NEW + field, &[selector]);
    }
    let done = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!(done, Ok(Beginning::Plain));
    assert_eq!(task.segments[SS].rights.dpl(), 3);
    // Conforming code of level 0 at level 3.
    let (mut ram, mut task) = start();
    ram.put(NEW + 0x4c, &[0x53]);
    for (field, selector) in [(0x50, 0x23), (0x48, 0x23), (0x54, 0x23), (0x5c, 0x23)] {
        ram.put(NEW + field, &[selector]);
    }
    let done = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!(
        (done, task.segments[CS].selector),
        (Ok(Beginning::Plain), 0x53)
    );
}

#[test]
fn what_is_wrong_with_the_tss_is_the_old_tasks() {
    let gp = |selector| SegmentFault::GeneralProtection.with(selector);
    let ts = |selector| SegmentFault::InvalidTss.with(selector);
    for (selector, source, exception) in [
        (0, Source::Call, gp(0)),
        (0x60, Source::Call, gp(0x60)),
        (0x34, Source::Call, gp(0x34)),
        (0x10, Source::Jump, gp(0x10)),
        (OLD_TASK, Source::Call, gp(OLD_TASK)),
        (NEW_TASK, Source::Iret, ts(NEW_TASK)),
        (0x40, Source::Jump, gp(0x40)),
        (0x58, Source::Jump, ts(0x58)),
    ] {
        let (mut ram, mut task) = start();
        let (before, memory) = (task, ram.memory.clone());
        let result = switch(&mut task, &mut ram, selector, source);
        assert_eq!(result, Err(exception), "{selector:x}");
        assert!(task == before && ram.memory == memory);
    }
    // A TSS in a page that is not there.
    let (mut ram, mut task) = start();
    ram.end = NEW + 0x60;
    let before = task;
    let result = switch(&mut task, &mut ram, NEW_TASK, Source::Call);
    assert!(matches!(result, Err(Exception::PageFault { .. })));
    assert_eq!(task, before);
}

#[test]
fn what_is_wrong_with_its_segments_is_the_new_tasks() {
    let ts = |selector| SegmentFault::InvalidTss.with(selector);
    for (field, selector, exception) in [
        (0x60, 0x10u16, ts(0x10)),
        (0x4c, 0, ts(0)),
        (0x4c, 0x10, ts(0x10)),
        (0x4c, 0x1a, ts(0x18)),
        (0x50, 0, ts(0)),
        (0x50, 0x23, ts(0x20)),
        (0x50, 0x48, SegmentFault::Stack.with(0x48)),
        (0x54, 0x48, SegmentFault::NotPresent.with(0x48)),
        (0x48, 0x60, ts(0x60)),
        (0x5c, 0x28, ts(0x28)),
    ] {
        let (mut ram, mut task) = start();
        ram.put(NEW + field, &selector.to_le_bytes());
        let result = switch(&mut task, &mut ram, NEW_TASK, Source::Call);
        assert_eq!(result, Err(exception), "{field:x} {selector:x}");
        assert_eq!((task.tr.selector, task.rip), (NEW_TASK, 0x8888));
        assert!(task.segments[CS].rights.is_code(), "for the handler");
    }
    let (mut ram, mut task) = start();
    ram.put(GDT + 8, &0x0040_9b00_0000_1000u64.to_le_bytes());
    let beyond = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!(beyond, Err(Exception::GeneralProtection));
}

/// An entry refuses a CS of virtual-8086 mode outside it, and null segments in it (SDM 3, 27.3.1.2).
#[test]
fn what_goes_wrong_to_or_from_virtual_8086_mode_leaves_segments_of_the_new_one() {
    let (mut ram, mut task) = start();
    ram.put(NEW + 0x24, &0x2_0002u32.to_le_bytes());
    ram.put(NEW + 0x4c, &0x4200u32.to_le_bytes());
    ram.put(NEW + 0x60, &0x7f8u32.to_le_bytes());
    let to = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!(to, Err(SegmentFault::InvalidTss.of(0x7f8)));
    assert_eq!(task.rflags & RFLAGS_VM, RFLAGS_VM);
    assert!(task.segments.iter().all(|own| own.rights.0 == 0xf3));

    let (mut ram, mut task) = start();
    task.rflags |= RFLAGS_VM;
    task.segments = [SegmentRegister::paragraph(0x4200); 6];
    ram.put(NEW + 0x4c, &[0]);
    let from = switch(&mut task, &mut ram, NEW_TASK, Source::Gate(None));
    assert_eq!(from, Err(SegmentFault::InvalidTss.of(0)));
    assert_eq!(task.rflags & RFLAGS_VM, 0);
    let rights = [CS, SS].map(|segment| task.segments[segment].rights);
    assert!(rights[0].is_code() && rights[0].dpl() == rights[1].dpl());
}

#[test]
fn the_debug_trap() {
    let (mut ram, mut task) = start();
    ram.put(NEW + 0x64, &[1]);
    let trapped = switch(&mut task, &mut ram, NEW_TASK, Source::Jump);
    assert_eq!(trapped, Ok(Beginning::Trap));
}
