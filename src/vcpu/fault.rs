//! Faults that the hypervisor raises in a guest (SDM 3, chapter 7).

use core::fmt;

/// A fault that the hypervisor raises in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    DivideError,
    BoundRange,
    InvalidOpcode,
    /// With error code 0.
    GeneralProtection,
    /// Something is wrong with a segment: mostly the one that the error code selects.
    Segment(SegmentFault, u16),
    /// With this error code and CR2.
    PageFault {
        error_code: u32,
        address: u64,
    },
    AlignmentCheck,
}

/// Exceptions with a selector for an error code, or 0 (SDM 3, 7.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SegmentFault {
    InvalidTss = 10,
    NotPresent = 11,
    Stack = 12,
    GeneralProtection = 13,
}

impl SegmentFault {
    /// The exception with this error code.
    pub const fn with(self, error_code: u16) -> Exception {
        match (self, error_code) {
            (Self::GeneralProtection, 0) => Exception::GeneralProtection,
            _ => Exception::Segment(self, error_code),
        }
    }

    /// The exception about the segment that `selector` selects.
    pub const fn of(self, selector: u16) -> Exception {
        self.with(selector & !3)
    }
}

impl Exception {
    /// Of the stack, without a selector.
    pub const STACK: Self = SegmentFault::Stack.with(0);

    pub const fn vector(self) -> u8 {
        match self {
            Self::DivideError => 0,
            Self::BoundRange => 5,
            Self::InvalidOpcode => 6,
            Self::GeneralProtection => 13,
            Self::Segment(fault, _) => fault as u8,
            Self::PageFault { .. } => 14,
            Self::AlignmentCheck => 17,
        }
    }

    /// What protected mode pushes behind the return address; real mode never pushes one.
    pub const fn error_code(self) -> Option<u32> {
        match self {
            Self::DivideError | Self::BoundRange | Self::InvalidOpcode => None,
            Self::GeneralProtection | Self::AlignmentCheck => Some(0),
            Self::Segment(_, error_code) => Some(error_code as u32),
            Self::PageFault { error_code, .. } => Some(error_code),
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DivideError => "#DE",
            Self::BoundRange => "#BR",
            Self::InvalidOpcode => "#UD",
            Self::Segment(SegmentFault::InvalidTss, _) => "#TS",
            Self::Segment(SegmentFault::NotPresent, _) => "#NP",
            Self::Segment(SegmentFault::Stack, _) => "#SS",
            Self::GeneralProtection | Self::Segment(SegmentFault::GeneralProtection, _) => "#GP",
            Self::PageFault { .. } => "#PF",
            Self::AlignmentCheck => "#AC",
        })
    }
}
