//! The flag word between an exit's answer and the way back into the guest.
//!
//! Mostly it is empty, and then nothing is looked at: not even the word, since
//! whoever sets a flag ends the count of light exits too, and that is what the way back
//! tests (see [`super::timer`]). What an answer does to the local APIC or to the
//! chipset is followed by a look at what came of it.

use super::Vcpu;
use crate::devices::Ticks;
use crate::devices::chipset::Chipset;
use crate::vm::mailbox::Events;
use bitflags::bitflags;

bitflags! {
    /// What has to be looked at before the guest runs on.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Attention: u32 {
        /// An event to inject, or a window to ask for.
        const EVENTS = 1 << 0;
        /// A deadline that has come or moved, or messages of the I/O APIC.
        const DEVICES = 1 << 1;
        /// Bytes between the guest's COM1 and its console.
        const CONSOLE = 1 << 2;
        /// The run loop has to do something: [`super::Leave`].
        const LEAVE = 1 << 3;
    }
}

impl Vcpu {
    /// Has this looked at before the guest runs on.
    #[inline(always)]
    pub(super) fn attend_to(&mut self, attention: Attention) {
        self.attention |= attention;
        self.timer.settle_now();
    }

    /// After something was done to the local APIC.
    #[inline]
    pub(super) fn look_at_apic(&mut self) {
        if self.vm.signals.intr() {
            self.attend_to(Attention::EVENTS);
        }
        self.look_at_apic_timer();
    }

    /// The same where at most its timer was armed, or has expired.
    #[inline]
    pub(super) fn look_at_apic_timer(&mut self) {
        if self.apic.has_requests() {
            self.attend_to(Attention::EVENTS);
        }
        if self.apic.expires_before(self.timer.deadline()) {
            self.attend_to(Attention::DEVICES);
        }
    }

    /// Does something to the chipset, and looks at it.
    #[inline(always)]
    pub(super) fn with_chipset<R>(&mut self, f: impl FnOnce(&mut Chipset) -> R) -> R {
        let mut chipset = self.vm.chipset.lock();
        let result = f(&mut chipset);
        if self.not_first != 0 {
            drop(chipset);
            self.tell_first();
            return result;
        }
        let (intr, deadline) = self.vm.signals.publish(&chipset);
        drop(chipset);
        if self.timer.is_after(deadline) {
            self.attend_to(Attention::DEVICES);
        }
        if intr {
            self.attend_to(Attention::EVENTS);
        }
        result
    }

    /// This vCPU has changed the chipset, whose deadlines and INTR are the first one's.
    #[inline(never)]
    fn tell_first(&mut self) {
        let chipset = self.vm.chipset.lock();
        let before = (self.vm.signals.intr(), self.vm.signals.deadline());
        let after = self.vm.signals.publish(&chipset);
        drop(chipset);
        if after.1 == Ticks(0) {
            // Messages: whoever comes first sends them on.
            self.pass_messages();
        }
        if after != before {
            self.post_to(0, Events::CHIPSET);
        }
    }
}
