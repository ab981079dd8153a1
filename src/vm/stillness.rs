//! Whether any vCPU of a guest will ever go on.
//!
//! A vCPU is *deaf* when it is halted with interrupts off, or waits for a start-up interrupt:
//! only its siblings and the I/O APIC, by NMI, INIT and start-up interrupts, can have it go on.
//! When all are, and nothing of that kind is under way or may come of a device, the guest has ended.

use crate::sync::atomic::{AtomicU64, Ordering};

/// How many vCPUs are deaf, and in the upper half how often one has ceased to be.
#[derive(Debug, Default)]
pub struct Stillness(AtomicU64);

const CEASED: u64 = 1 << 32;
const COUNT: u64 = CEASED - 1;

impl Stillness {
    /// One more of `vcpus` is deaf. True where all are and stay so, when `has_mail` says for each
    /// mailbox that it is empty.
    ///
    /// Between the two looks at the word nobody has ceased to be deaf, so nobody has taken
    /// mail or sent any: it may be read one mailbox after the other. SeqCst puts the word
    /// and the mailboxes' flags into one order.
    pub fn add(&self, vcpus: u32, has_mail: impl FnOnce() -> bool) -> bool {
        let now = self.0.fetch_add(1, Ordering::SeqCst) + 1;
        now & COUNT == u64::from(vcpus) && !has_mail() && self.0.load(Ordering::SeqCst) == now
    }

    /// One is no longer: before it looks at its mail.
    pub fn remove(&self) {
        self.0.fetch_add(CEASED - 1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_have_to_be_deaf_and_nothing_under_way() {
        let still = Stillness::default();
        assert!(!still.add(2, || false));
        assert!(!still.add(2, || true));
        still.remove();
        assert!(still.add(2, || false));
        still.remove();
        let wakes = || {
            still.remove();
            still.0.fetch_add(1, Ordering::SeqCst);
            false
        };
        assert!(!still.add(2, wakes), "one has been awake meanwhile");
    }
}

/// All orders that the memory model allows.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::atomic::AtomicBool;
    use loom::thread;
    use std::sync::Arc;

    /// One vCPU sends the other an NMI and is deaf then; that one is deaf, and looks at its
    /// mail. Nobody says that all is still before the NMI has been taken.
    #[test]
    fn mail_under_way_is_no_stillness() {
        loom::model(|| {
            let shared = Arc::new((
                Stillness::default(),
                AtomicBool::new(false),
                AtomicBool::new(false),
            ));
            let other = Arc::clone(&shared);
            let sender = thread::spawn(move || {
                let (still, mail, taken) = &*other;
                mail.store(true, Ordering::SeqCst);
                if still.add(2, || mail.load(Ordering::SeqCst)) {
                    assert!(taken.load(Ordering::SeqCst));
                }
            });
            let (still, mail, taken) = &*shared;
            let is_still = still.add(2, || mail.load(Ordering::SeqCst));
            assert!(!is_still, "the sender is deaf when it has sent");
            if mail.load(Ordering::SeqCst) {
                still.remove();
                mail.store(false, Ordering::SeqCst);
                taken.store(true, Ordering::SeqCst);
                still.add(2, || mail.load(Ordering::SeqCst));
            }
            sender.join().unwrap();
        });
    }
}
