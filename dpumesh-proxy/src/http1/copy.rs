//! A copy of a body on its way to somebody who is never waited for.
//!
//! The writer belongs to the message that is copied, the reader to whoever sends the copy, on the same thread. Octets
//! that the reader has not fetched are bounded: where they would be more, the copy is cut, and the reader learns that it
//! will not be whole.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The end that octets go in by.
#[derive(Debug)]
pub(super) struct Writer {
    to: Option<UnboundedSender<Part>>,
    waiting: Rc<Cell<usize>>,
    most: usize,
}

/// The end that octets come out of.
#[derive(Debug)]
pub(super) struct Reader {
    from: UnboundedReceiver<Part>,
    waiting: Rc<Cell<usize>>,
}

#[derive(Debug)]
enum Part {
    Octets(Vec<u8>),
    End,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// More of it.
    Octets(Vec<u8>),
    /// That was all.
    End,
    /// There will be no more, though that was not all.
    Cut,
}

/// A copy of which at most `most` octets may wait.
pub(super) fn copy(most: usize) -> (Writer, Reader) {
    let (to, from) = unbounded_channel();
    let waiting = Rc::default();
    let writer = Writer {
        to: Some(to),
        waiting: Rc::clone(&waiting),
        most,
    };
    (writer, Reader { from, waiting })
}

impl Writer {
    /// Copies `data`, or cuts the copy if the reader is too far behind.
    pub(super) fn put(&mut self, data: &[u8]) {
        let waiting = self.waiting.get() + data.len();
        if waiting > self.most {
            self.to = None;
        }
        let sent = self.to.as_ref().map(|to| to.send(Part::Octets(data.to_vec())));
        match sent {
            Some(Ok(())) => self.waiting.set(waiting),
            _ => self.to = None,
        }
    }

    /// Says that this was all.
    pub(super) fn end(self) {
        if let Some(to) = self.to {
            // A reader that is gone needs no end.
            let _ = to.send(Part::End);
        }
    }
}

impl Reader {
    /// The next piece.
    pub(super) async fn next(&mut self) -> Piece {
        match self.from.recv().await {
            Some(Part::Octets(octets)) => {
                self.waiting.set(self.waiting.get() - octets.len());
                Piece::Octets(octets)
            }
            Some(Part::End) => Piece::End,
            None => Piece::Cut,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_copy_is_whole_or_is_known_not_to_be() {
        let (mut writer, mut reader) = copy(10);
        writer.put(b"12345");
        writer.put(b"67890");
        assert_eq!(reader.next().await, Piece::Octets(b"12345".to_vec()));
        writer.put(b"abcde");
        writer.end();
        assert_eq!(reader.next().await, Piece::Octets(b"67890".to_vec()));
        assert_eq!(reader.next().await, Piece::Octets(b"abcde".to_vec()));
        assert_eq!(reader.next().await, Piece::End);

        let (mut writer, mut reader) = copy(10);
        writer.put(b"12345");
        writer.put(b"678901");
        writer.put(b"1");
        writer.end();
        assert_eq!(reader.next().await, Piece::Octets(b"12345".to_vec()));
        assert_eq!(reader.next().await, Piece::Cut);

        let (writer, mut reader) = copy(10);
        drop(writer);
        assert_eq!(reader.next().await, Piece::Cut);
    }
}
