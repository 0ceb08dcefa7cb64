//! The read buffer of one direction: a head stays where it is while the body behind it comes and goes.
//!
//! ```text
//! 0 ........ floor ...... start ===== end ...... capacity
//!   head       free         unread       free
//! ```

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// Capacity of a fresh buffer, octets.
pub const FRESH: usize = 16 * 1024;

/// Room kept behind a head for the body, octets.
const BODY_ROOM: usize = 8 * 1024;

/// Capacity of a fresh small buffer, octets: one of many that a single client can have.
const SMALL: usize = 2 * 1024;

/// Capacity for a long body, octets, and how much of it passes before it is one.
const LONG_BODY: usize = 64 * 1024;

/// Octets that the small buffers of one client may have beyond their size, all together.
const BEYOND: usize = 256 * 1024;

/// A read buffer.
#[derive(Debug, Default)]
pub struct Buffer {
    data: Vec<u8>,
    floor: usize,
    start: usize,
    end: usize,
    small: Option<Small>,
}

/// What the small buffers of one client may still have beyond their size.
#[derive(Debug, Clone)]
pub struct Allowance(Rc<Cell<usize>>);

impl Default for Allowance {
    fn default() -> Self {
        Self(Rc::new(Cell::new(BEYOND)))
    }
}

/// What makes a buffer small.
#[derive(Debug)]
struct Small {
    allowance: Allowance,
    taken: usize,
}

impl Small {
    fn take(&mut self, octets: usize) -> bool {
        let left = self.allowance.0.get().checked_sub(octets);
        if let Some(left) = left {
            self.allowance.0.set(left);
            self.taken += octets;
        }
        left.is_some()
    }

    fn give_back(&mut self) {
        let Allowance(left) = &self.allowance;
        left.set(left.get() + std::mem::take(&mut self.taken));
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl From<&[u8]> for Buffer {
    /// These octets, unread.
    fn from(unread: &[u8]) -> Self {
        Self {
            data: unread.to_vec(),
            end: unread.len(),
            ..Self::default()
        }
    }
}

impl Buffer {
    /// Makes this empty buffer one of many that a single client can have: it begins small, and grows for a head, and for a body within
    /// what the client is allowed.
    pub fn make_small(&mut self, allowance: Allowance) {
        self.small = Some(Small { allowance, taken: 0 });
    }

    /// The octets not yet taken.
    #[inline]
    pub fn unread(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    /// The octets not yet taken, to be changed in place.
    #[inline]
    pub fn unread_mut(&mut self) -> &mut [u8] {
        &mut self.data[self.start..self.end]
    }

    /// Whether nothing is unread.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Takes `n` octets off the front.
    #[inline]
    pub fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
    }

    /// The octets `0..floor`: the head that was kept.
    #[inline]
    pub fn head(&self) -> &[u8] {
        &self.data[..self.floor]
    }

    /// Keeps the first `n` unread octets (they begin the buffer) as the head. Call after [`Self::rewind`].
    pub fn keep_head(&mut self, n: usize) {
        self.start += n;
        self.floor = self.start;
    }

    /// Puts octets behind the head, and keeps them with it; where they begin.
    pub fn extend_head(&mut self, octets: &[u8]) -> usize {
        let (at, grown) = (self.floor, self.floor + octets.len());
        if self.start < grown {
            let unread = self.end - self.start;
            if self.data.len() < grown + unread {
                self.data.resize(grown + unread, 0);
            }
            self.data.copy_within(self.start..self.end, grown);
            (self.start, self.end) = (grown, grown + unread);
        }
        self.data[at..grown].copy_from_slice(octets);
        self.floor = grown;
        at
    }

    /// Forgets the head and moves what is unread to the front.
    pub fn rewind(&mut self) {
        self.floor = 0;
        if self.start > 0 {
            self.data.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// Forgets everything; keeps the memory unless it has grown.
    pub fn clear(&mut self) {
        (self.floor, self.start, self.end) = (0, 0, 0);
        let kept = if self.small.is_some() { SMALL } else { 2 * FRESH };
        if self.data.len() > kept {
            self.data = Vec::new();
        }
        if let Some(small) = &mut self.small {
            small.give_back();
        }
    }

    /// Grows for a body of which so many octets have passed, if it is a long one.
    pub fn grow_for(&mut self, passed: u64) {
        let capacity = match passed {
            _ if passed > LONG_BODY as u64 => LONG_BODY,
            _ if passed > BODY_ROOM as u64 => FRESH,
            _ => return,
        };
        let more = capacity.saturating_sub(self.data.len());
        if more > 0 && self.small.as_mut().is_none_or(|small| small.take(more)) {
            self.data.resize(capacity, 0);
        }
    }

    /// Reads once. `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// The connection's.
    pub fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<usize>> {
        if self.small.is_some() && self.data.is_empty() {
            return self.poll_first_fill(cx, stream);
        }
        self.make_room();
        let mut room = ReadBuf::new(&mut self.data[self.end..]);
        ready!(Pin::new(stream).poll_read(cx, &mut room))?;
        let n = room.filled().len();
        self.end += n;
        Poll::Ready(Ok(n))
    }

    /// A small buffer has no memory before there is something to put into it: one client can have many that wait.
    fn poll_first_fill<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<usize>> {
        let mut room = [MaybeUninit::uninit(); SMALL];
        let mut room = ReadBuf::uninit(&mut room);
        ready!(Pin::new(stream).poll_read(cx, &mut room))?;
        let n = room.filled().len();
        if n > 0 {
            self.data.reserve_exact(SMALL);
            self.data.extend_from_slice(room.filled());
            self.data.resize(SMALL, 0);
            self.end = n;
        }
        Poll::Ready(Ok(n))
    }

    fn make_room(&mut self) {
        if self.data.is_empty() {
            self.data.resize(FRESH, 0);
        }
        let body_room = match &self.small {
            Some(small) if small.taken == 0 => SMALL / 2,
            _ => BODY_ROOM,
        };
        if self.start == self.end {
            (self.start, self.end) = (self.floor, self.floor);
        }
        if self.end == self.data.len() || (self.start == self.end && self.data.len() - self.floor < body_room)
        {
            if self.start > self.floor {
                self.data.copy_within(self.start..self.end, self.floor);
                self.end -= self.start - self.floor;
                self.start = self.floor;
            } else {
                let doubled = self.data.len() * 2;
                self.data.resize(doubled, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    fn small(allowance: &Allowance) -> Buffer {
        let mut buffer = Buffer::default();
        buffer.make_small(allowance.clone());
        buffer
    }

    #[test]
    fn small_buffers_grow_within_what_is_allowed() {
        let allowance = Allowance::default();
        let mut buffers: Vec<Buffer> = (0..100).map(|_| small(&allowance)).collect();
        let grown = |buffers: &mut [Buffer]| {
            buffers.iter_mut().for_each(|buffer| buffer.grow_for(10_000));
            buffers.iter().filter(|buffer| buffer.data.len() == FRESH).count()
        };
        assert_eq!(grown(&mut buffers), BEYOND / FRESH);
        buffers[0].grow_for(LONG_BODY as u64 + 1);
        assert_eq!(buffers[0].data.len(), FRESH, "nothing is left");
        buffers[0].clear();
        buffers.remove(1);
        assert_eq!((buffers[0].data.len(), allowance.0.get()), (0, 2 * FRESH));
        assert_eq!(grown(&mut buffers), BEYOND / FRESH);
        drop(buffers);
        assert_eq!(allowance.0.get(), BEYOND);
    }

    #[tokio::test]
    async fn a_small_buffer_that_waits_has_no_memory() {
        let (mut writer, mut reader) = tokio::io::duplex(64);
        let mut buffer = small(&Allowance::default());
        let fill = |buffer: &mut Buffer, reader: &mut _| {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            buffer.poll_fill(&mut cx, reader)
        };
        assert!(fill(&mut buffer, &mut reader).is_pending());
        assert_eq!(buffer.data.capacity(), 0);
        for octets in [b"head".as_slice(), b"body"] {
            writer.write_all(octets).await.unwrap();
            assert!(matches!(fill(&mut buffer, &mut reader), Poll::Ready(Ok(4))));
        }
        assert_eq!(
            (buffer.unread(), buffer.data.len()),
            (b"headbody".as_slice(), SMALL)
        );
        drop(writer);
        assert!(matches!(fill(&mut buffer, &mut reader), Poll::Ready(Ok(0))));
    }

    #[test]
    fn a_head_that_grows_leaves_what_is_unread() {
        for consumed in [0, 2, 20] {
            let mut buffer = Buffer::from(b"headbody of twenty octets".as_slice());
            buffer.keep_head(4);
            buffer.consume(consumed);
            let left = buffer.unread().to_vec();
            let (first, second) = (buffer.extend_head(b"+line"), buffer.extend_head(b"+another"));
            assert_eq!((first, second), (4, 9));
            assert_eq!(buffer.head(), b"head+line+another");
            assert_eq!(buffer.unread(), left);
        }
    }
}
