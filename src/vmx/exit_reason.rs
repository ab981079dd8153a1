//! The names of the basic exit reasons (SDM 3, appendix C), for people.

/// Basic exit reasons that are told apart, a power of two: more than there are.
pub const REASONS: usize = 128;

/// Reasons that have a light handler.
pub mod number {
    pub const EXTERNAL_INTERRUPT: usize = 1;
    pub const INTERRUPT_WINDOW: usize = 7;
    pub const NMI_WINDOW: usize = 8;
    pub const CPUID: usize = 10;
    pub const HLT: usize = 12;
    pub const INVD: usize = 13;
    pub const VMCALL: usize = 18;
    pub const CONTROL_REGISTER: usize = 28;
    pub const IO: usize = 30;
    pub const RDMSR: usize = 31;
    pub const WRMSR: usize = 32;
    pub const PAUSE: usize = 40;
    pub const TPR_BELOW_THRESHOLD: usize = 43;
    pub const APIC_ACCESS: usize = 44;
    pub const VIRTUALIZED_EOI: usize = 45;
    pub const EPT_VIOLATION: usize = 48;
    pub const PREEMPTION_TIMER: usize = 52;
    pub const WBINVD: usize = 54;
    pub const XSETBV: usize = 55;
    pub const APIC_WRITE: usize = 56;
}

/// The name of a basic exit reason.
pub const fn name(reason: usize) -> &'static str {
    match reason {
        0 => "exception or NMI",
        1 => "external interrupt",
        2 => "triple fault",
        3 => "INIT",
        4 => "SIPI",
        5 => "I/O SMI",
        6 => "other SMI",
        7 => "interrupt window",
        8 => "NMI window",
        9 => "task switch",
        10 => "CPUID",
        11 => "GETSEC",
        12 => "HLT",
        13 => "INVD",
        14 => "INVLPG",
        15 => "RDPMC",
        16 => "RDTSC",
        17 => "RSM",
        18 => "VMCALL",
        19 => "VMCLEAR",
        20 => "VMLAUNCH",
        21 => "VMPTRLD",
        22 => "VMPTRST",
        23 => "VMREAD",
        24 => "VMRESUME",
        25 => "VMWRITE",
        26 => "VMXOFF",
        27 => "VMXON",
        28 => "control register",
        29 => "MOV DR",
        30 => "I/O",
        31 => "RDMSR",
        32 => "WRMSR",
        33 => "entry failure: guest state",
        34 => "entry failure: MSR loading",
        36 => "MWAIT",
        37 => "monitor trap flag",
        39 => "MONITOR",
        40 => "PAUSE",
        41 => "entry failure: machine check",
        43 => "TPR below threshold",
        44 => "APIC access",
        45 => "virtualized EOI",
        46 => "GDTR or IDTR",
        47 => "LDTR or TR",
        48 => "EPT violation",
        49 => "EPT misconfiguration",
        50 => "INVEPT",
        51 => "RDTSCP",
        52 => "preemption timer",
        53 => "INVVPID",
        54 => "WBINVD",
        55 => "XSETBV",
        56 => "APIC write",
        57 => "RDRAND",
        58 => "INVPCID",
        59 => "VMFUNC",
        60 => "ENCLS",
        61 => "RDSEED",
        62 => "page-modification log full",
        63 => "XSAVES",
        64 => "XRSTORS",
        65 => "PCONFIG",
        66 => "SPP",
        67 => "UMWAIT",
        68 => "TPAUSE",
        69 => "LOADIWKEY",
        74 => "bus lock",
        75 => "notify",
        _ => "unknown",
    }
}
