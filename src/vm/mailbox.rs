//! What others have for a vCPU: interrupts of its siblings and of the chipset, and whatever else
//! it is to look at.
//!
//! ```text
//! anybody:   put it into the mailbox, set its flag; was no flag set: tell the CPU
//! the CPU:   while the vCPU runs, an interrupt (a "kick") makes it exit, and it looks;
//!            while it does not, its CPU's scheduler looks at the flags of all that wait
//! ```
//!
//! Nobody waits for anybody, and no lock is taken. What must not happen is that a flag is
//! set and nobody looks. Of several that set flags one finds that none was set before, and
//! tells: by a kick, and where another vCPU has the CPU ([`Place::current`]), by a mark too
//! ([`Place::look`]) which makes that one give way. The CPU gives up `current` before it
//! looks at the flags of a vCPU that waits, and the sender sets the flag before it reads
//! `current`: both in one order for all (`SeqCst`), so that one of them sees the other.

use crate::devices::local_apic::Address;
#[cfg(not(loom))]
use crate::host::local_apic::{self, Command, Target};
use crate::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use crate::sync::one_order;
use bitflags::bitflags;
use core::ptr;

bitflags! {
    /// What a vCPU is to look at.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Events: u32 {
        /// Vectors are requested.
        const INTERRUPTS = 1 << 0;
        const NMI = 1 << 1;
        const INIT = 1 << 2;
        /// A start-up interrupt, whose page is in the mailbox.
        const START_UP = 1 << 3;
        /// The 8259s have an interrupt, which the I/O APIC has passed on.
        const EXTINT = 1 << 4;
        /// The chipset has another deadline, or drives INTR.
        const CHIPSET = 1 << 5;
        /// The guest's console has input, or room for output.
        const CONSOLE = 1 << 6;
        /// Something is asked of the guest ([`super::control`]), or it ends.
        const REQUEST = 1 << 7;
        /// The guest's memory has changed: what the CPU has cached of it is to be forgotten.
        const MEMORY = 1 << 8;
    }
}

impl Events {
    /// What is looked at between two instructions of the guest; for the rest the run is left.
    pub const LIGHT: Self = Self::INTERRUPTS
        .union(Self::NMI)
        .union(Self::EXTINT)
        .union(Self::CHIPSET)
        .union(Self::CONSOLE);
}

/// A CPU as those see it that have something for the vCPUs on it.
#[derive(Debug)]
pub struct Place {
    /// The number of the CPU.
    pub cpu: usize,
    /// The identifier of its local APIC.
    apic_id: u32,
    /// The mailbox of the vCPU whose turn it is; null between turns. Only compared.
    current: AtomicPtr<Mailbox>,
    /// A vCPU whose turn it is not has something to look at, or a new one has come. No memory is read because of
    /// it but the mailboxes, which have an order of their own: relaxed.
    look: AtomicBool,
    /// Stands for an interrupt that the CPU has not taken yet.
    #[cfg(loom)]
    kicked: AtomicBool,
}

impl Place {
    /// A CPU on which nothing runs.
    pub fn new(cpu: usize, apic_id: u32) -> Self {
        Self {
            cpu,
            apic_id,
            current: AtomicPtr::new(ptr::null_mut()),
            look: AtomicBool::new(false),
            #[cfg(loom)]
            kicked: AtomicBool::new(false),
        }
    }

    /// It is the turn of the vCPU with this mailbox, or nobody's.
    pub fn set_current(&self, mailbox: Option<&Mailbox>) {
        let current = mailbox.map_or(ptr::null_mut(), |own| ptr::from_ref(own).cast_mut());
        // SeqCst: before the flags of any mailbox are read; see the module.
        self.current.store(current, Ordering::SeqCst);
        one_order();
    }

    /// Makes whatever the CPU does give way to its scheduler.
    pub fn tell(&self) {
        self.look.store(true, Ordering::Relaxed);
        self.interrupt(false);
    }

    /// Interrupts the CPU, by NMI or by an interrupt of its own: what it does next is behind all
    /// that was stored before.
    fn interrupt(&self, by_nmi: bool) {
        #[cfg(loom)]
        self.kicked.store(true, Ordering::SeqCst);
        #[cfg(not(loom))]
        if by_nmi {
            local_apic::send(Command::nmi(Target::Cpu(self.apic_id)));
        } else {
            local_apic::kick(self.apic_id);
        }
    }

    /// Whether the scheduler has something to look at.
    #[inline]
    pub fn has_news(&self) -> bool {
        self.look.load(Ordering::Relaxed)
    }

    /// The same, which the scheduler is going to look at now.
    pub fn take_news(&self) -> bool {
        // A swap, and so before the reads of what it is about.
        self.has_news() && self.look.swap(false, Ordering::SeqCst)
    }
}

/// What others have for one vCPU.
#[derive(Debug)]
pub struct Mailbox {
    place: &'static Place,
    /// The local APIC's identifier.
    id: u32,
    /// [`Events`]. Set after what they are about was stored, and taken before that is read:
    /// release and acquire; and in one order with [`Place::current`]: SeqCst.
    events: AtomicU32,
    /// Vectors that are requested: by edges, and by levels. Behind `events`: relaxed.
    requested: [[AtomicU64; 4]; 2],
    /// The page of the last start-up interrupt. Behind `events`: relaxed.
    start_up: AtomicU8,
    /// The CPU takes no other interrupt while it is the vCPU's turn. No memory is read because of
    /// it: relaxed.
    by_nmi: AtomicBool,
    /// [`Address::to_word`] of the local APIC. A sender sees it as it was or is, and
    /// nothing else is read because of it: relaxed.
    address: AtomicU32,
}

impl Mailbox {
    /// Empty, of the vCPU with this identifier, which runs at `place`.
    pub fn new(place: &'static Place, id: u32) -> Self {
        Self {
            place,
            id,
            events: AtomicU32::new(0),
            requested: Default::default(),
            start_up: AtomicU8::new(0),
            by_nmi: AtomicBool::new(false),
            address: AtomicU32::new(0),
        }
    }

    /// Where the vCPU runs.
    pub const fn place(&self) -> &'static Place {
        self.place
    }

    /// Has the vCPU look at `events`.
    #[inline]
    pub fn post(&self, events: Events) {
        if self.events.fetch_or(events.bits(), Ordering::SeqCst) != 0 {
            // Whoever set the first flag has told, or is about to; nothing was taken since.
            return;
        }
        one_order();
        let own = ptr::from_ref(self).cast_mut();
        if self.place.current.load(Ordering::SeqCst) == own {
            self.place.interrupt(self.by_nmi.load(Ordering::Relaxed));
        } else {
            self.place.tell();
        }
    }

    /// Has the CPU told by NMI while it is the vCPU's turn.
    pub fn tell_by_nmi(&self) {
        self.by_nmi.store(true, Ordering::Relaxed);
    }

    /// Requests an interrupt with this vector.
    #[inline]
    pub fn request(&self, vector: u8, level: bool) {
        let words = &self.requested[usize::from(level)];
        words[usize::from(vector >> 6)].fetch_or(1 << (vector & 63), Ordering::Relaxed);
        self.post(Events::INTERRUPTS);
    }

    /// Posts a start-up interrupt with this page.
    pub fn start_up(&self, page: u8) {
        self.start_up.store(page, Ordering::Relaxed);
        self.post(Events::START_UP);
    }

    /// The page of the last start-up interrupt.
    pub fn start_up_page(&self) -> u8 {
        self.start_up.load(Ordering::Relaxed)
    }

    /// Whether there is anything to look at. Only a scheduler that has given up
    /// [`Place::current`] may wait because there is not.
    #[inline]
    pub fn has_mail(&self) -> bool {
        self.events.load(Ordering::SeqCst) != 0
    }

    /// What of `kinds` there is to look at now; it is not there any more.
    #[inline]
    pub fn take(&self, kinds: Events) -> Events {
        if self.events.load(Ordering::Relaxed) & kinds.bits() == 0 {
            return Events::empty();
        }
        let taken = self.events.fetch_and(!kinds.bits(), Ordering::SeqCst);
        Events::from_bits_truncate(taken) & kinds
    }

    /// Gives the vectors that are requested to `sink`, with whether each is a level.
    #[inline]
    pub fn take_vectors(&self, mut sink: impl FnMut(u8, bool)) {
        for (words, level) in self.requested.iter().zip([false, true]) {
            for (base, word) in [0, 64, 128, 192].into_iter().zip(words) {
                if word.load(Ordering::Relaxed) == 0 {
                    continue;
                }
                let mut vectors = word.swap(0, Ordering::Relaxed);
                while vectors != 0 {
                    sink(base + vectors.trailing_zeros() as u8, level);
                    vectors &= vectors - 1;
                }
            }
        }
    }

    /// The vCPU's local APIC has another address.
    pub fn set_address(&self, address: Address) {
        self.address.store(address.to_word(), Ordering::Relaxed);
    }

    /// By what messages name the vCPU's local APIC.
    #[inline]
    pub fn address(&self) -> Address {
        Address::from_word(self.address.load(Ordering::Relaxed), self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::boxed::Box;
    use std::vec::Vec;

    fn mailbox() -> Mailbox {
        Mailbox::new(Box::leak(Box::new(Place::new(0, 0))), 3)
    }

    #[test]
    fn the_first_to_post_tells_unless_it_is_the_vcpus_turn() {
        let mailbox = mailbox();
        let place = mailbox.place();
        mailbox.post(Events::NMI);
        assert!(place.take_news());
        assert!(!place.take_news());
        mailbox.post(Events::CONSOLE);
        assert!(!place.has_news(), "told already");
        assert_eq!(mailbox.take(Events::LIGHT), Events::NMI | Events::CONSOLE);
        assert!(!mailbox.has_mail());
        place.set_current(Some(&mailbox));
        mailbox.post(Events::INIT);
        assert!(!place.has_news(), "a kick is enough");
        assert!(mailbox.take(Events::LIGHT).is_empty());
        assert!(mailbox.has_mail());
        assert_eq!(mailbox.take(Events::all()), Events::INIT);
        place.set_current(None);
        mailbox.post(Events::INIT);
        assert!(place.has_news());
    }

    #[test]
    fn vectors_come_once_and_with_their_trigger() {
        let mailbox = mailbox();
        for (vector, level) in [(16, false), (255, true), (64, false), (16, false)] {
            mailbox.request(vector, level);
        }
        assert_eq!(mailbox.take(Events::all()), Events::INTERRUPTS);
        let mut taken = Vec::new();
        mailbox.take_vectors(|vector, level| taken.push((vector, level)));
        assert_eq!(taken, [(16, false), (64, false), (255, true)]);
        mailbox.take_vectors(|vector, _| panic!("{vector} came twice"));
    }
}

/// All orders that the memory model allows, of what senders and a CPU do.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::thread;
    use std::boxed::Box;

    const SENT: [Events; 2] = [Events::NMI, Events::CONSOLE];

    fn mailbox() -> &'static Mailbox {
        let place = Box::leak(Box::new(Place::new(0, 0)));
        Box::leak(Box::new(Mailbox::new(place, 0)))
    }

    /// `senders` post while the CPU does `before`, and then waits, if there is no mail.
    fn nothing_is_overlooked(senders: usize, before: fn(&Mailbox)) {
        loom::model(move || {
            let mailbox = mailbox();
            let place = mailbox.place();
            let senders: Vec<_> = SENT[..senders]
                .iter()
                .map(|&event| thread::spawn(move || mailbox.post(event)))
                .collect();
            before(mailbox);
            place.set_current(None);
            let waits = !mailbox.has_mail();
            for sender in senders {
                sender.join().unwrap();
            }
            if waits && mailbox.has_mail() {
                assert!(place.kicked.load(Ordering::SeqCst), "the CPU sleeps on");
                assert!(place.take_news(), "and if it wakes, it does not look");
            }
        });
    }

    #[test]
    fn a_waiting_cpu_is_woken() {
        nothing_is_overlooked(2, |_| {});
    }

    /// Mail that comes while the vCPU runs is seen in its turn, or at its end.
    #[test]
    fn the_end_of_a_turn_overlooks_nothing() {
        nothing_is_overlooked(1, |mailbox| {
            let place = mailbox.place();
            place.set_current(Some(mailbox));
            if place.kicked.swap(false, Ordering::SeqCst) {
                mailbox.take(Events::LIGHT);
            }
        });
    }

    /// What a flag is about is there when the flag is taken.
    #[test]
    fn vectors_come_with_their_flag() {
        loom::model(|| {
            let mailbox = mailbox();
            let sender = thread::spawn(move || {
                mailbox.request(0x40, false);
                mailbox.start_up(7);
            });
            let taken = mailbox.take(Events::all());
            let mut vectors = Vec::new();
            mailbox.take_vectors(|vector, _| vectors.push(vector));
            if taken.contains(Events::INTERRUPTS) {
                assert_eq!(vectors, [0x40]);
            }
            if taken.contains(Events::START_UP) {
                assert_eq!(mailbox.start_up_page(), 7);
            }
            sender.join().unwrap();
        });
    }
}
