//! Static data of a program with one CPU.

use core::cell::UnsafeCell;

/// A place that the program, its exception handlers and the CPU share.
#[repr(transparent)]
pub struct Shared<T>(UnsafeCell<T>);

// SAFETY: there is one CPU. A handler may run between any two instructions, so
// accesses are volatile and whole.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    pub const fn pointer(&self) -> *mut T {
        self.0.get()
    }

    /// Linear and, memory being mapped one to one, physical.
    pub fn address(&self) -> u64 {
        self.0.get() as u64
    }
}

impl<T: Copy> Shared<T> {
    pub fn get(&self) -> T {
        // SAFETY: the value is there and valid, and nobody holds a reference to it.
        unsafe { self.0.get().read_volatile() }
    }

    pub fn set(&self, value: T) {
        // SAFETY: as in `get`.
        unsafe { self.0.get().write_volatile(value) }
    }
}

impl<T: Copy, const N: usize> Shared<[T; N]> {
    pub fn at(&self, index: usize) -> T {
        assert!(index < N);
        // SAFETY: inside the array; as in `get`.
        unsafe { self.0.get().cast::<T>().add(index).read_volatile() }
    }

    pub fn put(&self, index: usize, value: T) {
        assert!(index < N);
        // SAFETY: inside the array; as in `get`.
        unsafe { self.0.get().cast::<T>().add(index).write_volatile(value) }
    }
}
