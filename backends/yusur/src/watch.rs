//! [`Watch`]: which functions of the vendor's library somebody is in, and since when.
//!
//! Nobody can take a thread out of a function that never returns; its memory is still the library's, so it stays where it is. What can be
//! done is that the rest learns of it: one thread looks, a few times per deadline, and while a call is longer inside than that, callers
//! are answered at once instead of waiting in line behind it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// The calls that are in the library.
#[derive(Debug)]
pub(crate) struct Watch {
    inside: Mutex<Calls>,
    /// The call that hangs.
    hung: watch::Sender<Option<Hang>>,
}

#[derive(Debug, Default)]
struct Calls {
    next: u64,
    running: BTreeMap<u64, (&'static str, Instant)>,
}

/// A call that is in the library for longer than its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hang {
    /// Number of the call.
    id: u64,
    /// Which function.
    pub(crate) function: &'static str,
    /// The deadline that it missed.
    pub(crate) deadline: Duration,
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            function, deadline, ..
        } = self;
        write!(f, "the library has been in {function} for more than {deadline:?}")
    }
}

/// Somebody is in a function until this is dropped.
#[must_use]
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    watch: &'a Watch,
    id: u64,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.watch.calls().running.remove(&self.id);
    }
}

impl Watch {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            inside: Mutex::default(),
            hung: watch::Sender::new(None),
        })
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a function.
    pub(crate) fn enter(&self, function: &'static str) -> Inside<'_> {
        let mut calls = self.calls();
        let id = calls.next;
        calls.next += 1;
        calls.running.insert(id, (function, Instant::now()));
        Inside { watch: self, id }
    }

    /// The call that hangs, now and later.
    pub(crate) fn hung(&self) -> watch::Receiver<Option<Hang>> {
        self.hung.subscribe()
    }

    /// Looks who is inside at `now`; `Some` with what is new: a call that hangs, or `None` when none does any more.
    fn look(&self, now: Instant, deadline: Duration) -> Option<Option<Hang>> {
        let calls = self.calls();
        let late = |since: &Instant| now.saturating_duration_since(*since) >= deadline;
        let first = calls.running.iter().find(|(_, (_, since))| late(since));
        let hang = first.map(|(id, (function, _))| Hang {
            id: *id,
            function,
            deadline,
        });
        drop(calls);
        let is_new = self.hung.send_if_modified(|known| {
            let is_new = *known != hang;
            *known = hang;
            is_new
        });
        is_new.then_some(hang)
    }
}

/// Looks until the watch is gone, on a thread of its own, and tells of each change.
///
/// # Errors
/// The operating system gives no thread.
pub(crate) fn start(
    watch: &Arc<Watch>,
    deadline: Duration,
    mut tell: impl FnMut(Option<Hang>) + Send + 'static,
) -> std::io::Result<()> {
    let watch: Weak<Watch> = Arc::downgrade(watch);
    let pause = (deadline / 4).clamp(Duration::from_millis(1), Duration::from_secs(1));
    let looks = move || {
        while let Some(watch) = watch.upgrade() {
            if let Some(news) = watch.look(Instant::now(), deadline) {
                tell(news);
            }
            drop(watch);
            thread::sleep(pause);
        }
    };
    thread::Builder::new()
        .name("yusur-watch".to_owned())
        .spawn(looks)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(4);

    #[test]
    fn a_call_hangs_from_its_deadline_until_it_returns() {
        let watch = Watch::new();
        let begun = Instant::now();
        let inside = watch.enter("entries_write");
        assert_eq!(watch.look(begun + Duration::from_secs(3), DEADLINE), None);
        let later = begun + Duration::from_secs(5);
        let news = watch.look(later, DEADLINE).expect("news").expect("it hangs");
        assert_eq!((news.function, news.deadline), ("entries_write", DEADLINE));
        assert_eq!(watch.look(later, DEADLINE), None, "that is known");
        assert_eq!(*watch.hung().borrow(), Some(news));
        drop(inside);
        assert_eq!(watch.look(later, DEADLINE), Some(None));
        assert_eq!(*watch.hung().borrow(), None);
    }

    #[test]
    fn another_call_that_hangs_after_the_first_is_news() {
        let watch = Watch::new();
        let later = Instant::now() + Duration::from_secs(9);
        let (first, _second) = (watch.enter("limits"), watch.enter("wait"));
        let function = |news: Option<Option<Hang>>| news.flatten().map(|hang| hang.function);
        assert_eq!(function(watch.look(later, DEADLINE)), Some("limits"));
        drop(first);
        assert_eq!(function(watch.look(later, DEADLINE)), Some("wait"));
    }
}
