//! The flag word between an exit's answer and the way back into the guest.
//!
//! Mostly it is empty, and then nothing is looked at. What an answer does to the
//! local APIC or to the chipset is followed by a look at what came of it.

use super::Vcpu;
use crate::devices::chipset::Chipset;
use bitflags::bitflags;

bitflags! {
    /// What has to be looked at before the guest runs on.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Attention: u32 {
        /// An event to inject, or a window to ask for.
        const EVENTS = 1 << 0;
        /// A deadline that has come or moved, or messages of the I/O APIC.
        const DEVICES = 1 << 1;
        /// Bytes between the guest's COM1 and the host's console.
        const CONSOLE = 1 << 2;
        /// The preemption timer has fallen behind.
        const TIMER = 1 << 4;
        /// The run loop has to do something: [`super::Leave`].
        const LEAVE = 1 << 3;
    }
}

impl Vcpu {
    /// After something was done to the local APIC.
    #[inline]
    pub(super) fn look_at_apic(&mut self) {
        if self.has_interrupt() {
            self.attention |= Attention::EVENTS;
        }
        if self.timer.is_after(self.apic.deadline()) {
            self.attention |= Attention::DEVICES;
        }
    }

    /// Does something to the chipset, and looks at it.
    #[inline]
    pub(super) fn with_chipset<R>(&mut self, f: impl FnOnce(&mut Chipset) -> R) -> R {
        let mut chipset = self.vm.chipset.lock();
        let result = f(&mut chipset);
        if chipset.has_message() || self.timer.is_after(chipset.deadline()) {
            self.attention |= Attention::DEVICES;
        }
        if chipset.intr() && self.apic.lint0_takes_extint() {
            self.attention |= Attention::EVENTS;
        }
        result
    }
}
