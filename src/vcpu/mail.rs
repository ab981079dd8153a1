//! Between the vCPUs of a guest: what this one sends to the others' local APICs, and what it
//! finds in its [mailbox](crate::vm::mailbox).

use super::{Activity, Attention, Leave, Vcpu};
use crate::devices::local_apic::{Event, LEAST_VECTOR};
use crate::devices::{DeliveryMode, Destination, Message, Ticks, Trigger};
use crate::vm::acpi;
use crate::vm::boot::EntryState;
use crate::vm::mailbox::{Events, Mailbox};
use crate::vmx::entry::Entry;
use crate::vmx::live_state;

impl Vcpu {
    /// What others have for it.
    #[inline]
    pub fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// Shows the others by what messages name this vCPU's local APIC.
    pub(super) fn publish_address(&self) {
        self.mailbox().set_address(self.apic.own_address());
    }

    /// Sends a message to the local APICs that it names.
    pub(super) fn deliver(&mut self, message: Message, from_self: bool) {
        if self.vm.vcpus() > 1 {
            self.deliver_among(message, from_self);
        } else if self.apic.is_destination(message.destination, from_self) {
            self.accept(message);
        }
    }

    #[inline(never)]
    fn deliver_among(&mut self, message: Message, from_self: bool) {
        if message.mode == DeliveryMode::LowestPriority {
            if let Some(id) = self.lowest_priority(message, from_self) {
                self.deliver_to(id, message);
            }
            return;
        }
        if let Destination::Physical(id) = message.destination
            && self.vm.x2apic
        {
            // Identifiers are the vCPUs' numbers, in both modes. Without the loop an IPI takes
            // thirty instructions less.
            if id < self.vm.vcpus() && self.is_named(id, message, from_self) {
                self.deliver_to(id, message);
            }
            return;
        }
        for id in 0..self.vm.vcpus() {
            if self.is_named(id, message, from_self) {
                self.deliver_to(id, message);
            }
        }
    }

    fn is_named(&self, id: u32, message: Message, from_self: bool) -> bool {
        let address = self.vm.mailbox(id).address();
        address.is_named_by(message.destination, from_self && id == self.id)
    }

    /// Which of those that `message` names takes it. The CPU may choose by anything (SDM 3,
    /// 12.6.2.4): here by the vector, so that a device's interrupts stay with one vCPU.
    fn lowest_priority(&self, message: Message, from_self: bool) -> Option<u32> {
        let mut named = (0..self.vm.vcpus()).filter(|&id| {
            self.vm.mailbox(id).address().is_enabled() && self.is_named(id, message, from_self)
        });
        let count = named.clone().count();
        named.nth(usize::from(message.vector).checked_rem(count)?)
    }

    pub(super) fn deliver_to(&mut self, id: u32, message: Message) {
        if id == self.id {
            return self.accept(message);
        }
        let mailbox = self.vm.mailbox(id);
        let events = match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if !mailbox.address().is_enabled() {
                    // A CPU that processes posted interrupts would not ask (SDM 3, 12.4.7.2).
                    return;
                }
                // Nor would it refuse a vector that is none.
                let illegal = message.vector < LEAST_VECTOR;
                let level = illegal || message.trigger == Trigger::Level;
                mailbox.request(message.vector, level)
            }
            DeliveryMode::Nmi => mailbox.request_nmi(),
            DeliveryMode::ExtInt => Events::EXTINT,
            // No processor since the Pentium 4 knows the de-assert (SDM 3, 12.6.1).
            DeliveryMode::Init if !message.assert => return,
            DeliveryMode::Init => Events::INIT,
            DeliveryMode::StartUp => {
                mailbox.start_up(message.vector);
                Events::START_UP
            }
            // There is no system-management mode.
            DeliveryMode::Smi => return,
        };
        self.post_to(id, events);
    }

    /// Has another vCPU look at `events`. Where it is on this CPU, this one's slice begins.
    pub(super) fn post_to(&mut self, id: u32, events: Events) {
        let place = self.mailbox().place();
        if self.vm.mailbox(id).post_from(place, events) {
            let end = Ticks(self.now().0.saturating_add(self.slice.0));
            self.turn_ends = self.turn_ends.min(end);
            self.attend_to(Attention::DEVICES);
        }
    }

    /// Takes a message at this vCPU's local APIC.
    pub(super) fn accept(&mut self, message: Message) {
        self.attend_to(Attention::EVENTS);
        if message.mode == DeliveryMode::Init {
            if message.assert {
                self.mailbox()
                    .post_from(self.mailbox().place(), Events::INIT);
                self.leave_for(Leave::Mail);
            }
            return;
        }
        match self.apic.accept(message) {
            Event::Nmi => self.add_nmis(1),
            Event::ExtInt => self.pending.extint = true,
            // A vCPU that can send to itself has started.
            Event::None | Event::Init | Event::StartUp(_) | Event::Smi => {}
        }
    }

    /// After an interrupt of the host, by which somebody may have told of mail, or another
    /// vCPU may want the CPU.
    #[inline]
    pub(super) fn look_at_mail(&mut self) {
        if self.mailbox().has_mail() {
            let mail = self.mailbox().take(Events::LIGHT);
            if !mail.is_empty() {
                self.open(mail);
            }
            if self.mailbox().has_mail() {
                return self.leave_for(Leave::Mail);
            }
        }
        if self.mailbox().place().has_news() {
            self.leave_for(Leave::Turn);
        }
    }

    /// Does what the mail says, as far as it is [`Events::LIGHT`].
    fn open(&mut self, mail: Events) {
        if mail.intersects(Events::POSTED | Events::LEVELS) {
            let apic = &mut self.apic;
            self.mailbox.take_vectors(mail, |vector, level| {
                apic.accept(Message {
                    mode: DeliveryMode::Fixed,
                    destination: Destination::Itself,
                    vector,
                    trigger: if level { Trigger::Level } else { Trigger::Edge },
                    assert: true,
                });
            });
        }
        if mail.contains(Events::NMI) {
            self.add_nmis(self.mailbox().take_nmis());
        }
        self.pending.extint |= mail.contains(Events::EXTINT);
        self.attend_to(Attention::EVENTS);
        if mail.contains(Events::CHIPSET) {
            self.attend_to(Attention::DEVICES);
        }
        if mail.contains(Events::CONSOLE) {
            self.attend_to(Attention::CONSOLE);
        }
    }

    /// Does what all the mail says, between two runs of the guest.
    pub(super) fn open_all(&mut self, entry: &mut Entry<Self>) {
        let mail = self.mailbox().take(Events::all());
        if mail.contains(Events::MEMORY) {
            let forgotten = self.forget_translations();
            debug_assert!(forgotten.is_ok());
        }
        if mail.contains(Events::INIT) {
            self.init(entry);
        }
        if mail.contains(Events::START_UP) && self.activity == Activity::AwaitsStartUp {
            let page = self.mailbox().start_up_page();
            self.start_at(&EntryState::start_up(page), entry);
            self.activity = Activity::Running;
        }
        if mail.intersects(Events::LIGHT) {
            self.open(mail);
        }
    }

    /// INIT (SDM 3, table 10-1). The bootstrap processor starts at the reset vector, the
    /// others wait (SDM 3, 10.4.2).
    fn init(&mut self, entry: &mut Entry<Self>) {
        self.apic.accept(Message {
            mode: DeliveryMode::Init,
            destination: Destination::Itself,
            vector: 0,
            trigger: Trigger::Edge,
            assert: true,
        });
        if self.tier.delivers() {
            self.write_interrupt_status();
        }
        // Its TPR is 0 (SDM 3, 27.2.1.1).
        self.set_threshold(0);
        self.publish_address();
        self.pending = Default::default();
        live_state::reset_debug_registers();
        self.start_at(&EntryState::RESET, entry);
        self.activity = if self.apic.is_bootstrap() {
            Activity::Running
        } else {
            Activity::AwaitsStartUp
        };
    }

    /// The end of suspend to RAM: firmware starts again, and what plays its part where there is
    /// none goes to the waking vector. False where the guest has named none.
    pub(super) fn resume(&mut self, entry: &mut Entry<Self>) -> bool {
        self.init(entry);
        if self.vm.has_firmware() {
            return true;
        }
        let vector = acpi::waking_vector(&self.vm.memory);
        if let Some(vector) = vector {
            self.start_at(&EntryState::waking(vector), entry);
        }
        vector.is_some()
    }

    fn start_at(&mut self, start: &EntryState, entry: &mut Entry<Self>) {
        self.leave = None;
        self.known.clear();
        self.write_guest_state(start);
        self.cpuid.set_osxsave(false);
        *entry.registers() = self.entry_registers(start);
        self.flush_tlb();
        self.attend_to(Attention::EVENTS | Attention::DEVICES);
    }
}
