//! The read buffer of one direction: a head stays where it is while the body behind it comes and goes.
//!
//! ```text
//! 0 ........ floor ...... start ===== end ...... capacity
//!   head       free         unread       free
//! ```

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// Capacity of a fresh buffer, octets.
pub const FRESH: usize = 16 * 1024;

/// Room kept behind a head for the body, octets.
const BODY_ROOM: usize = 8 * 1024;

/// Capacity of a fresh small buffer, octets: one of many that a single client can have.
const SMALL: usize = 2 * 1024;

/// A read buffer.
#[derive(Debug, Default)]
pub struct Buffer {
    data: Vec<u8>,
    floor: usize,
    start: usize,
    end: usize,
    small: bool,
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
    /// A buffer that begins small and grows for a head only.
    pub fn small() -> Self {
        Self {
            small: true,
            ..Self::default()
        }
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
        if self.data.len() > if self.small { SMALL } else { 2 * FRESH } {
            self.data = Vec::new();
        }
    }

    /// Makes the buffer at least `capacity` octets, unless it is a small one.
    pub fn grow(&mut self, capacity: usize) {
        if self.data.len() < capacity && !self.small {
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
        self.make_room();
        let mut room = ReadBuf::new(&mut self.data[self.end..]);
        ready!(Pin::new(stream).poll_read(cx, &mut room))?;
        let n = room.filled().len();
        self.end += n;
        Poll::Ready(Ok(n))
    }

    fn make_room(&mut self) {
        if self.data.is_empty() {
            self.data.resize(if self.small { SMALL } else { FRESH }, 0);
        }
        let body_room = if self.small { SMALL / 2 } else { BODY_ROOM };
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
