//! The engine with ports made of queues. [`Bench`] turns it by hand, [`Worker`] has a thread for it.

mod ports;
mod stages;
mod steering;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use dpumesh_core::steering::{
    Action, Cookie, Encapsulation, Group, IpMatch, IpProtocol, Masked, Owner, Pattern, Priority,
    RewriteField, SteeringRule, TcpFlags, TunnelKind,
};
use dpumesh_core::{
    Checksum, Error, ErrorKind, Frame, Gso, GsoKind, MacAddr, Mtu, PortIo, PortIoLimits, PortRef, Result, Vni,
};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::handle::{RuleChange, RulesChanged};
use super::*;
use crate::stream::IngressPort;
use crate::wire::checksum::{self, Verdict};
use crate::wire::{Headers, L3};

const POD: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const OTHER_POD: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
const GATEWAY: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xfe]);
const STACK: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x55]);
const WIRE: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
const REMOTE_WIRE: MacAddr = MacAddr([2, 0, 0, 0, 1, 2]);
const A: &str = "10.0.0.1";
const B: &str = "10.0.0.2";
const REMOTE: &str = "10.0.9.9";

/// A port made of queues; clones are the same port.
#[derive(Clone, Debug)]
struct Queues {
    port: PortRef,
    limits: PortIoLimits,
    incoming: Arc<Mutex<VecDeque<Frame>>>,
    outgoing: Arc<Mutex<Vec<Frame>>>,
    /// Frames that one batch may send.
    room: Arc<AtomicUsize>,
    broken: Arc<AtomicBool>,
    waiting: Arc<EventFd>,
}

impl Queues {
    /// A port with every offload.
    fn new(port: PortRef, mtu: u16) -> Self {
        let mut limits = PortIoLimits::plain(Mtu::try_from(mtu).expect("MTU"));
        (limits.tso, limits.uso, limits.checksum_offload) = (true, true, true);
        limits.max_frame = dpumesh_core::MAX_FRAME;
        let waiting =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("a descriptor");
        Self {
            port,
            limits,
            incoming: Arc::default(),
            outgoing: Arc::default(),
            room: Arc::new(AtomicUsize::new(usize::MAX)),
            broken: Arc::default(),
            waiting: Arc::new(waiting),
        }
    }

    fn put(&self, frame: Frame) {
        self.incoming.lock().expect("queue").push_back(frame);
        self.waiting.write(1).expect("far from its maximum");
    }

    fn sent(&self) -> Vec<Frame> {
        std::mem::take(&mut *self.outgoing.lock().expect("queue"))
    }

    fn check(&self) -> Result<()> {
        let error = || Error::new(ErrorKind::DeviceLost, "port", "pulled out");
        if self.broken.load(Ordering::Relaxed) {
            Err(error())
        } else {
            Ok(())
        }
    }
}

impl PortIo for Queues {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        self.limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.check()?;
        let mut incoming = self.incoming.lock().expect("queue");
        let count = incoming.len().min(frames.len());
        for (slot, frame) in frames.iter_mut().zip(incoming.drain(..count)) {
            *slot = frame;
        }
        if incoming.is_empty() {
            let _ = self.waiting.read(); // EAGAIN: nothing was put in since
        }
        Ok(count)
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> Result<usize> {
        self.check()?;
        let taken = frames.len().min(self.room.load(Ordering::Relaxed));
        let frames = frames[..taken].iter_mut().map(std::mem::take);
        self.outgoing.lock().expect("queue").extend(frames);
        Ok(taken)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.waiting.as_fd())
    }

    fn refused(&self) -> u64 {
        0
    }
}

/// Two pods, a stack and an uplink.
fn four_ports() -> [(Queues, PortPolicy); 4] {
    let wire = IngressPort::new(0xffff).expect("not 0");
    [
        (Queues::new(PortRef::vf(0), 1500), vf(POD, &[A], 1)),
        (Queues::new(PortRef::vf(1), 1500), vf(OTHER_POD, &[B], 2)),
        (
            Queues::new(PortRef::Stack(0), 1500),
            PortPolicy::Stack {
                mac: STACK,
                gateway: GATEWAY,
            },
        ),
        (
            Queues::new(PortRef::Uplink(0), 1500),
            PortPolicy::Uplink {
                mac: WIRE,
                ingress: wire,
            },
        ),
    ]
}

fn vf(mac: MacAddr, addresses: &[&str], ingress: u32) -> PortPolicy {
    PortPolicy::Vf {
        mac,
        addresses: addresses
            .iter()
            .map(|address| address.parse().expect("address"))
            .collect(),
        gateway: GATEWAY,
        ingress: IngressPort::new(ingress).expect("not 0"),
    }
}

/// An engine that is turned by hand.
struct Bench {
    engine: Engine,
    handle: EngineHandle,
    ports: Vec<Queues>,
    rules: u32,
}

impl Bench {
    fn new(offload: FlowOffloadLimits) -> Self {
        let mut config = EngineConfig::new(7);
        config.offload = offload;
        Self::with(&config)
    }

    fn with(config: &EngineConfig) -> Self {
        let (engine, handle) = Engine::new(config).expect("engine");
        let mut bench = Self {
            engine,
            handle,
            ports: Vec::new(),
            rules: 0,
        };
        for (queues, policy) in four_ports() {
            bench.open(queues, policy);
        }
        bench
    }

    fn open(&mut self, queues: Queues, policy: PortPolicy) {
        let port = queues.port;
        self.ports.retain(|open| open.port != port);
        self.ports.push(queues.clone());
        let handle = self.handle.clone();
        assert!(
            self.wait(async move { handle.open_port(Box::new(queues)).await })
                .expect("engine")
        );
        self.admit(port, Some(policy));
    }

    fn admit(&mut self, port: PortRef, policy: Option<PortPolicy>) {
        let handle = self.handle.clone();
        assert!(
            self.wait(async move { handle.set_policy(port, policy).await })
                .expect("engine")
        );
    }

    /// Runs a command to its end, with turns in between.
    fn wait<T>(&mut self, command: impl Future<Output = T>) -> T {
        let mut command = pin!(command);
        for _ in 0..1000 {
            if let Poll::Ready(answer) = poll(command.as_mut()) {
                return answer;
            }
            self.engine.turn();
        }
        panic!("the engine did not answer within a thousand turns");
    }

    fn rule(&mut self, priority: u32, pattern: Pattern, actions: Vec<Action>) -> u32 {
        self.rule_in(Group::default(), priority, pattern, actions)
    }

    fn rule_in(&mut self, group: Group, priority: u32, pattern: Pattern, actions: Vec<Action>) -> u32 {
        let slot = self.rules;
        self.rules += 1;
        let cookie = Cookie(u128::from(slot));
        let rule =
            SteeringRule::new(cookie, Owner::Agent, Priority(priority), pattern, actions).in_group(group);
        rule.check().expect("a sane rule");
        let change = RuleChange::Install {
            slot,
            rule: Arc::new(rule),
        };
        self.change(vec![change]).expect("accepted");
        slot
    }

    fn uninstall(&mut self, slot: u32) {
        self.change(vec![RuleChange::Uninstall { slot }])
            .expect("uninstalling is never refused");
    }

    fn change(&mut self, changes: Vec<RuleChange>) -> RulesChanged {
        let answer = self.handle.change_rules(changes).expect("engine");
        self.wait(answer).expect("engine")
    }

    fn counted(&mut self, slot: u32) -> (u64, u64) {
        let handle = self.handle.clone();
        let readings = self
            .wait(async move { handle.read_counters(vec![slot]).await })
            .expect("engine");
        readings
            .first()
            .map_or((0, 0), |(_, reading)| (reading.packets, reading.octets))
    }

    fn send(&mut self, port: PortRef, frame: Frame) {
        self.queues(port).put(frame);
        self.engine.turn();
    }

    fn sent(&self, port: PortRef) -> Vec<Frame> {
        self.queues(port).sent()
    }

    fn queues(&self, port: PortRef) -> &Queues {
        self.ports
            .iter()
            .find(|queues| queues.port == port)
            .expect("an open port")
    }

    fn stats(&mut self) -> EngineStats {
        let handle = self.handle.clone();
        self.wait(async move { handle.stats().await }).expect("engine")
    }

    fn dropped(&mut self, reason: DropReason) -> u64 {
        self.stats().drops.get(reason.as_str()).copied().unwrap_or(0)
    }
}

/// Polls a future once.
fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// An engine that runs in a thread of its own, until it is dropped.
struct Worker {
    handle: EngineHandle,
    ports: Vec<Queues>,
    thread: Option<std::thread::JoinHandle<nix::Result<()>>>,
}

impl Worker {
    async fn start(config: &EngineConfig) -> Self {
        let (engine, handle) = Engine::new(config).expect("engine");
        let thread = Some(std::thread::spawn(move || engine.run()));
        let mut ports = Vec::new();
        for (queues, policy) in four_ports() {
            ports.push(queues.clone());
            assert!(
                handle
                    .set_policy(queues.port, Some(policy))
                    .await
                    .expect("engine")
            );
            assert!(handle.open_port(Box::new(queues)).await.expect("engine"));
        }
        Self {
            handle,
            ports,
            thread,
        }
    }

    /// Puts frames in and waits until the engine has dealt with all of them.
    async fn send(&self, port: PortRef, frames: impl IntoIterator<Item = Frame>) {
        let queues = self.queues(port);
        let before = self.received(port).await;
        let mut count = 0;
        for frame in frames {
            queues.put(frame);
            count += 1;
        }
        let started = Instant::now();
        while self.received(port).await < before + count {
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "the engine does not read {port}"
            );
        }
    }

    /// Frames received by a port; those have been dealt with, since commands wait for the end of a turn.
    async fn received(&self, port: PortRef) -> u64 {
        let stats = self.handle.stats().await.expect("engine");
        stats.ports.get(&port).map_or(0, |stats| stats.rx_frames)
    }

    fn sent(&self, port: PortRef) -> Vec<Frame> {
        self.queues(port).sent()
    }

    fn queues(&self, port: PortRef) -> &Queues {
        self.ports
            .iter()
            .find(|queues| queues.port == port)
            .expect("an open port")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.handle.stop();
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking() {
            ended
                .expect("joined once")
                .expect("no panic in the worker")
                .expect("no error");
        }
    }
}

/// A TCP segment with a right checksum.
fn segment(eth_src: MacAddr, src: &str, dst: &str, ports: (u16, u16), payload: usize) -> Frame {
    let (src, dst): (IpAddr, IpAddr) = (src.parse().expect("address"), dst.parse().expect("address"));
    let mut octets = Vec::new();
    octets.extend(GATEWAY.0);
    octets.extend(eth_src.0);
    let tcp_len = 20 + payload;
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            octets.extend(0x0800_u16.to_be_bytes());
            octets.extend([0x45, 0]);
            octets.extend(((20 + tcp_len) as u16).to_be_bytes());
            octets.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
            octets.extend(src.octets());
            octets.extend(dst.octets());
            let sum = checksum::Sum::of(&octets[14..34]).checksum();
            octets[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            octets.extend(0x86dd_u16.to_be_bytes());
            octets.extend([0x60, 0, 0, 0]);
            octets.extend((tcp_len as u16).to_be_bytes());
            octets.extend([6, 64]);
            octets.extend(src.octets());
            octets.extend(dst.octets());
        }
        _ => panic!("one family"),
    }
    let l4 = octets.len();
    octets.extend(ports.0.to_be_bytes());
    octets.extend(ports.1.to_be_bytes());
    octets.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    octets.extend((0..payload).map(|at| at as u8));
    let sum = checksum::Sum::pseudo(src, dst, 6, tcp_len as u32)
        .plus(checksum::Sum::of(&octets[l4..]))
        .checksum();
    octets[l4 + 16..l4 + 18].copy_from_slice(&sum.to_be_bytes());
    let mut frame = Frame::new();
    assert!(frame.fill(&octets));
    frame
}

fn tcp() -> Pattern {
    Pattern {
        ip_proto: Some(IpProtocol::TCP),
        ..Pattern::default()
    }
}

fn from(port: PortRef) -> Pattern {
    Pattern {
        port: Some(port),
        ..Pattern::default()
    }
}

fn to(address: &str) -> Pattern {
    Pattern {
        ip_dst: Some(IpMatch::from(address.parse::<IpAddr>().expect("address"))),
        ..Pattern::default()
    }
}

fn sound(frame: &Frame) -> Headers {
    let headers = Headers::parse(frame.octets()).expect("a sound frame");
    assert_eq!(
        checksum::verify_octets(frame.octets(), &headers),
        Verdict::Correct,
        "L4 checksum"
    );
    headers
}

fn vni(id: u32) -> Vni {
    Vni::try_from(id).expect("24 bits")
}

fn tunnel() -> Encapsulation {
    Encapsulation {
        kind: TunnelKind::Vxlan,
        vni: vni(42),
        local: "192.0.2.1".parse().expect("address"),
        remote: "192.0.2.2".parse().expect("address"),
        eth_src: WIRE,
        eth_dst: REMOTE_WIRE,
    }
}
