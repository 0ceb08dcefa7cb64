//! The one place atomics come from. Everything in [`ring`](super) takes its atomics and fences here, so that a build
//! with `--cfg loom` swaps in loom's and explores every interleaving; nothing else in the module may name
//! `core::sync::atomic`. The names under [`mapped`] are always the processor's own: memory of a mapping cannot be
//! loom's. Nothing is decided here.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{Ordering, fence};

/// Atomics laid over a mapping.
#[cfg(not(loom))]
pub(crate) mod mapped {
    pub(crate) use core::sync::atomic::{AtomicU8, AtomicU64};
}

/// The cells of the in-process memory that tests run on: loom's under loom.
#[cfg(test)]
pub(crate) mod cell {
    #[cfg(not(loom))]
    pub(crate) use core::sync::atomic::AtomicU64;
    #[cfg(loom)]
    pub(crate) use loom::sync::atomic::AtomicU64;

    /// One octet of payload. Under loom an access that races with a write is reported as an error.
    #[derive(Debug, Default)]
    pub(crate) struct Octet {
        #[cfg(not(loom))]
        value: core::sync::atomic::AtomicU8,
        #[cfg(loom)]
        value: loom::cell::UnsafeCell<u8>,
    }

    #[cfg(not(loom))]
    impl Octet {
        pub(crate) fn get(&self) -> u8 {
            self.value.load(super::Ordering::Relaxed)
        }

        pub(crate) fn set(&self, octet: u8) {
            self.value.store(octet, super::Ordering::Relaxed);
        }
    }

    // SAFETY: loom runs one thread at a time and checks each access of the cell against the happens-before order, so
    // no access is concurrent in fact; one that could be is reported before it happens.
    #[cfg(loom)]
    unsafe impl Sync for Octet {}

    #[cfg(loom)]
    impl Octet {
        pub(crate) fn get(&self) -> u8 {
            // SAFETY: loom hands out a valid pointer and has checked that no write is concurrent.
            self.value.with(|value| unsafe { *value })
        }

        pub(crate) fn set(&self, octet: u8) {
            // SAFETY: loom hands out a valid pointer and has checked that no access is concurrent.
            self.value.with_mut(|value| unsafe { *value = octet });
        }
    }
}
