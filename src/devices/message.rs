//! Interrupt messages: what the I/O APIC, a local APIC's ICR and an MSI send
//! to local APICs. Fields as in the interrupt command register (SDM 3, 12.6.1).

/// How a message is delivered (SDM 3, 12.6.1, "Delivery Mode").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Nmi,
    Init,
    StartUp,
    /// From an external 8259: the vector comes from its INTA cycle.
    ExtInt,
}

impl DeliveryMode {
    /// From the three-bit encoding of ICR, LVT and redirection entries; the
    /// reserved encoding 3 gives `None`.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::StartUp),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }
}

/// Edge or level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    Edge,
    Level,
}

/// Who is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The local APIC with this identifier. 0xff (xAPIC and I/O APIC) and
    /// 0xffff_ffff (x2APIC) are turned into `All` by the sender.
    Physical(u32),
    /// A logical address: MDA of 8 bits as an xAPIC sender writes it, or of 32 bits from an x2APIC sender.
    Logical(u32),
    /// The sender.
    Itself,
    /// Everyone, the sender included.
    All,
    /// Everyone but the sender.
    Others,
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub mode: DeliveryMode,
    pub destination: Destination,
    /// Vector, or the start-up page for [`DeliveryMode::StartUp`].
    pub vector: u8,
    pub trigger: Trigger,
    /// Assert (true) or de-assert (false, only for INIT level de-assert).
    pub assert: bool,
}
