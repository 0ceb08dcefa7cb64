//! What the two ends of a ring have in common: copying around the wrap, reading the peer's index once and judging its
//! generation, publishing their own, and staying poisoned after a lie.

use std::sync::Arc;

use super::{
    RingError,
    layout::{CONTROL_BYTES, Geometry, Mode, START, pack, unpack},
    memory::Memory,
    sync::{Ordering, fence},
};

/// One end's private knowledge. Nothing in it is ever read back from shared memory.
#[derive(Debug)]
pub(crate) struct End<M> {
    memory: Arc<M>,
    geometry: Geometry,
    generation: u32,
    /// Whether the peer has been seen in our generation; from then on an older one is a lie.
    peer_arrived: bool,
    poison: Option<RingError>,
}

impl<M: Memory> End<M> {
    pub(crate) fn attach(memory: Arc<M>, geometry: Geometry) -> Result<Self, RingError> {
        geometry.check(&*memory)?;
        Ok(Self {
            memory,
            geometry,
            generation: geometry.generation,
            peer_arrived: false,
            poison: None,
        })
    }

    #[cfg(all(test, not(loom)))]
    pub(crate) fn memory(&self) -> &Arc<M> {
        &self.memory
    }

    pub(crate) fn mode(&self) -> Mode {
        self.geometry.mode
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.geometry.capacity
    }

    pub(crate) fn max_len(&self) -> u32 {
        self.geometry.max_len()
    }

    /// Fails once a lie was seen, and when the ring carries the other mode.
    pub(crate) fn ready_for(&self, operation: &'static str, messages: bool) -> Result<(), RingError> {
        self.healthy()?;
        if messages == matches!(self.mode(), Mode::Messages { .. }) {
            Ok(())
        } else {
            Err(RingError::WrongMode {
                operation,
                mode: self.mode().name(),
            })
        }
    }

    pub(crate) fn healthy(&self) -> Result<(), RingError> {
        self.poison.map_or(Ok(()), Err)
    }

    /// Remembers the lie for ever and returns it.
    pub(crate) fn poison(&mut self, field: &'static str, value: impl Into<u64>) -> RingError {
        let error = RingError::PeerMisbehaved {
            field,
            value: value.into(),
        };
        *self.poison.get_or_insert(error)
    }

    /// Reads the peer's index once. A peer that has not yet entered our generation has taken and given nothing.
    ///
    /// SYNC POINT: acquires what the peer released with [`publish`](Self::publish).
    pub(crate) fn peer_index(&mut self, cell: usize, field: &'static str) -> Result<u32, RingError> {
        let (generation, index) = unpack(self.memory.load(self.geometry.base + cell, Ordering::Acquire));
        if generation == self.generation {
            self.peer_arrived = true;
            if matches!(self.mode(), Mode::Messages { .. }) && !index.is_multiple_of(8) {
                return Err(self.poison(field, index));
            }
            Ok(index)
        } else if generation == self.generation.wrapping_sub(1) && !self.peer_arrived {
            Ok(START)
        } else {
            Err(self.poison("generation", generation))
        }
    }

    /// Lets the peer see everything done before, up to `index`.
    ///
    /// SYNC POINT: released here, acquired in [`peer_index`](Self::peer_index).
    pub(crate) fn publish(&self, cell: usize, index: u32) {
        self.memory.store(
            self.geometry.base + cell,
            pack(self.generation, index),
            Ordering::Release,
        );
    }

    /// Asks for a doorbell. The caller must look at the peer's index once more afterwards: the fence puts the request
    /// before that look, and [`taken`](Self::taken) puts the peer's publication before its look at the request, so at
    /// least one of the two sees the other.
    pub(crate) fn ask(&self, flag: usize) {
        self.memory.store(self.geometry.base + flag, 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Withdraws the request.
    pub(crate) fn unask(&self, flag: usize) {
        self.memory.store(self.geometry.base + flag, 0, Ordering::Relaxed);
    }

    /// After publishing: whether the peer asked for a doorbell; takes the request, so that one request is one doorbell.
    pub(crate) fn taken(&self, flag: usize) -> bool {
        fence(Ordering::SeqCst);
        self.memory.load(self.geometry.base + flag, Ordering::Relaxed) != 0
            && self.memory.swap(self.geometry.base + flag, 0, Ordering::Relaxed) != 0
    }

    /// Enters `generation`: own index at the start, no request standing.
    pub(crate) fn restart(&mut self, generation: u32, cell: usize, flag: usize) {
        self.generation = generation;
        self.peer_arrived = false;
        self.unask(flag);
        self.publish(cell, START);
    }

    /// Copies `from` in at `index`, around the wrap. `from` is never longer than the capacity.
    pub(crate) fn copy_in(&self, index: u32, from: &[u8]) {
        let (at, room) = self.place(index);
        if from.len() <= room {
            self.memory.write(at, from);
        } else {
            let (first, rest) = from.split_at(room);
            self.memory.write(at, first);
            self.memory.write(self.data(), rest);
        }
    }

    /// Copies out at `index` into `to`, around the wrap. `to` is never longer than the capacity.
    pub(crate) fn copy_out(&self, index: u32, to: &mut [u8]) {
        let (at, room) = self.place(index);
        if to.len() <= room {
            self.memory.read(at, to);
        } else {
            let (first, rest) = to.split_at_mut(room);
            self.memory.read(at, first);
            self.memory.read(self.data(), rest);
        }
    }

    /// Writes a record's length word; records start at multiples of 8, so it never wraps.
    pub(crate) fn put_length(&self, index: u32, len: u32) {
        self.memory
            .store(self.place(index).0, u64::from(len), Ordering::Relaxed);
    }

    /// Reads a record's length word, once.
    pub(crate) fn length(&self, index: u32) -> u64 {
        self.memory.load(self.place(index).0, Ordering::Relaxed)
    }

    fn data(&self) -> usize {
        self.geometry.base + CONTROL_BYTES
    }

    /// Offset of `index` in memory, and octets up to the wrap.
    fn place(&self, index: u32) -> (usize, usize) {
        let position = index & (self.geometry.capacity - 1);
        (
            self.data() + position as usize,
            (self.geometry.capacity - position) as usize,
        )
    }
}
