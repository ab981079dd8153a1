//! The atomics of the lock-free parts: those of `core`, or of `loom`, which tries all orders
//! that the memory model allows.

pub mod atomic {
    #[cfg(not(loom))]
    pub use core::sync::atomic::*;
    #[cfg(loom)]
    pub use loom::sync::atomic::*;
}

/// Stands between two `SeqCst` accesses whose order all have to see. For `core` they have it; `loom`
/// takes them for acquire and release only, and so needs a fence.
#[inline(always)]
pub fn one_order() {
    #[cfg(loom)]
    loom::sync::atomic::fence(atomic::Ordering::SeqCst);
}
