//! Pods take turns: however many connections one has, another's requests wait for a few of its, not for all of them.
//!
//! In each round every pod may begin [`SOME`] requests; what is more waits in the pod's own queue. A round ends when everything that was
//! ready has run and the sockets have been looked at again, so nothing waits while there is nothing else to do. Of
//! one worker, like all it counts.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use dpumesh_hw::stream::IngressPort;

/// Requests that a pod may begin in a round.
const SOME: u32 = 16;

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Pod {
    /// The dataplane's port that a connection came in by.
    Port(IngressPort),
    /// The pod's address, where there is no dataplane before the proxy.
    Address(IpAddr),
}

/// One worker's turns.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    pods: RefCell<HashMap<Pod, Weak<Turn>>>,
    /// Pods with requests that wait, each once.
    queue: RefCell<VecDeque<Rc<Turn>>>,
    round: Cell<u64>,
    /// There is a task that ends rounds.
    turning: Cell<bool>,
}

/// One pod's turns.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    round: Cell<u64>,
    taken: Cell<u32>,
    waiting: RefCell<VecDeque<Rc<Ticket>>>,
}

#[derive(Debug, Default)]
struct Ticket {
    called: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Turns {
    /// The turns of a pod, for as long as one of its connections has them.
    pub(crate) fn of(&self, pod: Pod) -> Rc<Turn> {
        let mut pods = self.pods.borrow_mut();
        if let Some(turn) = pods.get(&pod).and_then(Weak::upgrade) {
            return turn;
        }
        if pods.len() == pods.capacity() {
            // Room is made of pods that are gone before more is taken.
            pods.retain(|_, turn| turn.strong_count() > 0);
        }
        let turn = Rc::default();
        pods.insert(pod, Rc::downgrade(&turn));
        turn
    }

    /// Waits until the pod may begin another request.
    pub(crate) async fn take(self: &Rc<Self>, turn: &Rc<Turn>) {
        if turn.round.get() != self.round.get() {
            turn.round.set(self.round.get());
            turn.taken.set(0);
        }
        if turn.taken.get() < SOME && turn.waiting.borrow().is_empty() {
            turn.taken.set(turn.taken.get() + 1);
            return;
        }
        let ticket = Rc::new(Ticket::default());
        {
            let mut waiting = turn.waiting.borrow_mut();
            if waiting.is_empty() {
                self.queue.borrow_mut().push_back(Rc::clone(turn));
            }
            waiting.push_back(Rc::clone(&ticket));
        }
        if !self.turning.replace(true) {
            tokio::task::spawn_local(Rc::clone(self).turn_round());
        }
        poll_fn(|cx| {
            if ticket.called.get() {
                return Poll::Ready(());
            }
            *ticket.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Ends rounds while requests wait.
    async fn turn_round(self: Rc<Self>) {
        loop {
            // Behind everything that is ready, and behind a look at the sockets.
            tokio::task::yield_now().await;
            self.next_round();
            if self.queue.borrow().is_empty() {
                self.turning.set(false);
                return;
            }
        }
    }

    fn next_round(&self) {
        let round = self.round.get() + 1;
        self.round.set(round);
        let pods = self.queue.take();
        for turn in pods {
            let mut waiting = turn.waiting.borrow_mut();
            let called = waiting.len().min(SOME as usize);
            for ticket in waiting.drain(..called) {
                ticket.called.set(true);
                if let Some(waker) = ticket.waker.take() {
                    waker.wake();
                }
            }
            turn.round.set(round);
            turn.taken.set(called as u32);
            let left = !waiting.is_empty();
            drop(waiting);
            if left {
                self.queue.borrow_mut().push_back(turn);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;

    fn pod(number: u8) -> Pod {
        Pod::Address(IpAddr::from([10, 0, 0, number]))
    }

    #[test]
    fn a_quiet_pod_waits_for_a_few_requests_of_a_noisy_one() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let order = LocalSet::new().block_on(&runtime, async {
            let turns: Rc<Turns> = Rc::default();
            let order: Rc<RefCell<Vec<u8>>> = Rc::default();
            let ask = |number: u8| {
                let (turns, order) = (Rc::clone(&turns), Rc::clone(&order));
                let turn = turns.of(pod(number));
                tokio::task::spawn_local(async move {
                    turns.take(&turn).await;
                    order.borrow_mut().push(number);
                })
            };
            let noisy: Vec<_> = (0..1000).map(|_| ask(1)).collect();
            let quiet = ask(2);
            for one in noisy {
                one.await.unwrap();
            }
            quiet.await.unwrap();
            order.take()
        });
        assert_eq!(order.len(), 1001, "everybody has had a turn");
        let at = order.iter().position(|number| *number == 2).unwrap();
        assert!(at <= 2 * SOME as usize, "the quiet one came after {at}");
    }

    #[test]
    fn what_is_given_up_holds_nobody_up() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let turns: Rc<Turns> = Rc::default();
            let turn = turns.of(pod(1));
            let begin = || {
                let (turns, turn) = (Rc::clone(&turns), Rc::clone(&turn));
                tokio::task::spawn_local(async move { turns.take(&turn).await })
            };
            let all: Vec<_> = (0..100).map(|_| begin()).collect();
            tokio::task::yield_now().await;
            all.iter().skip(20).step_by(2).for_each(|one| one.abort());
            for one in all {
                // Given up, or done.
                let _ = one.await;
            }
            assert!(Rc::ptr_eq(&turn, &turns.of(pod(1))));
            begin().await.unwrap();
        });
    }

    #[test]
    fn pods_that_are_gone_are_forgotten() {
        let turns = Turns::default();
        for round in 0..10_000u32 {
            turns.of(Pod::Address(IpAddr::from(round.to_be_bytes())));
        }
        assert!(turns.pods.borrow().len() < 100);
    }
}
