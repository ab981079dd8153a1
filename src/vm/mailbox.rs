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
//!
//! # Posted interrupts
//!
//! Vectors and flags begin the mailbox in the form of a posted-interrupt descriptor
//! ([`Descriptor`]). Where the CPU processes those, it is told of a vector by
//! another interrupt, which it takes without an exit: it clears the flag, and delivers what is
//! requested. Whatever it cannot do so, because the vCPU does not run just then, is done as for any
//! other mail, and as where no CPU processes anything. Since that interrupt makes nobody look at other
//! flags, who sets one of those tells as if that for vectors were not set.

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
        /// Vectors are requested by edges: "outstanding notification" (SDM 3, table 30-1). The
        /// CPU clears it too.
        const POSTED = 1 << 0;
        /// Vectors are requested by levels.
        const LEVELS = 1 << 9;
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
    pub const LIGHT: Self = Self::POSTED
        .union(Self::LEVELS)
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
    #[cfg_attr(
        loom,
        expect(dead_code, reason = "the model interrupts without an APIC")
    )]
    apic_id: u32,
    /// The mailbox of the vCPU whose turn it is; null between turns. Only compared.
    current: AtomicPtr<Mailbox>,
    /// A vCPU whose turn it is not has something to look at, or a new one has come. No memory is
    /// read because of it but the mailboxes, which have an order of their own: relaxed.
    look: AtomicBool,
    /// Stand for interrupts that the CPU has not taken yet.
    #[cfg(loom)]
    kicked: AtomicBool,
    #[cfg(loom)]
    notified: AtomicBool,
}

/// How the CPU of a vCPU whose turn it is is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tell {
    /// By an interrupt that makes it exit.
    Kick,
    /// By the one for which it processes posted interrupts.
    Notify,
    /// By NMI: it takes no other interrupt now.
    Nmi,
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
            #[cfg(loom)]
            notified: AtomicBool::new(false),
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
        self.interrupt(Tell::Kick);
    }

    /// Interrupts the CPU: what it does next is behind all that was stored before.
    fn interrupt(&self, how: Tell) {
        #[cfg(loom)]
        match how {
            Tell::Kick | Tell::Nmi => self.kicked.store(true, Ordering::SeqCst),
            Tell::Notify => self.notified.store(true, Ordering::SeqCst),
        }
        #[cfg(not(loom))]
        match how {
            Tell::Kick => local_apic::kick(self.apic_id),
            Tell::Notify => local_apic::notify(self.apic_id),
            Tell::Nmi => {
                local_apic::send(Command::nmi(Target::Cpu(self.apic_id)));
            }
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

/// A posted-interrupt descriptor (SDM 3, table 30-1): what the CPU reads and changes itself while the
/// vCPU runs, where it processes posted interrupts.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Descriptor {
    /// Vectors that are requested by edges, a bit for each. Behind [`Events::POSTED`]: relaxed.
    requests: [AtomicU64; 4],
    /// [`Events`], of which the CPU knows the first. Set after what they are about was stored, and
    /// taken before that is read: release and acquire; and in one order with [`Place::current`]:
    /// SeqCst.
    events: AtomicU32,
    /// For others than the CPU; here for nobody.
    rest: [u32; 7],
}

/// What others have for one vCPU.
#[derive(Debug)]
pub struct Mailbox {
    descriptor: Descriptor,
    place: &'static Place,
    /// The local APIC's identifier.
    id: u32,
    /// Vectors that are requested by levels. Behind [`Events::LEVELS`]: relaxed.
    levels: [AtomicU64; 4],
    /// NMIs. Behind [`Events::NMI`]: relaxed.
    nmis: AtomicU32,
    /// The page of the last start-up interrupt. Behind `events`: relaxed.
    start_up: AtomicU8,
    /// The CPU takes no other interrupt while it is the vCPU's turn. No memory is read because of
    /// it: relaxed.
    by_nmi: AtomicBool,
    /// The CPU processes the descriptor. Where a sender does not see it yet, or still does, the CPU
    /// exits for what it is told by, and looks: relaxed.
    is_processed: AtomicBool,
    /// [`Address::to_word`] of the local APIC. A sender sees it as it was or is, and
    /// nothing else is read because of it: relaxed.
    address: AtomicU32,
}

impl Mailbox {
    /// Empty, of the vCPU with this identifier, which runs at `place`.
    pub fn new(place: &'static Place, id: u32) -> Self {
        Self {
            descriptor: Descriptor {
                requests: Default::default(),
                events: AtomicU32::new(0),
                rest: [0; 7],
            },
            place,
            id,
            levels: Default::default(),
            nmis: AtomicU32::new(0),
            start_up: AtomicU8::new(0),
            by_nmi: AtomicBool::new(false),
            is_processed: AtomicBool::new(false),
            address: AtomicU32::new(0),
        }
    }

    /// What the CPU is given where it processes posted interrupts.
    pub const fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// The CPU processes the descriptor from now on.
    pub fn is_processed_by_cpu(&self) {
        self.is_processed.store(true, Ordering::Relaxed);
    }

    /// Where the vCPU runs.
    pub const fn place(&self) -> &'static Place {
        self.place
    }

    /// Has the vCPU look at `events`.
    #[inline]
    pub fn post(&self, events: Events) {
        let before = self.set(events);
        let is_told = if events == Events::POSTED {
            before
        } else {
            before - Events::POSTED
        };
        if !is_told.is_empty() {
            // Whoever set the first flag has told, or is about to, and nothing was taken since; or
            // it was a sibling whose turn is bounded since then (`post_from`).
            return;
        }
        one_order();
        let own = ptr::from_ref(self).cast_mut();
        if self.place.current.load(Ordering::SeqCst) != own {
            self.place.tell();
        } else {
            self.place.interrupt(self.way_to_tell(events));
        }
    }

    fn way_to_tell(&self, events: Events) -> Tell {
        if self.by_nmi.load(Ordering::Relaxed) {
            Tell::Nmi
        } else if events == Events::POSTED && self.is_processed.load(Ordering::Relaxed) {
            Tell::Notify
        } else {
            Tell::Kick
        }
    }

    /// Sets flags; what was set before.
    #[inline]
    fn set(&self, events: Events) -> Events {
        let events = events.bits();
        Events::from_bits_retain(self.descriptor.events.fetch_or(events, Ordering::SeqCst))
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
            self.set(events);
        } else {
            self.post(events);
        }
        same
    }

    /// Puts a vector in; what is to be posted for it.
    #[inline]
    pub fn request(&self, vector: u8, level: bool) -> Events {
        let (words, event) = if level {
            (&self.levels, Events::LEVELS)
        } else {
            (&self.descriptor.requests, Events::POSTED)
        };
        words[usize::from(vector >> 6)].fetch_or(1 << (vector & 63), Ordering::Relaxed);
        event
    }

    /// Puts an NMI in; what is to be posted for it.
    pub fn request_nmi(&self) -> Events {
        self.nmis.fetch_add(1, Ordering::Relaxed);
        Events::NMI
    }

    /// How many NMIs have been put in since the last call, when [`Events::NMI`] was taken.
    pub fn take_nmis(&self) -> u32 {
        self.nmis.swap(0, Ordering::Relaxed)
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
        self.descriptor.events.load(Ordering::SeqCst) != 0
    }

    /// What of `kinds` there is to look at now; it is not there any more.
    #[inline]
    pub fn take(&self, kinds: Events) -> Events {
        let events = &self.descriptor.events;
        if events.load(Ordering::Relaxed) & kinds.bits() == 0 {
            return Events::empty();
        }
        let taken = events.fetch_and(!kinds.bits(), Ordering::SeqCst);
        Events::from_bits_truncate(taken) & kinds
    }

    /// Gives the vectors that `events` are about to `sink`, with whether each is a level.
    #[inline]
    pub fn take_vectors(&self, events: Events, mut sink: impl FnMut(u8, bool)) {
        if events.contains(Events::POSTED) {
            take_bits(&self.descriptor.requests, |vector| sink(vector, false));
        }
        if events.contains(Events::LEVELS) {
            take_bits(&self.levels, |vector| sink(vector, true));
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

/// Gives the numbers of the bits that are set, and clears them.
#[inline]
fn take_bits(words: &[AtomicU64; 4], mut sink: impl FnMut(u8)) {
    for (index, word) in words.iter().enumerate() {
        if word.load(Ordering::Relaxed) == 0 {
            continue;
        }
        let first = (index as u8) << 6;
        let mut bits = word.swap(0, Ordering::Relaxed);
        while bits != 0 {
            sink(first | bits.trailing_zeros() as u8);
            bits &= bits - 1;
        }
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
    fn nmis_are_counted() {
        let mailbox = mailbox();
        for _ in 0..2 {
            mailbox.post(mailbox.request_nmi());
        }
        assert_eq!(mailbox.take(Events::LIGHT), Events::NMI);
        assert_eq!((mailbox.take_nmis(), mailbox.take_nmis()), (2, 0));
    }

    /// SDM 3, table 30-1: bit 0 to 255 the vectors, bit 256 the outstanding notification.
    #[test]
    fn the_descriptor_is_as_the_cpu_knows_it() {
        assert_eq!(
            (size_of::<Descriptor>(), align_of::<Descriptor>()),
            (64, 64)
        );
        let mailbox = mailbox();
        mailbox.set(mailbox.request(0x41, false));
        mailbox.set(mailbox.request(0xff, false));
        // SAFETY: it is as large, and nobody changes it.
        let words = unsafe { &*ptr::from_ref(mailbox.descriptor()).cast::<[u64; 8]>() };
        let is_set = |bit: &usize| words[bit / 64] & 1 << (bit % 64) != 0;
        let set: Vec<_> = (0..512).filter(is_set).collect();
        assert_eq!(set, [0x41, 0xff, 256]);
    }

    #[test]
    fn a_running_vcpu_is_told_as_its_cpu_can_be() {
        let mailbox = mailbox();
        assert_eq!(mailbox.way_to_tell(Events::POSTED), Tell::Kick);
        mailbox.is_processed_by_cpu();
        assert_eq!(mailbox.way_to_tell(Events::POSTED), Tell::Notify);
        assert_eq!(mailbox.way_to_tell(Events::NMI), Tell::Kick);
        assert_eq!(mailbox.way_to_tell(Events::LEVELS), Tell::Kick);
        mailbox.tell_by_nmi();
        assert_eq!(mailbox.way_to_tell(Events::POSTED), Tell::Nmi);
    }

    /// What a CPU that processes posted interrupts clears itself tells nobody of anything else.
    #[test]
    fn other_flags_are_told_beside_posted_vectors() {
        let mailbox = mailbox();
        let place = mailbox.place();
        mailbox.post(mailbox.request(0x41, false));
        assert!(place.take_news());
        mailbox.post(mailbox.request(0x42, false));
        assert!(!place.take_news(), "told already");
        mailbox.post(Events::NMI);
        assert!(place.take_news());
        mailbox.post(mailbox.request(0x43, false));
        mailbox.post(Events::INIT);
        assert!(!place.take_news(), "told of the NMI");
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
        assert_eq!(events, Events::POSTED | Events::LEVELS);
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

    /// The CPU processes posted interrupts: what it does when it is told of them (SDM 3, 30.6).
    fn process(mailbox: &Mailbox, mut deliver: impl FnMut(u8)) {
        if mailbox.place().notified.swap(false, Ordering::SeqCst) {
            let descriptor = mailbox.descriptor();
            descriptor
                .events
                .fetch_and(!Events::POSTED.bits(), Ordering::SeqCst);
            take_bits(&descriptor.requests, &mut deliver);
        }
    }

    /// A vector is delivered by the CPU, or found by the scheduler; and an NMI that comes beside it
    /// is not taken for told.
    #[test]
    fn what_the_cpu_processes_and_what_it_does_not_are_both_seen() {
        loom::model(|| {
            let mailbox = mailbox();
            let place = mailbox.place();
            mailbox.is_processed_by_cpu();
            place.set_current(Some(mailbox));
            let senders = [
                thread::spawn(move || mailbox.post(mailbox.request(0x40, false))),
                thread::spawn(move || mailbox.post(Events::NMI)),
            ];
            let mut delivered = 0;
            process(mailbox, |_| delivered += 1);
            place.set_current(None);
            let waits = !mailbox.has_mail();
            for sender in senders {
                sender.join().unwrap();
            }
            let events = mailbox.take(Events::all());
            if waits && !events.is_empty() {
                assert!(place.kicked.load(Ordering::SeqCst), "the CPU sleeps on");
                assert!(place.take_news(), "and if it wakes, it does not look");
            }
            assert!(events.contains(Events::NMI));
            mailbox.take_vectors(events, |_, _| delivered += 1);
            assert_eq!(delivered, 1);
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
            if taken.contains(Events::POSTED) {
                assert_eq!(vectors, [0x40]);
            }
            if taken.contains(Events::START_UP) {
                assert_eq!(mailbox.start_up_page(), 7);
            }
            sender.join().unwrap();
        });
    }
}
