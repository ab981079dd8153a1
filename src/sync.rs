//! The atomics of the lock-free parts: those of `core`, or of `loom`, which tries all orders
//! that the memory model allows.

pub mod atomic {
    #[cfg(not(loom))]
    pub use core::sync::atomic::*;
    #[cfg(loom)]
    pub use loom::sync::atomic::*;
}
