//! What is asked of a running guest from outside: the operator's commands.
//!
//! Whoever asks sets a flag and then posts [`super::mailbox::Events::REQUEST`] to each vCPU, which looks at
//! the flags when it has mail.

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
/// them, and the mailbox has an order of its own, so that relaxed accesses are enough.
#[derive(Debug, Default)]
pub struct Control(AtomicU32);

impl Control {
    /// Asks for `request`. The vCPUs are to be told after that.
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
