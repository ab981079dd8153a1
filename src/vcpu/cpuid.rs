//! What the guest's CPUID says: the host's leaves cut by an allow-list.
//!
//! The table is built when a vCPU is made, so that the exit is one look-up
//! without a decision: a bit is shown only when it stands in one of the lists
//! below, and what is not known today stays hidden tomorrow. The bits that the
//! guest moves itself (OSXSAVE, the APIC's enable, the XSAVE area's size) are
//! patched into the table when it moves them, not when it reads them.
//!
//! Source: SDM 2A, "CPUID"; the hypervisor leaves as Linux documents them for
//! KVM (`Documentation/virt/kvm/x86/cpuid.rst`).

mod xsave;

#[cfg(test)]
mod tests;

use xsave::XsaveArea;

/// EAX, EBX, ECX and EDX of one leaf.
pub type Registers = [u32; 4];

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// What the host's CPUID cannot say about a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// vCPUs of the VM, with APIC identifiers `0..vcpus`; 0 is taken as 1.
    pub vcpus: u32,
    /// The guest's time-stamp counter, in kHz.
    pub tsc_khz: u32,
    /// The guest's local APICs have the x2APIC mode.
    pub x2apic: bool,
    /// The input clock of the guest's local APIC timers, in kHz.
    pub apic_bus_khz: u32,
    /// RDTSCP and RDPID do not fault in guest mode ("enable RDTSCP").
    pub rdtscp: bool,
    /// INVPCID does not fault in guest mode ("enable INVPCID").
    pub invpcid: bool,
    /// XSAVES and XRSTORS do not fault in guest mode ("enable XSAVES/XRSTORS").
    pub xsaves: bool,
    /// The host's IA32_MISC_ENABLE has fast strings on. Where they are off, REP
    /// MOVSB moves bytes one by one, and what promises otherwise is hidden.
    pub fast_strings: bool,
}

const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

/// Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, MOVBE,
/// POPCNT, AES, XSAVE, AVX, F16C, RDRAND.
/// Hidden: MONITOR (would leave guest mode or, on the emulated PC, not wake),
/// VMX and SMX (no nesting), EIST, TM2 and PDCM (power and performance MSRs),
/// DTES64, DS-CPL, SDBG, xTPR, DCA (their MSRs are not offered).
const LEAF1_ECX: u32 = bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
/// Leaf 1 ECX, emulated whether or not the host has it: TSC deadline; and "a hypervisor is present".
const LEAF1_ECX_SET: u32 = bits(&[24, 31]);
/// The same, where local APICs have x2APIC mode.
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_FMA_AVX_F16C: u32 = bits(&[12, 28, 29]);
const LEAF1_ECX_XSAVE: u32 = 1 << 26;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;

/// Leaf 1 EDX: FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, SEP, MTRR, PGE, MCA,
/// CMOV, PAT, PSE-36, CLFLUSH, MMX, FXSR, SSE, SSE2, self-snoop.
/// Hidden: PSN, DS, ACPI, TM, PBE (thermal control and debug store MSRs). HTT
/// is set from the number of vCPUs, APIC from the guest's APIC base.
const LEAF1_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27,
]);
const LEAF1_EDX_APIC: u32 = 1 << 9;
const LEAF1_EDX_HTT: u32 = 1 << 28;

/// Leaf 6 EAX: ARAT. The emulated timers do not stop in any idle state.
const LEAF6_EAX_SET: u32 = 1 << 2;

/// Leaf 7 EBX: FSGSBASE, BMI1, AVX2, FDP-exception-only, SMEP, BMI2,
/// FCS/FDS deprecation, AVX-512 F and DQ, RDSEED, ADX, SMAP, AVX-512 IFMA,
/// CLFLUSHOPT, CLWB, AVX-512 CD, SHA, AVX-512 BW and VL.
/// Hidden: SGX, HLE and RTM (an abort at every exit, and side channels), PQM and
/// PQE (machine-wide resources), MPX (removed from kernels), processor trace.
const LEAF7_EBX: u32 = bits(&[
    0, 3, 5, 6, 7, 8, 13, 16, 17, 18, 19, 20, 21, 23, 24, 28, 29, 30, 31,
]);
/// Leaf 7 EBX, emulated: TSC_ADJUST.
const LEAF7_EBX_SET: u32 = 1 << 1;
const LEAF7_EBX_INVPCID: u32 = 1 << 10;
/// ERMS.
const LEAF7_EBX_FAST_STRINGS: u32 = 1 << 9;
const LEAF7_EBX_AVX2: u32 = 1 << 5;
const LEAF7_EBX_AVX512: u32 = bits(&[16, 17, 21, 28, 30, 31]);

/// Leaf 7 ECX: VBMI, UMIP, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG,
/// VPOPCNTDQ, CLDEMOTE, MOVDIRI, MOVDIR64B.
/// Hidden: PKU and PKS (PKRU's state), WAITPKG (its exiting control), CET, LA57
/// (linear addresses are checked for 48 bits), key locker, TME, ENQCMD, SGX-LC.
const LEAF7_ECX: u32 = bits(&[1, 2, 6, 8, 9, 10, 11, 12, 14, 25, 27, 28]);
const LEAF7_ECX_RDPID: u32 = 1 << 22;
const LEAF7_ECX_AVX: u32 = bits(&[9, 10]);
const LEAF7_ECX_AVX512: u32 = bits(&[1, 6, 11, 12, 14]);

/// Leaf 7 EDX: VP2INTERSECT, MD_CLEAR, SERIALIZE, AVX-512 FP16, IBRS and IBPB, STIBP, L1D_FLUSH, SSBD.
/// Hidden: user interrupts, SRBDS control, TSX bits, hybrid, PCONFIG,
/// architectural LBR, CET, AMX, ARCH_CAPABILITIES and CORE_CAPABILITIES.
const LEAF7_EDX: u32 = bits(&[8, 10, 14, 23, 26, 27, 28, 31]);
/// FSRM.
const LEAF7_EDX_FAST_STRINGS: u32 = 1 << 4;
const LEAF7_EDX_AVX512: u32 = bits(&[8, 23]);

/// Leaf 7.1 EAX: SHA512, SM3, SM4, AVX-VNNI, AVX512-BF16, CMPCCXADD, AVX-IFMA.
const LEAF7_1_EAX: u32 = bits(&[0, 1, 2, 4, 5, 7, 23]);
/// Fast zero-length MOVSB, fast short STOSB, fast short CMPSB and SCASB.
const LEAF7_1_EAX_FAST_STRINGS: u32 = bits(&[10, 11, 12]);
const LEAF7_1_EAX_AVX: u32 = bits(&[0, 1, 2, 4, 23]);
const LEAF7_1_EAX_AVX512: u32 = 1 << 5;
/// Leaf 7.1 EDX: AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, PREFETCHIT.
const LEAF7_1_EDX: u32 = bits(&[4, 5, 10, 14]);
const LEAF7_1_EDX_AVX: u32 = bits(&[4, 5, 10]);

/// Leaf 0x8000_0001 ECX: LAHF in 64-bit mode, LZCNT, PREFETCHW.
const EXTENDED_ECX: u32 = bits(&[0, 5, 8]);
/// Leaf 0x8000_0001 EDX: SYSCALL, NX, 1-GiB pages, 64-bit mode.
const EXTENDED_EDX: u32 = bits(&[11, 20, 26, 29]);
const EXTENDED_EDX_RDTSCP: u32 = 1 << 27;
/// Leaf 0x8000_0007 EDX: invariant TSC.
const INVARIANT_TSC: u32 = 1 << 8;

/// Guest-physical and linear addresses have at most this many bits: four levels of EPT, and no LA57.
const MAX_ADDRESS_BITS: u32 = 48;

/// KVM's leaf 0x4000_0001 EAX: the second pair of clock MSRs (3), the clock is
/// stable across vCPUs (24), and port I/O needs no delay (1: the devices are software).
const KVM_FEATURES: u32 = bits(&[1, 3, 24]);

const BASIC_LEAVES: u32 = 0x10;
const HYPERVISOR: u32 = 0x4000_0000;
const HYPERVISOR_LEAVES: u32 = 0x11;
const EXTENDED: u32 = 0x8000_0000;
const EXTENDED_LEAVES: u32 = 9;

/// Slots of the directory: the three ranges in a row, then the one for every other leaf.
const OUT_OF_RANGE: usize = (BASIC_LEAVES + HYPERVISOR_LEAVES + EXTENDED_LEAVES) as usize;
const SLOTS: usize = 64;
const ROWS: usize = 64;

/// Where the rows of one leaf are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    /// The row of sub-leaf 0.
    first: u8,
    /// Sub-leaves that have a row of their own.
    count: u8,
    /// The row of every other sub-leaf.
    beyond: u8,
    /// Bits of the sub-leaf that such a row repeats in ECX (leaf 0xB).
    echo: u8,
}

/// The CPUID of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidTable {
    rows: [Registers; ROWS],
    directory: [Slot; SLOTS],
    used: u8,
    xsave: XsaveArea,
}

impl CpuidTable {
    /// The table of the vCPU with this x2APIC identifier, from the host's
    /// leaves: `host(leaf, sub-leaf)` executes CPUID, or plays a recording.
    /// The guest's CR4.OSXSAVE is taken as clear, XCR0 as 1, its APIC as enabled.
    pub fn new(host: impl Fn(u32, u32) -> Registers, options: &Options, apic_id: u32) -> Self {
        let xsave = XsaveArea::from_host(&host, options.xsaves);
        let mut table = Self {
            rows: [[0; 4]; ROWS],
            directory: [Slot::default(); SLOTS],
            used: 1, // row 0 stays zero: every leaf that has no slot of its own
            xsave,
        };
        table.add_basic(&host, options, apic_id);
        table.add_hypervisor(options);
        table.add_extended(&host, options);
        table.set_xcr0(1);
        table
    }

    /// The registers that CPUID returns. A leaf above the highest basic or
    /// extended one gives the data of the highest basic leaf, as Intel's CPUs do.
    pub fn lookup(&self, leaf: u32, subleaf: u32) -> Registers {
        if let Some(row) = self.row(leaf, subleaf) {
            return *row;
        }
        let slot = self.directory[slot_of(leaf) % SLOTS];
        let mut row = self.rows[usize::from(slot.beyond) % ROWS];
        row[ECX] |= subleaf & u32::from(slot.echo);
        row
    }

    /// The same where the leaf has such a sub-leaf, or ignores it being 0.
    #[inline(always)]
    pub fn row(&self, leaf: u32, subleaf: u32) -> Option<&Registers> {
        let slot = self.directory[slot_of(leaf) % SLOTS];
        (subleaf < u32::from(slot.count))
            .then(|| &self.rows[(usize::from(slot.first) + subleaf as usize) % ROWS])
    }

    /// Family, model and stepping: EAX of leaf 1.
    pub fn signature(&self) -> u32 {
        self.row(1, 0).map_or(0, |row| row[EAX])
    }

    /// Follows the guest's CR4.OSXSAVE: leaf 1 ECX bit 27 repeats it.
    pub fn set_osxsave(&mut self, on: bool) {
        set_bits(&mut self.row_mut(1, 0)[ECX], LEAF1_ECX_OSXSAVE, on);
    }

    /// Follows the global enable of the guest's IA32_APIC_BASE: leaf 1 EDX bit 9 repeats it.
    pub fn set_apic_enabled(&mut self, on: bool) {
        set_bits(&mut self.row_mut(1, 0)[EDX], LEAF1_EDX_APIC, on);
    }

    /// Follows the guest's XCR0: leaf 0xD gives the size of the XSAVE area for it.
    pub fn set_xcr0(&mut self, xcr0: u64) {
        if self.xsave.supported == 0 {
            return;
        }
        let (standard, compacted) = (self.xsave_size(xcr0, false), self.xsave_size(xcr0, true));
        let xsavec = self.xsave.compaction;
        self.row_mut(0xd, 0)[EBX] = standard;
        self.row_mut(0xd, 1)[EBX] = if xsavec { compacted } else { 0 };
    }

    /// The XSAVE state components that XCR0 may hold; 0 without XSAVE.
    pub fn xcr0_supported(&self) -> u64 {
        self.xsave.supported
    }

    /// Bytes of the XSAVE area for these components.
    pub fn xsave_size(&self, components: u64, compacted: bool) -> u32 {
        if compacted {
            self.xsave.compacted_size(components)
        } else {
            self.xsave.standard_size(components)
        }
    }

    fn has(&self, leaf: u32, register: usize, bit: u32) -> bool {
        self.lookup(leaf, 0)[register % 4] & 1 << bit != 0
    }

    /// Whether RDTSCP, hence IA32_TSC_AUX, is there.
    pub fn has_rdtscp(&self) -> bool {
        self.has(EXTENDED + 1, EDX, 27)
    }

    /// Whether IA32_SPEC_CTRL is there (leaf 7 EDX: IBRS, STIBP or SSBD).
    pub fn has_spec_ctrl(&self) -> bool {
        self.lookup(7, 0)[EDX] & bits(&[26, 27, 31]) != 0
    }

    /// Whether IA32_PRED_CMD is there (IBPB).
    pub fn has_pred_cmd(&self) -> bool {
        self.has(7, EDX, 26)
    }

    /// Whether IA32_FLUSH_CMD is there (L1D_FLUSH).
    pub fn has_flush_cmd(&self) -> bool {
        self.has(7, EDX, 28)
    }

    /// Whether XSAVES, hence IA32_XSS, is there.
    pub fn has_xsaves(&self) -> bool {
        self.xsave.supported != 0 && self.lookup(0xd, 1)[EAX] & 1 << 3 != 0
    }

    /// Bits of a guest-physical address (MAXPHYADDR).
    pub fn physical_address_bits(&self) -> u32 {
        self.lookup(EXTENDED + 8, 0)[EAX] & 0xff
    }

    fn row_mut(&mut self, leaf: u32, subleaf: u8) -> &mut Registers {
        let first = self.directory[slot_of(leaf) % SLOTS].first;
        &mut self.rows[usize::from(first.wrapping_add(subleaf)) % ROWS]
    }

    fn push(&mut self, row: Registers) -> u8 {
        let at = self.used;
        self.rows[usize::from(at) % ROWS] = row;
        self.used = at.saturating_add(1);
        at
    }

    /// A leaf that ignores the sub-leaf.
    fn add(&mut self, leaf: u32, row: Registers) {
        let at = self.push(row);
        self.directory[slot_of(leaf) % SLOTS] = Slot {
            first: at,
            count: 1,
            beyond: at,
            echo: 0,
        };
    }

    /// A leaf with sub-leaves; those beyond read as zero.
    fn add_subleaves(&mut self, leaf: u32, rows: impl Iterator<Item = Registers>) {
        let first = self.used;
        for row in rows {
            self.push(row);
        }
        self.directory[slot_of(leaf) % SLOTS] = Slot {
            first,
            count: self.used - first,
            beyond: 0,
            echo: 0,
        };
    }

    fn add_basic(
        &mut self,
        host: &impl Fn(u32, u32) -> Registers,
        options: &Options,
        apic_id: u32,
    ) {
        let host_highest = host(0, 0)[EAX];
        let leaf = |leaf: u32, subleaf: u32| {
            if leaf <= host_highest {
                host(leaf, subleaf)
            } else {
                [0; 4]
            }
        };
        // Leaf 0xB always exists: a hypervisor offers x2APIC whatever the CPU has. Above 0xD nothing is shown:
        // 0x14 needs processor trace; 0x15 and 0x16 name frequencies that need not be those of
        // this counter and this APIC timer (leaf 0x4000_0010 has the measured ones).
        let highest = if self.xsave.supported != 0 { 0xd } else { 0xb };
        let vendor = leaf(0, 0);
        self.add(0, [highest, vendor[EBX], vendor[ECX], vendor[EDX]]);
        self.add(1, self.leaf1(leaf(1, 0), options, apic_id));
        self.add(2, leaf(2, 0));
        let (slots, _) = topology(options.vcpus);
        let caches = (0..8)
            .map(|i| leaf(4, i))
            .take_while(|row| row[EAX] & 0x1f != 0)
            .map(|row| cache_leaf(row, slots));
        self.add_subleaves(4, caches);
        self.add(6, [LEAF6_EAX_SET, 0, 0, 0]);
        let (leaf7, leaf7_1) = (leaf(7, 0), leaf(7, 1));
        let last = leaf7[EAX].min(1);
        let rows = [
            self.leaf7(leaf7, last, options),
            self.leaf7_1(leaf7_1, last, options),
        ];
        self.add_subleaves(7, rows.into_iter().take(last as usize + 1));
        self.add_topology(options, apic_id);
        if self.xsave.supported != 0 {
            let area = self.xsave;
            self.add_subleaves(0xd, (0..xsave::COMPONENTS).map(|i| area.leaf(i)));
        }
        let last = self.directory[slot_of(highest) % SLOTS];
        for above in highest + 1..BASIC_LEAVES {
            self.directory[slot_of(above) % SLOTS] = last;
        }
        self.directory[OUT_OF_RANGE % SLOTS] = last;
    }

    fn leaf1(&self, host: Registers, options: &Options, apic_id: u32) -> Registers {
        let (slots, _) = topology(options.vcpus);
        let mut row = host;
        // Brand index and CLFLUSH size are the host's; identifiers and their number are the VM's.
        row[EBX] = host[EBX] & 0xffff | slots.min(255) << 16 | (apic_id & 0xff) << 24;
        row[ECX] = host[ECX] & LEAF1_ECX | LEAF1_ECX_SET;
        set_bits(&mut row[ECX], LEAF1_ECX_X2APIC, options.x2apic);
        if self.xsave.supported == 0 {
            row[ECX] &= !LEAF1_ECX_XSAVE;
        }
        if !self.xsave.avx() {
            row[ECX] &= !LEAF1_ECX_FMA_AVX_F16C;
        }
        row[EDX] = host[EDX] & LEAF1_EDX | LEAF1_EDX_APIC;
        set_bits(&mut row[EDX], LEAF1_EDX_HTT, options.vcpus > 1);
        row
    }

    fn leaf7(&self, host: Registers, last: u32, options: &Options) -> Registers {
        let mut row = [
            last,
            host[EBX] & LEAF7_EBX | LEAF7_EBX_SET,
            host[ECX] & LEAF7_ECX,
            host[EDX] & LEAF7_EDX,
        ];
        if options.invpcid {
            row[EBX] |= host[EBX] & LEAF7_EBX_INVPCID;
        }
        if options.rdtscp {
            row[ECX] |= host[ECX] & LEAF7_ECX_RDPID;
        }
        if options.fast_strings {
            row[EBX] |= host[EBX] & LEAF7_EBX_FAST_STRINGS;
            row[EDX] |= host[EDX] & LEAF7_EDX_FAST_STRINGS;
        }
        if !self.xsave.avx() {
            row[EBX] &= !LEAF7_EBX_AVX2;
            row[ECX] &= !LEAF7_ECX_AVX;
        }
        if !self.xsave.avx512() {
            row[EBX] &= !LEAF7_EBX_AVX512;
            row[ECX] &= !LEAF7_ECX_AVX512;
            row[EDX] &= !LEAF7_EDX_AVX512;
        }
        row
    }

    fn leaf7_1(&self, host: Registers, last: u32, options: &Options) -> Registers {
        if last == 0 {
            return [0; 4];
        }
        let mut row = [host[EAX] & LEAF7_1_EAX, 0, 0, host[EDX] & LEAF7_1_EDX];
        if options.fast_strings {
            row[EAX] |= host[EAX] & LEAF7_1_EAX_FAST_STRINGS;
        }
        if !self.xsave.avx() {
            row[EAX] &= !LEAF7_1_EAX_AVX;
            row[EDX] &= !LEAF7_1_EDX_AVX;
        }
        if !self.xsave.avx512() {
            row[EAX] &= !LEAF7_1_EAX_AVX512;
        }
        row
    }

    /// Leaf 0xB: one package, a core per vCPU, a thread per core.
    fn add_topology(&mut self, options: &Options, apic_id: u32) {
        let (_, shift) = topology(options.vcpus);
        let rows = [
            [0, 1, 0x100, apic_id],
            [shift, options.vcpus.clamp(1, 0xffff), 0x201, apic_id],
        ];
        self.add_subleaves(0xb, rows.into_iter());
        // An invalid level repeats its number, and names the identifier all the same.
        let beyond = self.push([0, 0, 0, apic_id]);
        let slot = &mut self.directory[slot_of(0xb) % SLOTS];
        slot.beyond = beyond;
        slot.echo = 0xff;
    }

    fn add_hypervisor(&mut self, options: &Options) {
        let name = b"KVMKVMKVM\0\0\0";
        let part = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
        self.add(
            HYPERVISOR,
            [
                HYPERVISOR + HYPERVISOR_LEAVES - 1,
                part(0),
                part(4),
                part(8),
            ],
        );
        self.add(HYPERVISOR + 1, [KVM_FEATURES, 0, 0, 0]);
        self.add(
            HYPERVISOR + 0x10,
            [options.tsc_khz, options.apic_bus_khz, 0, 0],
        );
    }

    fn add_extended(&mut self, host: &impl Fn(u32, u32) -> Registers, options: &Options) {
        let host_highest = host(EXTENDED, 0)[EAX];
        let leaf = |leaf: u32| {
            if host_highest >= EXTENDED && leaf <= host_highest {
                host(leaf, 0)
            } else {
                [0; 4]
            }
        };
        self.add(EXTENDED, [EXTENDED + EXTENDED_LEAVES - 1, 0, 0, 0]);
        let [_, _, ecx, edx] = leaf(EXTENDED + 1);
        let rdtscp = if options.rdtscp {
            EXTENDED_EDX_RDTSCP
        } else {
            0
        };
        self.add(
            EXTENDED + 1,
            [0, 0, ecx & EXTENDED_ECX, edx & (EXTENDED_EDX | rdtscp)],
        );
        for name in EXTENDED + 2..=EXTENDED + 4 {
            self.add(name, leaf(name));
        }
        self.add(EXTENDED + 6, [0, 0, leaf(EXTENDED + 6)[ECX], 0]);
        self.add(
            EXTENDED + 7,
            [0, 0, 0, leaf(EXTENDED + 7)[EDX] & INVARIANT_TSC],
        );
        let widths = leaf(EXTENDED + 8)[EAX];
        let (physical, linear) = match (widths & 0xff, widths >> 8 & 0xff) {
            (0, _) => (36, 48), // a CPU without the leaf (SDM 3, 5.1.4)
            (physical, linear) => (physical.min(MAX_ADDRESS_BITS), linear.min(MAX_ADDRESS_BITS)),
        };
        self.add(EXTENDED + 8, [linear << 8 | physical, 0, 0, 0]);
    }
}

/// The slot of a leaf.
#[inline]
fn slot_of(leaf: u32) -> usize {
    const EXTENDED_LAST: u32 = EXTENDED + EXTENDED_LEAVES - 1;
    const HYPERVISOR_LAST: u32 = HYPERVISOR + HYPERVISOR_LEAVES - 1;
    match leaf {
        0..BASIC_LEAVES => leaf as usize,
        HYPERVISOR..=HYPERVISOR_LAST => (leaf - HYPERVISOR + BASIC_LEAVES) as usize,
        EXTENDED..=EXTENDED_LAST => (leaf - EXTENDED + BASIC_LEAVES + HYPERVISOR_LEAVES) as usize,
        _ => OUT_OF_RANGE,
    }
}

/// APIC identifiers set aside for the package's cores (a power of two), and the bits they take.
fn topology(vcpus: u32) -> (u32, u32) {
    let slots = vcpus.clamp(1, 1 << 15).next_power_of_two();
    (slots, slots.trailing_zeros())
}

/// Leaf 4 for a package of `slots` core identifiers: the last level is shared by all, the others are private.
fn cache_leaf(host: Registers, slots: u32) -> Registers {
    let level = host[EAX] >> 5 & 7;
    let sharing = if level >= 3 { slots.min(1 << 12) } else { 1 };
    let mut row = host;
    row[EAX] = host[EAX] & 0x3fff | (sharing - 1) << 14 | (slots.min(64) - 1) << 26;
    row
}

fn set_bits(register: &mut u32, mask: u32, on: bool) {
    *register = if on {
        *register | mask
    } else {
        *register & !mask
    };
}

/// CR4 bits that the guest may set (SDM 3, 2.5): those whose feature it is
/// shown. The caller still keeps to what VMX operation allows.
pub fn cr4_allowed(table: &CpuidTable) -> u64 {
    // (CR4 bit, leaf, register, CPUID bit)
    const RULES: [(u32, u32, usize, u32); 16] = [
        (0, 1, EDX, 1),   // VME
        (1, 1, EDX, 1),   // PVI
        (2, 1, EDX, 4),   // TSD
        (3, 1, EDX, 2),   // DE
        (4, 1, EDX, 3),   // PSE
        (5, 1, EDX, 6),   // PAE
        (6, 1, EDX, 7),   // MCE
        (7, 1, EDX, 13),  // PGE
        (9, 1, EDX, 24),  // OSFXSR
        (10, 1, EDX, 25), // OSXMMEXCPT
        (11, 7, ECX, 2),  // UMIP
        (16, 7, EBX, 0),  // FSGSBASE
        (17, 1, ECX, 17), // PCIDE
        (18, 1, ECX, 26), // OSXSAVE
        (20, 7, EBX, 7),  // SMEP
        (21, 7, EBX, 20), // SMAP
    ];
    // PCE (bit 8) depends on no CPUID bit.
    RULES
        .iter()
        .fold(1 << 8, |allowed, &(bit, leaf, register, feature)| {
            allowed | u64::from(table.has(leaf, register, feature)) << bit
        })
}

/// IA32_EFER bits that the guest may set (SDM 3, 2.2.1): SCE, LME, NXE as
/// shown, and LMA, which is compared with what it is, not set.
pub fn efer_allowed(table: &CpuidTable) -> u64 {
    let bit = |feature: u32, efer: u64| {
        if table.has(EXTENDED + 1, EDX, feature) {
            efer
        } else {
            0
        }
    };
    bit(11, 1) | bit(29, 1 << 8 | 1 << 10) | bit(20, 1 << 11)
}

/// Whether XSETBV may load `value` into XCR0 (SDM 1, 13.3): x87 always; AVX
/// only with SSE; the three AVX-512 components together and only with AVX;
/// nothing that leaf 0xD does not show.
pub fn xcr0_valid(value: u64, table: &CpuidTable) -> bool {
    let avx512 = value & xsave::AVX512;
    value & !table.xcr0_supported() == 0
        && value & xsave::X87 != 0
        && (value & xsave::AVX == 0 || value & xsave::SSE != 0)
        && (avx512 == 0 || avx512 == xsave::AVX512 && value & xsave::AVX != 0)
}
