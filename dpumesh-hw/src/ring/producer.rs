//! The end that fills a ring. It owns `tail`, keeps a copy of the peer's `head` and looks at the real one only when the
//! copy says there is no room. What it publishes is taken by [`Consumer`](super::Consumer).

use std::sync::Arc;

use super::{
    Geometry, InFlight, RingError,
    end::End,
    layout::{HEAD, Mode, RECORD_HEADER, START, TAIL, WANT_DATA, WANT_SPACE, record_bytes},
    memory::Memory,
};

/// The filling end of a ring. Never blocks, never makes a system call, never allocates.
#[derive(Debug)]
pub struct Producer<M> {
    end: End<M>,
    /// Everything before it is published.
    tail: u32,
    /// Copy of the consumer's index.
    head: u32,
}

impl<M: Memory> Producer<M> {
    /// Becomes the producer of a formatted ring that nothing was put into yet. Exactly one producer may exist for a
    /// ring; a second one garbles messages, no more.
    ///
    /// # Errors
    /// As [`Geometry::check`].
    pub fn attach(memory: Arc<M>, geometry: Geometry) -> Result<Self, RingError> {
        Ok(Self {
            end: End::attach(memory, geometry)?,
            tail: START,
            head: START,
        })
    }

    /// What the ring carries.
    pub fn mode(&self) -> Mode {
        self.end.mode()
    }

    /// Octets of data the ring holds.
    pub fn capacity(&self) -> u32 {
        self.end.capacity()
    }

    /// Puts messages in, in order, and publishes them together. Returns how many fitted, 0 when the ring is full.
    ///
    /// # Errors
    /// [`RingError::MessageTooLong`] when the *first* message is too long; a later one ends the batch before it.
    /// [`RingError::WrongMode`] on a stream. [`RingError::PeerMisbehaved`] from then on for ever. After an error
    /// nothing of this call was put in.
    pub fn push(&mut self, messages: &[&[u8]]) -> Result<usize, RingError> {
        self.end.ready_for("push", true)?;
        let (mut tail, mut count) = (self.tail, 0);
        for message in messages {
            let Some(len) = self.allowed(message.len()) else {
                if count == 0 {
                    return Err(self.too_long(message.len()));
                }
                break;
            };
            if !self.has_room(tail, record_bytes(len))? {
                break;
            }
            self.end.put_length(tail, len);
            self.end.copy_in(tail.wrapping_add(RECORD_HEADER), message);
            tail = tail.wrapping_add(record_bytes(len));
            count += 1;
        }
        self.publish(tail);
        Ok(count)
    }

    /// Sets room aside for one message of exactly `len` octets that is written in place; `None` when the ring is full.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn reserve(&mut self, len: usize) -> Result<Option<Reservation<'_, M>>, RingError> {
        self.end.ready_for("reserve", true)?;
        let Some(octets) = self.allowed(len) else {
            return Err(self.too_long(len));
        };
        Ok(self
            .has_room(self.tail, record_bytes(octets))?
            .then_some(Reservation {
                producer: self,
                header: RECORD_HEADER,
                len: octets,
            }))
    }

    /// Sets room aside for a run of exactly `len` octets of a stream, written in place; `None` when there is too little.
    ///
    /// # Errors
    /// [`RingError::MessageTooLong`] when `len` octets can never fit; otherwise as [`write`](Self::write).
    pub fn reserve_run(&mut self, len: usize) -> Result<Option<Reservation<'_, M>>, RingError> {
        self.end.ready_for("reserve_run", false)?;
        let Some(octets) = self.run(len) else {
            return Err(self.too_long(len));
        };
        Ok(self.has_room(self.tail, octets)?.then_some(Reservation {
            producer: self,
            header: 0,
            len: octets,
        }))
    }

    /// Puts the octets of `parts` in, one part after the other, and publishes them together. Returns how many octets
    /// fitted, 0 when the ring is full.
    ///
    /// # Errors
    /// [`RingError::WrongMode`] on a ring of messages, [`RingError::PeerMisbehaved`] from then on for ever.
    pub fn write(&mut self, parts: &[&[u8]]) -> Result<usize, RingError> {
        self.end.ready_for("write", false)?;
        let wanted = parts.iter().map(|part| part.len()).fold(0, usize::saturating_add);
        if (self.room(self.tail) as usize) < wanted {
            self.refresh()?;
        }
        let mut tail = self.tail;
        for part in parts {
            let fits = part.len().min(self.room(tail) as usize);
            self.end.copy_in(tail, &part[..fits]);
            tail = tail.wrapping_add(fits as u32);
        }
        let count = tail.wrapping_sub(self.tail) as usize;
        self.publish(tail);
        Ok(count)
    }

    /// After putting something in: whether the consumer sleeps and must be woken. One request is answered once.
    pub fn must_notify(&mut self) -> bool {
        self.end.taken(WANT_DATA)
    }

    /// Asks the consumer for a doorbell when it makes room. Returns `false`, with nothing asked, when a message of
    /// `len` octets (in stream mode: `len` octets) would fit already: look again instead of sleeping.
    ///
    /// # Errors
    /// [`RingError::MessageTooLong`] when `len` octets can never fit; [`RingError::PeerMisbehaved`].
    pub fn want_space(&mut self, len: usize) -> Result<bool, RingError> {
        self.end.healthy()?;
        let need = match self.mode() {
            Mode::Messages { .. } => self.allowed(len).map(record_bytes),
            Mode::Stream => self.run(len),
        };
        let Some(need) = need else {
            return Err(self.too_long(len));
        };
        self.end.ask(WANT_SPACE);
        self.refresh()?;
        let fits = self.room(self.tail) >= need;
        if fits {
            self.end.unask(WANT_SPACE);
        }
        Ok(!fits)
    }

    /// What was put in and not taken by the consumer yet. A consumer that died between copying and saying so has not
    /// taken. Walks the records: no call for every packet.
    ///
    /// # Errors
    /// [`RingError::PeerMisbehaved`] when the consumer's index or a record it may have overwritten is out of range.
    pub fn in_flight(&mut self) -> Result<InFlight, RingError> {
        self.end.healthy()?;
        self.refresh()?;
        let mut waiting = InFlight::default();
        if self.mode() == Mode::Stream {
            waiting.bytes = u64::from(self.tail.wrapping_sub(self.head));
            return Ok(waiting);
        }
        let mut at = self.head;
        while at != self.tail {
            let (len, left) = (self.end.length(at), self.tail.wrapping_sub(at));
            if len > u64::from(self.end.max_len()) || record_bytes(len as u32) > left {
                return Err(self.end.poison("record length", len));
            }
            waiting.messages += 1;
            waiting.bytes += len;
            at = at.wrapping_add(record_bytes(len as u32));
        }
        Ok(waiting)
    }

    /// Enters `generation` with an empty ring. What the consumer had not taken is gone. Call it only when the consumer
    /// has stopped reading the former generation.
    pub fn restart(&mut self, generation: u32) {
        (self.tail, self.head) = (START, START);
        self.end.restart(generation, TAIL, WANT_SPACE);
    }

    /// What a lying peer would write into.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn memory(&self) -> &Arc<M> {
        self.end.memory()
    }

    fn publish(&mut self, tail: u32) {
        if tail != self.tail {
            self.tail = tail;
            self.end.publish(TAIL, tail);
        }
    }

    fn allowed(&self, len: usize) -> Option<u32> {
        u32::try_from(len).ok().filter(|len| *len <= self.end.max_len())
    }

    fn run(&self, len: usize) -> Option<u32> {
        u32::try_from(len).ok().filter(|len| *len <= self.end.capacity())
    }

    fn too_long(&self, len: usize) -> RingError {
        let max = match self.mode() {
            Mode::Messages { max_len } => max_len,
            Mode::Stream => self.end.capacity(),
        };
        RingError::MessageTooLong { len, max }
    }

    fn room(&self, tail: u32) -> u32 {
        self.end.capacity() - tail.wrapping_sub(self.head)
    }

    fn has_room(&mut self, tail: u32, need: u32) -> Result<bool, RingError> {
        if self.room(tail) >= need {
            return Ok(true);
        }
        self.refresh()?;
        Ok(self.room(tail) >= need)
    }

    /// Looks at the consumer's index: it may only have moved forward, and not past what is published.
    fn refresh(&mut self) -> Result<(), RingError> {
        let head = self.end.peer_index(HEAD, "head")?;
        if head.wrapping_sub(self.head) > self.tail.wrapping_sub(self.head) {
            return Err(self.end.poison("head", head));
        }
        self.head = head;
        Ok(())
    }
}

/// Room for one message or one run of a stream. Nothing is published unless [`commit`](Self::commit) is called; octets that were not written
/// hold whatever lay there before.
#[derive(Debug)]
pub struct Reservation<'a, M: Memory> {
    producer: &'a mut Producer<M>,
    /// Octets before the payload: the length of a message, or none.
    header: u32,
    len: u32,
}

impl<M: Memory> Reservation<'_, M> {
    /// Octets set aside.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it is for an empty message or run.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `from` into the message at `offset`.
    ///
    /// # Errors
    /// [`RingError::OutOfRange`] when it would reach past the reserved length; nothing is written then.
    pub fn write_at(&mut self, offset: usize, from: &[u8]) -> Result<(), RingError> {
        let at = within(offset, from.len(), self.len)?;
        self.producer
            .end
            .copy_in(self.producer.tail.wrapping_add(self.header + at), from);
        Ok(())
    }

    /// Publishes the message or the run.
    pub fn commit(self) {
        let tail = self.producer.tail;
        if self.header == 0 {
            return self.producer.publish(tail.wrapping_add(self.len));
        }
        self.producer.end.put_length(tail, self.len);
        self.producer.publish(tail.wrapping_add(record_bytes(self.len)));
    }
}

/// Checks that `len` octets at `offset` lie inside a message of `limit` octets.
pub(crate) fn within(offset: usize, len: usize, limit: u32) -> Result<u32, RingError> {
    match offset.checked_add(len) {
        Some(end) if end <= limit as usize => Ok(offset as u32),
        _ => Err(RingError::OutOfRange { offset, len, limit }),
    }
}
