//! What is asked of a running guest from outside: the operator's commands.
//!
//! Whoever asks sets a flag and then has the guest's CPU exit (an interrupt); the vCPU looks
//! at the flags after each interrupt of the host, and while it waits.

use bitflags::bitflags;
use core::sync::atomic::{AtomicU32, Ordering};

bitflags! {
    /// What is asked.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Request: u32 {
        /// To end.
        const STOP = 1 << 0;
        /// To end as if its reset button was pressed.
        const RESET = 1 << 1;
        /// Not to execute as long as this is set.
        const PAUSE = 1 << 2;
    }
}

/// What is asked of one guest. The flags say all: no other memory is read because of
/// them, so that relaxed accesses are enough.
#[derive(Debug, Default)]
pub struct Control(AtomicU32);

impl Control {
    /// Asks for `request`. The guest's CPU is to be interrupted after that.
    pub fn ask(&self, request: Request) {
        self.0.fetch_or(request.bits(), Ordering::Relaxed);
    }

    /// No longer asks for `request`.
    pub fn withdraw(&self, request: Request) {
        self.0.fetch_and(!request.bits(), Ordering::Relaxed);
    }

    /// What is asked now.
    #[inline]
    pub fn asked(&self) -> Request {
        Request::from_bits_truncate(self.0.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_add_up_and_are_withdrawn() {
        let control = Control::default();
        assert!(control.asked().is_empty());
        control.ask(Request::PAUSE);
        control.ask(Request::STOP);
        assert_eq!(control.asked(), Request::PAUSE | Request::STOP);
        control.withdraw(Request::PAUSE);
        assert_eq!(control.asked(), Request::STOP);
    }
}
