//! What is asked of a running guest from outside: the operator's commands.
//!
//! Whoever asks sets a flag and then posts [`super::mailbox::Events::REQUEST`] to each vCPU, which looks at
//! the flags when it has mail.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use bitflags::bitflags;
use core::mem;
use core::sync::atomic::{AtomicU32, Ordering};
use spin::Mutex;

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
        /// To show its state, each vCPU its own ([`Control::show`]).
        const DUMP = 1 << 3;
        /// To show its screen, likewise; the first vCPU does.
        const SCREEN = 1 << 4;
        /// To show something.
        const SHOW = Self::DUMP.bits() | Self::SCREEN.bits();
    }
}

/// What is asked of one guest.
#[derive(Debug, Default)]
pub struct Control {
    /// They say all: no other memory is read because of them but what is behind a lock, and the
    /// mailbox has an order of its own, so that relaxed accesses are enough.
    requests: AtomicU32,
    /// What is to be shown, by the numbers of the vCPUs. Locked with interrupts off:
    /// the operator's commands are answered in one.
    shown: Mutex<Vec<Option<String>>>,
}

impl Control {
    /// Asks for `request`. The vCPUs are to be told after that.
    pub fn ask(&self, request: Request) {
        self.requests.fetch_or(request.bits(), Ordering::Relaxed);
    }

    /// No longer asks for `request`.
    pub fn withdraw(&self, request: Request) {
        self.requests.fetch_and(!request.bits(), Ordering::Relaxed);
    }

    /// What is asked now.
    #[inline]
    pub fn asked(&self) -> Request {
        Request::from_bits_truncate(self.requests.load(Ordering::Relaxed))
    }

    /// Asks the first `vcpus` vCPUs for `what`, of [`Request::SHOW`]. They are to be told after
    /// that.
    pub fn ask_to_show(&self, what: Request, vcpus: usize) {
        *self.shown.lock() = vec![None; vcpus];
        self.withdraw(Request::SHOW - what);
        self.ask(what);
    }

    /// Answers [`Request::SHOW`] for the vCPU with this number, once; true where that was the last
    /// one, and the operator's line is to be told.
    pub fn show(&self, vcpu: u32, state: impl FnOnce() -> String) -> bool {
        if !matches!(self.shown.lock().get(vcpu as usize), Some(None)) {
            return false;
        }
        let state = state();
        let mut shown = self.shown.lock();
        if let Some(place) = shown.get_mut(vcpu as usize) {
            *place = Some(state);
        }
        let is_last = shown.iter().all(Option::is_some);
        drop(shown);
        if is_last {
            self.withdraw(Request::SHOW);
        }
        is_last
    }

    /// Takes what all vCPUs have shown, once they all have.
    pub fn take_shown(&self) -> Option<Vec<String>> {
        let mut shown = self.shown.lock();
        let are_there = !shown.is_empty() && shown.iter().all(Option::is_some);
        are_there.then(|| mem::take(&mut *shown).into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_shows_its_state_once() {
        let control = Control::default();
        assert_eq!(control.take_shown(), None);
        assert!(!control.show(0, || panic!("nobody has asked")));
        control.ask_to_show(Request::SCREEN, 1);
        control.ask_to_show(Request::DUMP, 2);
        assert!(!control.show(1, || "b".into()));
        assert!(!control.show(1, || panic!("it has shown it")));
        assert!(!control.show(2, || panic!("it is not there")));
        assert_eq!(control.take_shown(), None);
        assert_eq!(control.asked(), Request::DUMP);
        assert!(control.show(0, || "a".into()));
        assert!(control.asked().is_empty());
        assert_eq!(control.take_shown(), Some(vec!["a".into(), "b".into()]));
        assert_eq!(control.take_shown(), None);
    }

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
