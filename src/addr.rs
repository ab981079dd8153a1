//! Addresses that cannot be confused: host physical, host virtual, guest
//! physical and guest linear each have their own type.

use core::fmt;

/// The smallest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further up, or `None` past the end of the address space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The address `bytes` further up, modulo 2^64 as the CPU's address adder does it.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The start of the page of `size` bytes (a power of two) that holds this address.
            #[inline]
            pub const fn align_down(self, size: u64) -> Self {
                Self(self.0 & !(size - 1))
            }

            /// Whether this is the start of a page of `size` bytes (a power of two).
            #[inline]
            pub const fn is_aligned(self, size: u64) -> bool {
                self.0 & (size - 1) == 0
            }

            /// Bytes from the start of the page of `size` bytes (a power of two).
            #[inline]
            pub const fn offset_in(self, size: u64) -> u64 {
                self.0 & (size - 1)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A host physical address.
    Hpa
);
address!(
    /// A host virtual address.
    Hva
);
address!(
    /// A guest physical address.
    Gpa
);
address!(
    /// A guest linear address.
    Gva
);
