//! What a ring asks of the memory it lives in: 64-bit cells with an ordering, and octets copied in and out. There is no
//! way to borrow the memory, because a peer may be writing it at any time. [`shm::Region`](crate::shm::Region) is the
//! real one; tests and loom use one on the heap.

use super::sync::Ordering;

/// Memory shared with a peer who may change any of it at any time.
///
/// Offsets are in octets from the start. Each call touches each octet it names exactly once, so a value that was copied
/// out and then checked stays checked.
///
/// # Panics
/// Every method panics when the range does not lie inside the memory, or when a cell's offset is no multiple of 8.
/// Rings form offsets only from their own, checked geometry, never from what a peer wrote.
pub trait Memory: Send + Sync {
    /// Size in octets.
    fn len(&self) -> usize;

    /// Whether there is no memory at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Loads the cell at `offset`.
    fn load(&self, offset: usize, order: Ordering) -> u64;

    /// Stores the cell at `offset`.
    fn store(&self, offset: usize, value: u64, order: Ordering);

    /// Replaces the cell at `offset` and returns what it held.
    fn swap(&self, offset: usize, value: u64, order: Ordering) -> u64;

    /// Copies the octets at `offset` out into `to`, without any ordering of its own.
    fn read(&self, offset: usize, to: &mut [u8]);

    /// Copies `from` in at `offset`, without any ordering of its own.
    fn write(&self, offset: usize, from: &[u8]);
}

#[cfg(test)]
pub(crate) mod heap {
    //! Memory of one process, made of façade cells. Cells and octets do not alias: the part below `control` is reached
    //! as cells only; words above it are made of octets, so that loom checks a record's length like its payload.
    use super::{super::sync::cell, Memory, Ordering};

    /// `cells` cells, then octets.
    #[derive(Debug)]
    pub(crate) struct Heap {
        cells: Vec<cell::AtomicU64>,
        octets: Vec<cell::Octet>,
    }

    impl Heap {
        /// Memory of `len` octets whose first `control` are cells.
        pub(crate) fn new(control: usize, len: usize) -> Self {
            Self {
                cells: (0..control / 8).map(|_| cell::AtomicU64::new(0)).collect(),
                octets: (control..len).map(|_| cell::Octet::default()).collect(),
            }
        }

        fn control(&self) -> usize {
            self.cells.len() * 8
        }
    }

    impl Memory for Heap {
        fn len(&self) -> usize {
            self.control() + self.octets.len()
        }

        fn load(&self, offset: usize, order: Ordering) -> u64 {
            assert_eq!(offset % 8, 0);
            let Some(cell) = self.cells.get(offset / 8) else {
                let mut word = [0; 8];
                self.read(offset, &mut word);
                return u64::from_ne_bytes(word);
            };
            cell.load(order)
        }

        fn store(&self, offset: usize, value: u64, order: Ordering) {
            assert_eq!(offset % 8, 0);
            match self.cells.get(offset / 8) {
                Some(cell) => cell.store(value, order),
                None => self.write(offset, &value.to_ne_bytes()),
            }
        }

        fn swap(&self, offset: usize, value: u64, order: Ordering) -> u64 {
            assert_eq!(offset % 8, 0);
            self.cells[offset / 8].swap(value, order)
        }

        fn read(&self, offset: usize, to: &mut [u8]) {
            let start = offset - self.control();
            let held = &self.octets[start..start + to.len()];
            for (to, from) in to.iter_mut().zip(held) {
                *to = from.get();
            }
        }

        fn write(&self, offset: usize, from: &[u8]) {
            let start = offset - self.control();
            for (from, to) in from.iter().zip(&self.octets[start..start + from.len()]) {
                to.set(*from);
            }
        }
    }
}
