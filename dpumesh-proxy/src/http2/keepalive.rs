//! `connection_keepalive`: PINGs that find a connection whose other end is gone.
//!
//! A PING goes out every interval; when neither its answer nor any other octet comes within the timeout, the connection is given up.

use std::cell::Cell;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::Instant;

use crate::alarm::Alarm;

/// `KeepaliveSettings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Between a PING and the one before.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// The most that is added to an interval, in thousandths of it.
    pub jitter: u32,
}

impl Settings {
    fn pause(&self) -> Duration {
        let thousandths = if self.jitter == 0 {
            0
        } else {
            fastrand::u32(..=self.jitter)
        };
        self.interval + self.interval.saturating_mul(thousandths) / 1000
    }
}

/// Octets that have come by a connection: any of them says that the other end is there.
pub type Heard = Rc<Cell<u64>>;

/// The PINGs of one connection.
#[derive(Debug)]
pub(super) struct Keepalive {
    settings: Settings,
    pings: PingPong,
    heard: Heard,
    alarm: Alarm,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The next PING is due then.
    Until(Instant),
    /// One is out; if nothing more than so many octets has come by then, nobody is there.
    Out(Instant, u64),
}

impl Keepalive {
    pub(super) fn new(settings: Settings, pings: PingPong, heard: Heard) -> Self {
        Self {
            settings,
            pings,
            heard,
            alarm: Alarm::default(),
            state: State::Until(Instant::now() + settings.pause()),
        }
    }

    /// Ready when the other end is gone. Polled by the task that drives the connection.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.state {
                State::Until(due) => {
                    if self.alarm.poll(cx, Some(due)).is_pending() {
                        return Poll::Pending;
                    }
                    if self.pings.send_ping(Ping::opaque()).is_err() {
                        // The connection ends, and says so itself.
                        return Poll::Pending;
                    }
                    self.state = State::Out(Instant::now() + self.settings.timeout, self.heard.get());
                }
                State::Out(due, before) => {
                    match self.pings.poll_pong(cx) {
                        Poll::Ready(Ok(_)) => {
                            self.state = State::Until(Instant::now() + self.settings.pause());
                            continue;
                        }
                        Poll::Ready(Err(_)) => return Poll::Pending,
                        Poll::Pending => {}
                    }
                    if self.alarm.poll(cx, Some(due)).is_pending() {
                        return Poll::Pending;
                    }
                    let heard = self.heard.get();
                    if heard == before {
                        return Poll::Ready(());
                    }
                    self.state = State::Out(Instant::now() + self.settings.timeout, heard);
                }
            }
        }
    }
}
