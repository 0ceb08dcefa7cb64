//! The end that empties a ring. It owns `head`, keeps a copy of the peer's `tail` and looks at the real one only when
//! the copy says there is nothing left. Every length is copied out once, checked, then used.

use std::sync::Arc;

use super::{
    Geometry, RingError,
    end::End,
    layout::{HEAD, Mode, RECORD_HEADER, START, TAIL, WANT_DATA, WANT_SPACE, record_bytes},
    memory::Memory,
    producer::within,
};

/// The emptying end of a ring. Never blocks, never makes a system call; allocates only where a caller's `Vec` is too
/// small.
#[derive(Debug)]
pub struct Consumer<M> {
    end: End<M>,
    /// Everything before it was copied out.
    head: u32,
    /// What the producer was told.
    published: u32,
    /// Copy of the producer's index.
    tail: u32,
}

impl<M: Memory> Consumer<M> {
    /// Becomes the consumer of a formatted ring that nothing was taken from yet. Exactly one consumer may exist for a
    /// ring; a second one garbles messages, no more.
    ///
    /// # Errors
    /// As [`Geometry::check`].
    pub fn attach(memory: Arc<M>, geometry: Geometry) -> Result<Self, RingError> {
        Ok(Self {
            end: End::attach(memory, geometry)?,
            head: START,
            published: START,
            tail: START,
        })
    }

    /// What the ring carries.
    pub fn mode(&self) -> Mode {
        self.end.mode()
    }

    /// Takes messages in order, one into each slot, replacing what the slot held; gives the room back once at the end.
    /// Returns how many were taken, 0 when the ring is empty. A slot with enough capacity is filled without allocating.
    ///
    /// # Errors
    /// [`RingError::WrongMode`] on a stream. [`RingError::PeerMisbehaved`] when nothing good came before the lie, and
    /// from then on for ever.
    pub fn pop(&mut self, slots: &mut [Vec<u8>]) -> Result<usize, RingError> {
        self.end.ready_for("pop", true)?;
        let mut count = 0;
        for slot in slots {
            let len = match self.next() {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) if count == 0 => return Err(error),
                Err(_) => break,
            };
            slot.clear();
            slot.resize(len as usize, 0);
            self.take(len, slot);
            count += 1;
        }
        self.publish();
        Ok(count)
    }

    /// Takes messages in order, packed one after the other into `buffer`, each one's length into `lengths`; gives the
    /// room back once at the end. Returns how many were taken.
    ///
    /// # Errors
    /// [`RingError::BufferTooSmall`] when the *first* message does not fit into `buffer`; it stays in the ring.
    /// Otherwise as [`pop`](Self::pop).
    pub fn pop_packed(&mut self, buffer: &mut [u8], lengths: &mut [usize]) -> Result<usize, RingError> {
        self.end.ready_for("pop_packed", true)?;
        let (mut count, mut used) = (0, 0);
        for length in lengths {
            let len = match self.next() {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(error) if count == 0 => return Err(error),
                Err(_) => break,
            };
            let room = &mut buffer[used..];
            if room.len() < len as usize {
                if count == 0 {
                    return Err(RingError::BufferTooSmall {
                        need: len as usize,
                        have: room.len(),
                    });
                }
                break;
            }
            self.take(len, &mut room[..len as usize]);
            *length = len as usize;
            used += len as usize;
            count += 1;
        }
        self.publish();
        Ok(count)
    }

    /// The next message, still in the ring; `None` when the ring is empty.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn peek(&mut self) -> Result<Option<Record<'_, M>>, RingError> {
        self.end.ready_for("peek", true)?;
        Ok(self.next()?.map(|len| Record { consumer: self, len }))
    }

    /// Takes octets into `to`, and gives their room back. Returns how many, 0 when the ring is empty.
    ///
    /// # Errors
    /// [`RingError::WrongMode`] on a ring of messages, [`RingError::PeerMisbehaved`] from then on for ever.
    pub fn read(&mut self, to: &mut [u8]) -> Result<usize, RingError> {
        self.end.ready_for("read", false)?;
        if (self.waiting() as usize) < to.len() {
            self.refresh()?;
        }
        let count = to.len().min(self.waiting() as usize);
        self.end.copy_out(self.head, &mut to[..count]);
        self.head = self.head.wrapping_add(count as u32);
        self.publish();
        Ok(count)
    }

    /// After taking something: whether the producer sleeps and must be woken. One request is answered once.
    pub fn must_notify(&mut self) -> bool {
        self.end.taken(WANT_SPACE)
    }

    /// Asks the producer for a doorbell when it puts something in. Returns `false`, with nothing asked, when something
    /// is there already: take it instead of sleeping.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`].
    pub fn want_data(&mut self) -> Result<bool, RingError> {
        self.end.healthy()?;
        self.end.ask(WANT_DATA);
        self.refresh()?;
        let empty = self.waiting() == 0;
        if !empty {
            self.end.unask(WANT_DATA);
        }
        Ok(empty)
    }

    /// Whether nothing can be taken now.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`].
    pub fn is_empty(&mut self) -> Result<bool, RingError> {
        self.end.healthy()?;
        if self.waiting() == 0 {
            self.refresh()?;
        }
        Ok(self.waiting() == 0)
    }

    /// Enters `generation` with an empty ring. What was not taken is gone. Call it only when the producer has stopped
    /// writing the former generation.
    pub fn restart(&mut self, generation: u32) {
        (self.head, self.published, self.tail) = (START, START, START);
        self.end.restart(generation, HEAD, WANT_DATA);
    }

    /// Length of the record at `head`, checked against the bound and against what the producer published.
    fn next(&mut self) -> Result<Option<u32>, RingError> {
        if self.waiting() == 0 {
            self.refresh()?;
            if self.waiting() == 0 {
                return Ok(None);
            }
        }
        let len = self.end.length(self.head);
        if len > u64::from(self.end.max_len()) || record_bytes(len as u32) > self.waiting() {
            return Err(self.end.poison("record length", len));
        }
        Ok(Some(len as u32))
    }

    fn take(&mut self, len: u32, to: &mut [u8]) {
        self.end.copy_out(self.head.wrapping_add(RECORD_HEADER), to);
        self.head = self.head.wrapping_add(record_bytes(len));
    }

    fn publish(&mut self) {
        if self.head != self.published {
            self.published = self.head;
            self.end.publish(HEAD, self.head);
        }
    }

    fn waiting(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    /// Looks at the producer's index: it may only have moved forward, and not past the room we gave.
    fn refresh(&mut self) -> Result<(), RingError> {
        let tail = self.end.peer_index(TAIL, "tail")?;
        let waiting = tail.wrapping_sub(self.head);
        if waiting < self.waiting() || waiting > self.end.capacity() {
            return Err(self.end.poison("tail", tail));
        }
        self.tail = tail;
        Ok(())
    }
}

/// A message still in the ring. Dropping it leaves it there; the peer may still change its octets, so copy once.
#[derive(Debug)]
pub struct Record<'a, M: Memory> {
    consumer: &'a mut Consumer<M>,
    len: u32,
}

impl<M: Memory> Record<'_, M> {
    /// Length in octets.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it is an empty message.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the octets at `offset` out into `to`.
    ///
    /// # Errors
    /// [`RingError::OutOfRange`] when that would reach past the message; `to` is untouched then.
    pub fn read_at(&self, offset: usize, to: &mut [u8]) -> Result<(), RingError> {
        let at = within(offset, to.len(), self.len)?;
        self.consumer
            .end
            .copy_out(self.consumer.head.wrapping_add(RECORD_HEADER + at), to);
        Ok(())
    }

    /// Takes the message out of the ring and gives its room back.
    pub fn take(self) {
        self.consumer.head = self.consumer.head.wrapping_add(record_bytes(self.len));
        self.consumer.publish();
    }
}
