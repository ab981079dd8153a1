//! A small first-in, first-out buffer of bytes.

/// Up to `N` bytes.
#[derive(Clone, Debug)]
pub struct Fifo<const N: usize> {
    bytes: [u8; N],
    first: usize,
    len: usize,
}

impl<const N: usize> Default for Fifo<N> {
    fn default() -> Self {
        Self {
            bytes: [0; N],
            first: 0,
            len: 0,
        }
    }
}

impl<const N: usize> Fifo<N> {
    /// How many bytes are in it.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a byte; false, and nothing happens, when it is full.
    #[inline]
    pub fn push(&mut self, byte: u8) -> bool {
        if self.len >= N {
            return false;
        }
        if let Some(slot) = self.bytes.get_mut((self.first + self.len) % N) {
            *slot = byte;
            self.len += 1;
        }
        true
    }

    /// Takes the oldest byte.
    #[inline]
    pub fn pop(&mut self) -> Option<u8> {
        if self.len == 0 {
            return None;
        }
        let byte = self.bytes.get(self.first).copied();
        self.first = (self.first + 1) % N;
        self.len -= 1;
        byte
    }

    /// Forgets what is in it.
    pub const fn clear(&mut self) {
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn it_is_a_bounded_queue(steps in prop::collection::vec(any::<Option<u8>>(), 0..100)) {
            let (mut fifo, mut model) = (Fifo::<5>::default(), VecDeque::new());
            for step in steps {
                match step {
                    Some(byte) => {
                        prop_assert_eq!(fifo.push(byte), model.len() < 5);
                        if model.len() < 5 {
                            model.push_back(byte);
                        }
                    }
                    None => prop_assert_eq!(fifo.pop(), model.pop_front()),
                }
                prop_assert_eq!(fifo.len(), model.len());
            }
        }
    }
}
