//! Faults that the hypervisor raises in a guest (SDM 3, chapter 7).

use core::fmt;

/// A fault that the hypervisor raises in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    DivideError,
    /// A trap, whose conditions are in DR6.
    Debug,
    BoundRange,
    InvalidOpcode,
    /// CR0.TS or CR0.EM.
    DeviceNotAvailable,
    DoubleFault,
    /// With error code 0.
    GeneralProtection,
    /// Something is wrong with a segment: mostly the one that the error code selects.
    Segment(SegmentFault, u16),
    /// With this error code and CR2.
    PageFault {
        error_code: u32,
        address: u64,
    },
    /// Of x87.
    FloatingPoint,
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
            Self::Debug => 1,
            Self::BoundRange => 5,
            Self::InvalidOpcode => 6,
            Self::DeviceNotAvailable => 7,
            Self::DoubleFault => 8,
            Self::GeneralProtection => 13,
            Self::Segment(fault, _) => fault as u8,
            Self::PageFault { .. } => 14,
            Self::FloatingPoint => 16,
            Self::AlignmentCheck => 17,
        }
    }

    /// What protected mode pushes behind the return address; real mode never pushes one.
    pub const fn error_code(self) -> Option<u32> {
        match self {
            Self::DivideError
            | Self::Debug
            | Self::BoundRange
            | Self::InvalidOpcode
            | Self::DeviceNotAvailable
            | Self::FloatingPoint => None,
            Self::DoubleFault | Self::GeneralProtection | Self::AlignmentCheck => Some(0),
            Self::Segment(_, error_code) => Some(error_code as u32),
            Self::PageFault { error_code, .. } => Some(error_code),
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DivideError => "#DE",
            Self::Debug => "#DB",
            Self::BoundRange => "#BR",
            Self::InvalidOpcode => "#UD",
            Self::DeviceNotAvailable => "#NM",
            Self::FloatingPoint => "#MF",
            Self::Segment(SegmentFault::InvalidTss, _) => "#TS",
            Self::Segment(SegmentFault::NotPresent, _) => "#NP",
            Self::Segment(SegmentFault::Stack, _) => "#SS",
            Self::GeneralProtection | Self::Segment(SegmentFault::GeneralProtection, _) => "#GP",
            Self::PageFault { .. } => "#PF",
            Self::AlignmentCheck => "#AC",
            Self::DoubleFault => "#DF",
        })
    }
}

/// What comes of an exception in the delivery of another one (SDM 3, table 7-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combined {
    /// The second one alone: the first one comes back when its instruction is executed again.
    Second,
    DoubleFault,
    /// The CPU shuts down.
    TripleFault,
}

/// What comes of exception `second` in the delivery of exception `first`.
pub const fn combine(first: u8, second: u8) -> Combined {
    const DOUBLE_FAULT: u8 = 8;
    const PAGE_FAULT: u8 = 14;
    const fn is_contributory(vector: u8) -> bool {
        matches!(vector, 0 | 10..=13 | 21)
    }
    const fn is_page_fault(vector: u8) -> bool {
        // A virtualization exception counts as one.
        matches!(vector, PAGE_FAULT | 20)
    }
    let serious = is_contributory(second) || is_page_fault(second);
    if first == DOUBLE_FAULT && serious {
        Combined::TripleFault
    } else if is_contributory(first) && is_contributory(second) || is_page_fault(first) && serious {
        Combined::DoubleFault
    } else {
        Combined::Second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_in_the_delivery_of_others() {
        use Combined::{DoubleFault, Second, TripleFault};
        let (benign, contributory, page_fault, double_fault) = (6, 13, 14, 8);
        for (first, second, expected) in [
            (benign, benign, Second),
            (benign, contributory, Second),
            (benign, page_fault, Second),
            (contributory, benign, Second),
            (contributory, contributory, DoubleFault),
            (contributory, page_fault, Second),
            (page_fault, benign, Second),
            (page_fault, contributory, DoubleFault),
            (page_fault, page_fault, DoubleFault),
            (double_fault, benign, Second),
            (double_fault, contributory, TripleFault),
            (double_fault, page_fault, TripleFault),
        ] {
            assert_eq!(combine(first, second), expected, "{first} {second}");
        }
        // #DB and #AC are benign, #DE and #SS are not.
        assert_eq!((combine(0, 12), combine(17, 1)), (DoubleFault, Second));
    }

    #[test]
    fn vectors_and_error_codes() {
        let fault = SegmentFault::NotPresent.of(0x2b);
        assert_eq!((fault.vector(), fault.error_code()), (11, Some(0x28)));
        assert_eq!(
            SegmentFault::GeneralProtection.with(0),
            Exception::GeneralProtection
        );
        assert_eq!(Exception::STACK.error_code(), Some(0));
        assert_eq!(Exception::DivideError.error_code(), None);
    }
}
