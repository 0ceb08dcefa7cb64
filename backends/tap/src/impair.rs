//! A link that loses, delays, duplicates, reorders and corrupts: a decorator around a [`PortIo`].
//!
//! It stands on the transmit side, as `netem` does. Super-frames are cut first and checksums finished, so that each
//! frame of the wire meets its own fate; a corrupted one then fails its checksum at the receiver. All draws come from one seed,
//! five per frame whatever the settings, so that the same frames at the same times meet the same fate again.
//! Time comes from a [`Clock`]: tests turn their own.
//!
//! Delayed frames leave when [`PortIo::receive`] or [`PortIo::transmit`] is called after they are due;
//! the port's descriptor becomes readable then.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use dpumesh_core::{Checksum, Error, ErrorKind, Frame, HEADROOM, PortIo, PortIoLimits, PortRef, Result};
use dpumesh_hw::wire::Segments;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};

use crate::device::{Outer, rebuild, refusal};

/// Most frames that wait for their time; beyond it the port is full.
const QUEUE: usize = 4096;

/// How long a reordered frame is held back, so that those behind it overtake.
const HOLD: Duration = Duration::from_millis(1);

/// What happens to frames on a link. The default harms nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Impairments {
    /// Start of all draws.
    pub seed: u64,
    /// Frames lost.
    pub loss: PartsPerMillion,
    /// Frames sent twice.
    pub duplicate: PartsPerMillion,
    /// Frames with one bit flipped behind their Ethernet header.
    pub corrupt: PartsPerMillion,
    /// Frames held back for a millisecond.
    pub reorder: PartsPerMillion,
    /// Delay of every frame.
    pub delay: Duration,
    /// Largest addition to the delay, uniformly distributed; frames may overtake each other.
    pub jitter: Duration,
}

/// A probability; 1,000,000 and above is always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PartsPerMillion(pub u32);

/// What a link did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImpairmentCounts {
    /// Frames that came to the link, after super-frames were cut.
    pub frames: u64,
    /// Of these, lost.
    pub lost: u64,
    /// Of these, sent twice.
    pub duplicated: u64,
    /// Of these, corrupted.
    pub corrupted: u64,
    /// Of these, held back.
    pub reordered: u64,
}

/// The time of a link, and its alarm.
pub trait Clock: Send + fmt::Debug {
    /// Time since some moment in the past.
    fn now(&self) -> Duration;

    /// Makes [`Clock::poll_fd`] readable at `at`; `None` takes the alarm back.
    fn wake_at(&mut self, at: Option<Duration>);

    /// Descriptor of the alarm; `None` when somebody turns the clock by hand.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// A [`PortIo`] whose transmitted frames meet [`Impairments`].
pub struct Impaired<C> {
    inner: Box<dyn PortIo>,
    clock: C,
    settings: Impairments,
    draws: Draws,
    queue: BinaryHeap<Reverse<Waiting>>,
    /// Due frames on their way into the port.
    leaving: Vec<Frame>,
    spare: Vec<Frame>,
    arrivals: u64,
    counts: ImpairmentCounts,
    refused: u64,
    readiness: Option<Epoll>,
}

struct Waiting {
    due: Duration,
    arrival: u64,
    frame: Frame,
}

impl<C: Clock> Impaired<C> {
    /// Puts a link with these impairments in front of `inner`.
    ///
    /// # Errors
    /// `Io` when descriptors have run out.
    pub fn new(inner: Box<dyn PortIo>, settings: Impairments, clock: C) -> Result<Self> {
        let readiness = watch(inner.as_ref(), &clock).map_err(|errno| {
            Error::new(ErrorKind::Io, "ports.impair", "no descriptor to wait on")
                .backend(crate::NAME)
                .source(errno)
        })?;
        Ok(Self {
            inner,
            clock,
            settings,
            draws: Draws(settings.seed),
            queue: BinaryHeap::new(),
            leaving: Vec::new(),
            spare: Vec::new(),
            arrivals: 0,
            counts: ImpairmentCounts::default(),
            refused: 0,
            readiness,
        })
    }

    /// What happened so far.
    pub fn counts(&self) -> ImpairmentCounts {
        self.counts
    }

    /// Frames that wait for their time.
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.leaving.len()
    }

    /// Sends what is due, and sets the alarm for the rest.
    fn flush(&mut self) -> Result<()> {
        let now = self.clock.now();
        while self.queue.peek().is_some_and(|Reverse(next)| next.due <= now) {
            let Some(Reverse(next)) = self.queue.pop() else {
                break;
            };
            self.leaving.push(next.frame);
        }
        if !self.leaving.is_empty() {
            let taken = self.inner.transmit(&mut self.leaving)?;
            self.spare.extend(self.leaving.drain(..taken));
        }
        // A full port has no alarm; it is tried again soon.
        let retry = (!self.leaving.is_empty()).then(|| now + HOLD);
        self.clock
            .wake_at(retry.or_else(|| self.queue.peek().map(|Reverse(next)| next.due)));
        Ok(())
    }

    /// One frame of the wire.
    fn meet(&mut self, mut frame: Frame) {
        let settings = self.settings;
        let [loss, duplicate, corrupt, reorder, place] = self.draws.five();
        self.counts.frames += 1;
        if settings.loss.happens(loss) {
            self.counts.lost += 1;
            self.spare.push(frame);
            return;
        }
        if settings.corrupt.happens(corrupt) && frame.len() > ETHERNET {
            self.counts.corrupted += 1;
            let bit = place as usize % ((frame.len() - ETHERNET) * 8);
            frame.octets_mut()[ETHERNET + bit / 8] ^= 1 << (bit % 8);
            frame.checksum = Checksum::Unverified;
        }
        let jitter = settings
            .jitter
            .mul_f64((place >> 40) as f64 / (1u64 << 24) as f64);
        let mut due = self.clock.now() + settings.delay + jitter;
        if settings.reorder.happens(reorder) {
            self.counts.reordered += 1;
            due += HOLD;
        }
        if settings.duplicate.happens(duplicate) {
            self.counts.duplicated += 1;
            let mut copy = self.spare_frame();
            copy.fill(frame.octets());
            copy.checksum = frame.checksum;
            self.enqueue(due, copy);
        }
        self.enqueue(due, frame);
    }

    fn enqueue(&mut self, due: Duration, frame: Frame) {
        self.arrivals += 1;
        self.queue.push(Reverse(Waiting {
            due,
            arrival: self.arrivals,
            frame,
        }));
    }

    fn spare_frame(&mut self) -> Frame {
        let capacity = self.limits().mtu.frame_len();
        self.spare
            .pop()
            .unwrap_or_else(|| Frame::with_capacity(HEADROOM, capacity))
    }

    /// Cuts a frame into frames of the wire, each of which meets its fate. False: it is malformed.
    fn cut(&mut self, frame: &mut Frame) -> bool {
        let tunnel = frame.gso.and_then(|_| Outer::parse(frame.octets()));
        match tunnel {
            Some(outer) => self.cut_tunnelled(frame, &outer),
            None => self.cut_plain(frame),
        }
    }

    fn cut_plain(&mut self, frame: &Frame) -> bool {
        let Ok(mut segments) = Segments::of(frame) else {
            return false;
        };
        loop {
            let mut piece = self.spare_frame();
            match segments.next_into(&mut piece) {
                Ok(true) => self.meet(piece),
                Ok(false) => {
                    self.spare.push(piece);
                    return true;
                }
                Err(_) => return false,
            }
        }
    }

    /// A super-frame inside VXLAN: each segment gets the outer headers anew.
    fn cut_tunnelled(&mut self, frame: &mut Frame, outer: &Outer) -> bool {
        let mut addresses = [0; 12];
        addresses.copy_from_slice(&frame.octets()[..12]);
        let Some(prefix) = outer.strip(frame) else {
            return false;
        };
        let Ok(mut segments) = Segments::of(frame) else {
            return false;
        };
        let mut datagram = vec![0; self.limits().mtu.frame_len()];
        loop {
            let run = match segments.run_into(&prefix, 1, &mut datagram) {
                Ok(Some(run)) => run,
                Ok(None) => return true,
                Err(_) => return false,
            };
            let mut piece = self.spare_frame();
            if !rebuild(
                &mut piece,
                outer.from,
                outer.remote,
                outer.class,
                &datagram[..run.octets],
            ) {
                return false;
            }
            piece.octets_mut()[..12].copy_from_slice(&addresses);
            self.meet(piece);
        }
    }
}

const ETHERNET: usize = 14;

fn watch(inner: &dyn PortIo, clock: &impl Clock) -> nix::Result<Option<Epoll>> {
    let Some(fd) = inner.poll_fd() else {
        return Ok(None);
    };
    let readiness = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    readiness.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    if let Some(alarm) = clock.poll_fd() {
        readiness.add(alarm, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
    }
    Ok(Some(readiness))
}

impl<C: Clock> PortIo for Impaired<C> {
    fn port(&self) -> PortRef {
        self.inner.port()
    }

    fn limits(&self) -> PortIoLimits {
        self.inner.limits()
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.flush()?;
        self.inner.receive(frames)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        let mut taken = 0;
        let limits = self.limits();
        for frame in frames {
            if self.waiting() >= QUEUE {
                break;
            }
            taken += 1;
            if refusal(&limits, frame).is_some() || !self.cut(frame) {
                self.refused += 1;
            }
        }
        self.flush()?;
        Ok(taken)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.readiness.as_ref().map(|readiness| readiness.0.as_fd())
    }

    fn refused(&self) -> u64 {
        self.refused + self.inner.refused()
    }
}

impl<C: fmt::Debug> fmt::Debug for Impaired<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Impaired")
            .field("inner", &self.inner)
            .field("settings", &self.settings)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl PartsPerMillion {
    fn happens(self, draw: u64) -> bool {
        draw % 1_000_000 < u64::from(self.0)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): every seed is a good one.
struct Draws(u64);

impl Draws {
    fn five(&mut self) -> [u64; 5] {
        std::array::from_fn(|_| {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        })
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.arrival).cmp(&(other.due, other.arrival))
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Waiting {}

/// The machine's monotonic clock.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
    alarm: TimerFd,
    set: Option<Duration>,
}

impl SystemClock {
    /// A clock that starts now.
    ///
    /// # Errors
    /// `Io` when descriptors have run out.
    pub fn new() -> Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let alarm = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(|errno| {
            Error::new(ErrorKind::Io, "ports.impair", "no timer")
                .backend(crate::NAME)
                .source(errno)
        })?;
        Ok(Self {
            start: Instant::now(),
            alarm,
            set: None,
        })
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn wake_at(&mut self, at: Option<Duration>) {
        if at == self.set {
            return;
        }
        self.set = at;
        // Setting or unsetting also clears an alarm that went off. A valid timer refuses neither.
        let _ = match at {
            None => self.alarm.unset(),
            Some(at) => {
                let left = at
                    .saturating_sub(self.start.elapsed())
                    .max(Duration::from_nanos(1));
                self.alarm.set(
                    Expiration::OneShot(TimeSpec::from_duration(left)),
                    TimerSetTimeFlags::empty(),
                )
            }
        };
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.alarm.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use dpumesh_core::{Gso, GsoKind, Mtu};
    use dpumesh_hw::wire::{Headers, checksum, ipv4, protocol};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[derive(Debug, Default)]
    struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);

    impl PortIo for Sink {
        fn port(&self) -> PortRef {
            PortRef::Uplink(0)
        }

        fn limits(&self) -> PortIoLimits {
            crate::device::offloading(Mtu::ETHERNET, true)
        }

        fn receive(&mut self, _: &mut [Frame]) -> Result<usize> {
            Ok(0)
        }

        fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
            self.0
                .lock()
                .expect("one thread")
                .extend(frames.iter().map(|frame| frame.octets().to_vec()));
            Ok(frames.len())
        }

        fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn refused(&self) -> u64 {
            0
        }
    }

    #[derive(Clone, Debug, Default)]
    struct Hand(Arc<AtomicU64>);

    impl Clock for Hand {
        fn now(&self) -> Duration {
            Duration::from_micros(self.0.load(Ordering::Relaxed))
        }

        fn wake_at(&mut self, _: Option<Duration>) {}

        fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }

    struct Link {
        port: Impaired<Hand>,
        hand: Hand,
        arrived: Arc<Mutex<Vec<Vec<u8>>>>,
    }

    impl Link {
        fn new(settings: Impairments) -> Self {
            let (sink, hand) = (Sink::default(), Hand::default());
            let arrived = Arc::clone(&sink.0);
            let port = Impaired::new(Box::new(sink), settings, hand.clone()).expect("made");
            Self { port, hand, arrived }
        }

        fn send(&mut self, count: u16) {
            for index in 0..count {
                let mut octets = [0; 60];
                octets[58..].copy_from_slice(&index.to_be_bytes());
                assert_eq!(
                    self.port.transmit(&mut [Frame::copy_of(&octets)]).expect("taken"),
                    1
                );
            }
        }

        fn pass(&mut self, time: Duration) {
            self.hand.0.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
            self.port.receive(&mut []).expect("flushed");
        }

        fn numbers(&self) -> Vec<u16> {
            let arrived = self.arrived.lock().expect("one thread");
            arrived
                .iter()
                .map(|octets| u16::from_be_bytes([octets[58], octets[59]]))
                .collect()
        }
    }

    const TENTH: PartsPerMillion = PartsPerMillion(100_000);

    #[test]
    fn by_default_nothing_happens() {
        let mut link = Link::new(Impairments::default());
        link.send(100);
        assert_eq!(link.numbers(), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_seed_is_a_fate() {
        let settings = |seed| Impairments {
            seed,
            loss: TENTH,
            duplicate: TENTH,
            reorder: TENTH,
            ..Impairments::default()
        };
        let run = |seed| {
            let mut link = Link::new(settings(seed));
            for _ in 0..100 {
                link.send(10);
                link.pass(Duration::from_micros(300));
            }
            link.pass(HOLD);
            (link.numbers(), link.port.counts())
        };
        let (numbers, counts) = run(1);
        assert_eq!((numbers, counts), run(1));
        assert_ne!(run(1).0, run(2).0);
        assert_eq!(counts.frames, 1000);
        for seen in [counts.lost, counts.duplicated, counts.reordered] {
            assert!((60..=140).contains(&seen), "about a tenth: {counts:?}");
        }
    }

    #[test]
    fn delayed_frames_wait_for_their_time_and_keep_their_order() {
        let delay = Duration::from_millis(20);
        let mut link = Link::new(Impairments {
            delay,
            ..Impairments::default()
        });
        link.send(3);
        link.pass(Duration::from_micros(19_999));
        assert!(link.numbers().is_empty());
        assert_eq!(link.port.waiting(), 3);
        link.pass(Duration::from_micros(1));
        assert_eq!(link.numbers(), [0, 1, 2]);
    }

    #[test]
    fn a_held_frame_is_overtaken() {
        let mut link = Link::new(Impairments {
            seed: 3,
            reorder: TENTH,
            ..Impairments::default()
        });
        link.send(50);
        link.pass(HOLD);
        let numbers = link.numbers();
        assert_eq!(numbers.len(), 50);
        assert!(!numbers.is_sorted());
    }

    #[test]
    fn a_corrupted_frame_differs_in_one_bit_and_keeps_its_addresses() {
        let mut link = Link::new(Impairments {
            corrupt: PartsPerMillion(1_000_000),
            ..Impairments::default()
        });
        link.port
            .transmit(&mut [Frame::copy_of(&[0; 60])])
            .expect("taken");
        let arrived = link.arrived.lock().expect("one thread");
        assert_eq!(arrived[0].iter().map(|octet| octet.count_ones()).sum::<u32>(), 1);
        assert_eq!(arrived[0][..ETHERNET], [0; ETHERNET]);
    }

    fn super_frame() -> Frame {
        let (source, destination) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let ip = ipv4::Repr {
            dscp: 0,
            ecn: 0,
            id: 1,
            dont_fragment: true,
            ttl: 64,
            protocol: protocol::TCP,
            source,
            destination,
            payload_len: 20 + 4000,
        };
        let mut octets = vec![2; 12];
        octets.extend([8, 0]);
        octets.extend(ip.emit());
        octets.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        octets.resize(54 + 4000, 7);
        let mut frame = Frame::copy_of(&octets);
        frame.checksum = Checksum::Partial {
            start: 34,
            offset: 16,
        };
        frame.gso = Some(Gso {
            kind: GsoKind::TcpV4,
            size: 1400,
            header_len: 54,
            ecn: false,
        });
        frame
    }

    #[test]
    fn super_frames_are_cut_first_also_inside_a_tunnel() {
        let mut link = Link::new(Impairments::default());
        link.port.transmit(&mut [super_frame()]).expect("taken");
        let inner = super_frame();
        let mut datagram = vec![8, 0, 0, 0, 0, 0, 5, 0];
        datagram.extend(inner.octets());
        let mut tunnelled = Frame::new();
        let (from, to) = (
            "192.0.2.1:5000".parse().expect("address"),
            "192.0.2.2:4789".parse().expect("address"),
        );
        assert!(rebuild(&mut tunnelled, from, to, 0, &datagram));
        tunnelled.checksum = Checksum::Partial {
            start: 84,
            offset: 16,
        };
        tunnelled.gso = Some(Gso {
            header_len: 104,
            ..inner.gso.expect("a super-frame")
        });
        link.port.transmit(&mut [tunnelled]).expect("taken");
        let arrived = link.arrived.lock().expect("one thread");
        assert_eq!(
            arrived.iter().map(Vec::len).collect::<Vec<_>>(),
            [1454, 1454, 1254, 1504, 1504, 1304]
        );
        for octets in arrived.iter() {
            let inner = if octets[23] == protocol::UDP {
                &octets[50..]
            } else {
                octets
            };
            let headers = Headers::parse(inner).expect("sound");
            assert_eq!(
                checksum::verify_octets(inner, &headers),
                checksum::Verdict::Correct
            );
        }
        assert_eq!(link.port.refused(), 0);
    }

    #[test]
    fn a_full_link_takes_no_more() {
        let mut link = Link::new(Impairments {
            delay: HOLD,
            ..Impairments::default()
        });
        let mut frames = vec![Frame::copy_of(&[0; 60]); QUEUE + 10];
        assert_eq!(link.port.transmit(&mut frames).expect("taken"), QUEUE);
        link.pass(HOLD);
        assert_eq!(link.arrived.lock().expect("one thread").len(), QUEUE);
    }

    #[test]
    fn the_system_clock_goes_off() {
        let mut clock = SystemClock::new().expect("made");
        let wait = |clock: &SystemClock, millis: u16| {
            let fd = clock.poll_fd().expect("an alarm");
            let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(millis)).expect("polled") > 0
        };
        assert!(!wait(&clock, 0));
        clock.wake_at(Some(clock.now() + Duration::from_millis(2)));
        assert!(wait(&clock, 5000));
        clock.wake_at(None);
        assert!(!wait(&clock, 0));
    }
}
