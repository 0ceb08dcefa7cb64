//! [`Backlog`]: what the streams of a crowded connection have handed over and the client has not taken, bounded for all of them together.
//!
//! `h2` bounds what waits by stream: a hundred streams, each with a window as large as it likes, make a hundred times that of a
//! client that reads nothing. Here the octets of a connection are counted until `h2` drops them, written or given up.

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

/// Octets that may wait; what is handed over while fewer do may go beyond it once.
const MOST: usize = 128 * 1024;

/// Streams that wait for room go on when so few are left: not for each piece that leaves.
const FEW: usize = MOST / 2;

/// Octets of one connection that wait to be written.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    // One thread does it all; `Bytes` asks for what any thread could drop.
    octets: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
}

/// Counted until it is dropped.
struct Piece {
    octets: Vec<u8>,
    backlog: Arc<Backlog>,
}

impl Backlog {
    /// Ready when more may be handed over.
    pub(super) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.octets.load(Relaxed) < MOST {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// A copy of `octets` that counts as long as it is there.
    pub(super) fn hold(self: &Arc<Self>, octets: &[u8]) -> Bytes {
        self.octets.fetch_add(octets.len(), Relaxed);
        Bytes::from_owner(Piece {
            octets: octets.to_vec(),
            backlog: Arc::clone(self),
        })
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.octets
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let n = self.octets.len();
        let before = self.backlog.octets.fetch_sub(n, Relaxed);
        if before >= FEW && before - n < FEW {
            let waiting = &self.backlog.waiting;
            let woken = mem::take(&mut *waiting.lock().unwrap_or_else(PoisonError::into_inner));
            woken.into_iter().for_each(Waker::wake);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn who_waits_is_woken_once_when_little_is_left() {
        let backlog = Arc::new(Backlog::default());
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        let mut held = Vec::new();
        while backlog.poll_room(&mut cx).is_ready() {
            held.push(backlog.hold(&[7; 16 * 1024]));
        }
        assert_eq!(held.len(), MOST / (16 * 1024));
        assert!(backlog.poll_room(&mut cx).is_pending());
        while backlog.octets.load(Relaxed) > FEW {
            held.pop();
            assert_eq!(woken.0.load(Relaxed), 0);
        }
        // What remains of a piece keeps the whole of it counted.
        let last = held.pop().unwrap();
        let rest = last.slice(1..);
        drop(last);
        assert_eq!(woken.0.load(Relaxed), 0);
        drop(rest);
        assert_eq!(woken.0.load(Relaxed), 1);
        drop(held);
        assert_eq!((woken.0.load(Relaxed), backlog.octets.load(Relaxed)), (1, 0));
        assert!(backlog.poll_room(&mut cx).is_ready());
    }
}
