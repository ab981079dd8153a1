//! A machine of the tests' own: some memory, and registers without meaning.

use super::super::*;
use crate::vcpu::segmentation::Rights;

/// Where its memory is, unless a test says otherwise.
pub const BASE: u64 = 0x1000;

pub struct Ram {
    pub base: u64,
    pub memory: Vec<u8>,
    pub addressing: Addressing,
    pub cpl: u8,
    pub cr0: u64,
    pub cr4: u64,
    pub segments: [SegmentRegister; 6],
    pub system: [SegmentRegister; 2],
    pub tables: [TableRegister; 2],
    pub vectors: [[u8; 32]; 16],
    pub mmx: [[u8; 8]; 8],
    /// For XRSTOR: x87, SSE and AVX, where instructions are executed with that, by this CPU.
    pub fpu: Option<Box<Image>>,
    pub post_code: u8,
    pub held: bool,
    pub nmis_blocked: bool,
    /// Accesses: writes with `true`, their addresses and sizes.
    pub log: Vec<(bool, u64, usize)>,
}

pub const DATA_32: Rights = Rights(0xc093);
pub const CODE_32: Rights = Rights(0xc09b);
pub const CODE_16: Rights = Rights(0x9b);
pub const DATA_16: Rights = Rights(0x93);
pub const CODE_64: Rights = Rights(0xa09b);

impl Ram {
    pub fn new(bytes: usize, mode: Mode) -> Self {
        let (code, data, limit, addressing) = match mode {
            Mode::Bits16 => (CODE_16, DATA_16, 0xffff, Addressing::Protected),
            Mode::Bits32 => (CODE_32, DATA_32, u32::MAX, Addressing::Protected),
            Mode::Bits64 => (CODE_64, DATA_32, u32::MAX, Addressing::Long),
        };
        let segment = |rights| SegmentRegister {
            selector: 0x10,
            base: 0,
            limit,
            rights,
        };
        let data = segment(data);
        Self {
            base: BASE,
            memory: vec![0; bytes],
            addressing,
            cpl: 0,
            cr0: 1,
            cr4: 1 << 9 | 1 << 18,
            segments: [data, segment(code), data, data, data, data],
            system: [SegmentRegister::null(0); 2],
            tables: [TableRegister::default(); 2],
            vectors: [[0; 32]; 16],
            mmx: [[0; 8]; 8],
            fpu: None,
            post_code: 0,
            held: false,
            nmis_blocked: true,
            log: Vec::new(),
        }
    }

    fn range(&self, linear: u64, bytes: usize, write: bool) -> Result<usize, Exception> {
        let start = linear.wrapping_sub(self.base);
        let end = start.checked_add(bytes as u64);
        if end.is_some_and(|end| end <= self.memory.len() as u64) {
            Ok(start as usize)
        } else {
            let error_code = if write { 2 } else { 0 };
            Err(Exception::PageFault {
                error_code,
                address: linear,
            })
        }
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let start = (at - self.base) as usize;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
    }

    pub fn at(&self, at: u64, bytes: usize) -> u64 {
        let start = (at - self.base) as usize;
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&self.memory[start..start + bytes]);
        u64::from_le_bytes(value)
    }
}

impl DescriptorTables for Ram {
    fn gdtr(&self) -> TableRegister {
        self.tables[0]
    }

    fn ldtr(&self) -> SegmentRegister {
        self.system[0]
    }

    fn load_system(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Exception> {
        self.load(linear, bytes, Intent::Read)
    }

    fn store_system(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Exception> {
        self.store(linear, bytes)
    }
}

impl Machine for Ram {
    fn load(&mut self, linear: u64, bytes: &mut [u8], intent: Intent) -> Result<(), Exception> {
        assert!((1..=4096).contains(&bytes.len()));
        let start = self.range(linear, bytes.len(), intent == Intent::Modify)?;
        bytes.copy_from_slice(&self.memory[start..start + bytes.len()]);
        self.log.push((false, linear, bytes.len()));
        Ok(())
    }

    fn store(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Exception> {
        assert!((1..=4096).contains(&bytes.len()));
        let start = self.range(linear, bytes.len(), true)?;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
        self.log.push((true, linear, bytes.len()));
        Ok(())
    }

    fn check_store(&mut self, linear: u64, bytes: usize) -> Result<(), Exception> {
        self.range(linear, bytes, true).map(|_| ())
    }

    fn addressing(&self) -> Addressing {
        self.addressing
    }

    fn is_ia32e(&self) -> bool {
        self.addressing == Addressing::Long
    }

    fn cpl(&self) -> u8 {
        self.cpl
    }

    fn cr0(&self) -> u64 {
        self.cr0
    }

    fn cr4(&self) -> u64 {
        self.cr4
    }

    fn xcr0(&self) -> u64 {
        if self.cr4 & 1 << 18 == 0 { 0 } else { 7 }
    }

    fn segment(&self, segment: Segment) -> SegmentRegister {
        self.segments[segment as usize]
    }

    fn set_segment(&mut self, segment: Segment, register: SegmentRegister) {
        self.segments[segment as usize] = register;
    }

    fn system_segment(&self, segment: SystemSegment) -> SegmentRegister {
        self.system[segment as usize]
    }

    fn set_system_segment(&mut self, segment: SystemSegment, register: SegmentRegister) {
        self.system[segment as usize] = register;
    }

    fn table(&self, table: Table) -> TableRegister {
        self.tables[table as usize]
    }

    fn set_table(&mut self, table: Table, value: TableRegister) {
        self.tables[table as usize] = value;
    }

    fn load_msw(&mut self, value: u16) -> Result<(), Exception> {
        self.cr0 = self.cr0 & !0xe | u64::from(value) & 0xf;
        Ok(())
    }

    fn unblock_nmis(&mut self) {
        self.nmis_blocked = false;
    }

    fn hold_interrupts(&mut self) {
        self.held = true;
    }

    fn post_code(&mut self) -> u8 {
        self.post_code
    }

    fn set_post_code(&mut self, code: u8) {
        self.post_code = code;
    }

    fn vector(&mut self, register: VectorRegister, bytes: &mut [u8]) {
        match register {
            VectorRegister::Mmx(number) => bytes.copy_from_slice(&self.mmx[number as usize]),
            VectorRegister::Xmm(number) | VectorRegister::Ymm(number) => {
                bytes.copy_from_slice(&self.vectors[number as usize][..bytes.len()]);
            }
        }
    }

    fn set_vector(&mut self, register: VectorRegister, bytes: &[u8], vex: bool) {
        match register {
            VectorRegister::Mmx(number) => self.mmx[number as usize].copy_from_slice(bytes),
            VectorRegister::Xmm(number) | VectorRegister::Ymm(number) => {
                let vector = &mut self.vectors[number as usize];
                vector[..bytes.len()].copy_from_slice(bytes);
                if vex {
                    vector[bytes.len()..].fill(0);
                }
            }
        }
    }

    fn x87_exception_is_pending(&self) -> bool {
        // The error summary of the status word.
        self.fpu
            .as_ref()
            .is_some_and(|state| state.0[2] & 0x80 != 0)
    }

    fn execute(&mut self, what: FpuInstruction, image: &mut Image, components: u64) -> bool {
        let Some(state) = &mut self.fpu else {
            return true;
        };
        let mut own = Image::EMPTY;
        // SAFETY: this CPU has AVX where there is such a state, all of which is there again
        // afterwards, and nothing in between uses any of it.
        unsafe {
            exchange(&mut own, state);
            let done = what.execute(image, components);
            exchange(state, &own);
            done
        }
    }

    fn xsave_size(&self, components: u64, compacted: bool) -> usize {
        let _ = compacted;
        if components & 4 == 0 { 576 } else { 832 }
    }
}

/// Takes the state that the CPU has, and loads another.
///
/// # Safety
/// The compiler does not know that the registers have changed.
#[inline(always)]
pub unsafe fn exchange(taken: &mut Image, loaded: &Image) {
    // SAFETY: both have room for it, and are aligned.
    unsafe {
        core::arch::asm!("xsave64 [{}]", "xrstor64 [{}]", in(reg) taken, in(reg) loaded, in("eax") 7, in("edx") 0);
    }
}
