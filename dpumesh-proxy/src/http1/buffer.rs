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
