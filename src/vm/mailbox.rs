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
use alloc::sync::Arc;
use bitflags::bitflags;
use core::ptr;

bitflags! {
    /// What a vCPU is to look at.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Events: u32 {
        /// Vectors are requested: for each word of them a bit, first those of edges.
        const INTERRUPTS = 0xff << 16;
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

/// The first bit of [`Events::INTERRUPTS`].
const FIRST_WORD: u32 = 16;

/// A CPU as those see it that have something for the vCPUs on it.
#[derive(Debug)]
pub struct Place {
    /// The number of the CPU.
    pub cpu: usize,
    /// The identifier of its local APIC.
    apic_id: u32,
    /// The mailbox of the vCPU whose turn it is; null between turns. Only compared.
    current: AtomicPtr<Mailbox>,
    /// A vCPU whose turn it is not has something to look at, or a new one has come. No memory is
    /// read because of it but the mailboxes, which have an order of their own: relaxed.
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
    /// Vectors that are requested: four words by edges, and four by levels. Behind `events`:
    /// relaxed.
    requested: [AtomicU64; 8],
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
            // Whoever set the first flag has told, or is about to, and nothing was taken since; or
            // it was a sibling whose turn is bounded since then (`post_from`).
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

    /// Has all these vCPUs look at `events`.
    pub fn post_to_all(mailboxes: &[Arc<Self>], events: Events) {
        for mailbox in mailboxes {
            mailbox.post(events);
        }
    }

    /// Has the CPU told by NMI while it is the vCPU's turn.
    pub fn tell_by_nmi(&self) {
        self.by_nmi.store(true, Ordering::Relaxed);
    }

    /// The same for a vCPU whose turn it is at `place`. True where that is this one's CPU too:
    /// then nobody is told, and it comes to look when that turn is over.
    #[inline]
    pub fn post_from(&self, place: &Place, events: Events) -> bool {
        let same = ptr::eq(place, self.place);
        if same {
            self.events.fetch_or(events.bits(), Ordering::SeqCst);
        } else {
            self.post(events);
        }
        same
    }

    /// Puts a vector in; what is to be posted for it.
    #[inline]
    pub fn request(&self, vector: u8, level: bool) -> Events {
        let word = vector >> 6 | u8::from(level) << 2;
        if let Some(requested) = self.requested.get(usize::from(word)) {
            requested.fetch_or(1 << (vector & 63), Ordering::Relaxed);
        }
        Events::from_bits_retain(1 << (FIRST_WORD + u32::from(word)))
    }

    /// Puts the page of a start-up interrupt in, to be posted as [`Events::START_UP`].
    pub fn start_up(&self, page: u8) {
        self.start_up.store(page, Ordering::Relaxed);
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

    /// Gives the vectors that `events` are about to `sink`, with whether each is a level.
    #[inline]
    pub fn take_vectors(&self, events: Events, mut sink: impl FnMut(u8, bool)) {
        let mut words = (events & Events::INTERRUPTS).bits() >> FIRST_WORD;
        while words != 0 {
            let word = words.trailing_zeros();
            words &= words - 1;
            let Some(requested) = self.requested.get(word as usize) else {
                return;
            };
            let mut vectors = requested.swap(0, Ordering::Relaxed);
            while vectors != 0 {
                sink(
                    (word as u8 & 3) << 6 | vectors.trailing_zeros() as u8,
                    word > 3,
                );
                vectors &= vectors - 1;
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
            let events = mailbox.request(vector, level);
            assert!(mailbox.post_from(mailbox.place(), events));
        }
        assert!(!mailbox.place().has_news(), "it is this CPU's own");
        let events = mailbox.take(Events::all());
        assert!(Events::INTERRUPTS.contains(events));
        let mut taken = Vec::new();
        mailbox.take_vectors(events, |vector, level| taken.push((vector, level)));
        assert_eq!(taken, [(16, false), (64, false), (255, true)]);
        mailbox.take_vectors(events, |vector, _| panic!("{vector} came twice"));
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
                mailbox.post(mailbox.request(0x40, false));
                mailbox.start_up(7);
                mailbox.post(Events::START_UP);
            });
            let taken = mailbox.take(Events::all());
            let mut vectors = Vec::new();
            mailbox.take_vectors(taken, |vector, _| vectors.push(vector));
            if taken.intersects(Events::INTERRUPTS) {
                assert_eq!(vectors, [0x40]);
            }
            if taken.contains(Events::START_UP) {
                assert_eq!(mailbox.start_up_page(), 7);
            }
            sender.join().unwrap();
        });
    }
}
