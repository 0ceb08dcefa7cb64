//! The dataplane alone, in memory: 64-octet frames from a port, through parse, lookup, act and a queue, to a port that
//! takes everything. How many million frames a second one core forwards when it knows the flows and when every frame
//! is a new one, and how many rule updates a second it takes while it forwards.
//!
//! Receiving copies 64 octets and writes the flow's source port, transmitting is free: what is left is the engine.
//! Nothing is pinned, so compare figures of one run only.

use std::hint::black_box;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dpumesh_core::steering::{
    Action, Atomicity, Batch, Cookie, IpMatch, IpProtocol, Operation, Owner, Pattern, Priority, SteeringRule,
};
use dpumesh_core::{
    Epoch, Fence, FlowSteering, Frame, MacAddr, Mtu, PortIo, PortIoLimits, PortRef, Result as CardResult,
};
use dpumesh_hw::dataplane::{Engine, EngineConfig, PortPolicy, SoftSteering, software_capabilities};
use dpumesh_hw::events::EventHub;
use dpumesh_hw::stream::IngressPort;
use ipnet::IpNet;

const POD: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const OTHER_POD: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
const GATEWAY: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xfe]);
const FENCE: Fence = Fence(Epoch(1));
/// Rules beside the one that forwards, on eight shapes of pattern.
const RULES: u16 = 1000;
/// Flows that a pass over all source ports makes.
const FLOWS: u64 = 1 << 16;
/// Frames of one measurement: some milliseconds, and less than a pass over all flows.
const WINDOW: u64 = 1 << 15;

/// A source of TCP segments whose source port counts through `flows` values, and a sink.
#[derive(Debug)]
struct Generator {
    port: PortRef,
    flows: u32,
    next: u32,
    idle: bool,
}

/// From pod 10.0.0.1 to pod 10.0.0.2, port 80: Ethernet, IPv4, TCP and 10 octets, 64 in all.
const SEGMENT: [u8; 64] = {
    let mut octets = [0; 64];
    let headers = [
        2, 0, 0, 0, 0, 0xfe, 2, 0, 0, 0, 0, 1, 8, 0, // Ethernet
        0x45, 0, 0, 50, 0, 1, 0x40, 0, 64, 6, 0x26, 0xc3, 10, 0, 0, 1, 10, 0, 0, 2, // IPv4
        0, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0, // TCP
    ];
    let mut at = 0;
    while at < headers.len() {
        octets[at] = headers[at];
        at += 1;
    }
    octets
};

impl PortIo for Generator {
    fn port(&self) -> PortRef {
        self.port
    }

    fn limits(&self) -> PortIoLimits {
        let mut limits = PortIoLimits::plain(Mtu::ETHERNET);
        (limits.checksum_offload, limits.tso, limits.uso) = (true, true, true);
        limits
    }

    fn receive(&mut self, frames: &mut [Frame]) -> CardResult<usize> {
        if self.idle {
            return Ok(0);
        }
        for frame in &mut *frames {
            frame.fill(&SEGMENT);
            frame.octets_mut()[34..36].copy_from_slice(&(self.next as u16).to_be_bytes());
            self.next = if self.next + 1 == self.flows {
                0
            } else {
                self.next + 1
            };
        }
        Ok(frames.len())
    }

    fn transmit(&mut self, frames: &mut [Frame]) -> CardResult<usize> {
        black_box(&mut *frames);
        Ok(frames.len())
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn refused(&self) -> u64 {
        0
    }
}

/// An engine that forwards what pod 0 sends to pod 1, with a thousand other rules on eight shapes of pattern.
struct Node {
    engine: Engine,
    steering: SoftSteering,
}

impl Node {
    /// `flows` different source ports, one after the other.
    fn new(flows: u32) -> Self {
        let mut config = EngineConfig::new(0x5eed_0123_4567_89ab);
        config.flows = 2 * FLOWS as u32;
        let (mut engine, handle) = Engine::new(&config).expect("an engine");
        let limits = software_capabilities(1 << 17);
        let steering = SoftSteering::new("bench", handle.clone(), limits, FENCE.0, EventHub::default());
        let vf = |mac, address: [u8; 4], ingress| PortPolicy::Vf {
            mac,
            addresses: vec![IpAddr::from(address)],
            gateway: GATEWAY,
            ingress: IngressPort::new(ingress).expect("not 0"),
        };
        drive(&mut engine, async {
            let rules = (0..RULES)
                .map(other_rule)
                .chain([forwarding_rule()])
                .map(Operation::Add)
                .collect();
            apply(&steering, rules).await;
            for (port, policy) in [
                (1, vf(OTHER_POD, [10, 0, 0, 2], 2)),
                (0, vf(POD, [10, 0, 0, 1], 1)),
            ] {
                let generator = Generator {
                    port: PortRef::vf(port),
                    flows,
                    next: 0,
                    idle: port == 1,
                };
                assert!(
                    handle
                        .set_policy(PortRef::vf(port), Some(policy))
                        .await
                        .expect("engine")
                );
                assert!(handle.open_port(Box::new(generator)).await.expect("engine"));
            }
        });
        let mut node = Self { engine, steering };
        node.forward(1);
        let stats = drive(&mut node.engine, handle.stats()).expect("engine");
        assert!(
            stats.ports[&PortRef::vf(1)].tx_frames > 0 && stats.drops.is_empty(),
            "not forwarded: {stats:?}"
        );
        node
    }

    /// Forwards at least `frames` and returns how many.
    fn forward(&mut self, frames: u64) -> u64 {
        let mut forwarded = 0;
        while forwarded < frames {
            forwarded += self.engine.turn() as u64;
        }
        forwarded
    }

    /// Seconds per frame over one window.
    fn window(&mut self) -> f64 {
        let started = Instant::now();
        let forwarded = self.forward(WINDOW);
        started.elapsed().as_secs_f64() / forwarded as f64
    }

    /// Forgets all flows, by a rule that comes and goes.
    fn forget(&mut self) {
        let rule = other_rule(RULES);
        let (owner, cookie) = (rule.owner, rule.cookie);
        let there_and_away = vec![Operation::Add(rule), Operation::Remove { owner, cookie }];
        drive(&mut self.engine, apply(&self.steering, there_and_away));
    }
}

/// Runs a call of the engine's handle in the engine's own thread.
fn drive<T>(engine: &mut Engine, call: impl Future<Output = T>) -> T {
    let mut call = pin!(call);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(answer) = call.as_mut().poll(&mut context) {
            return answer;
        }
        engine.turn();
    }
}

async fn apply(steering: &SoftSteering, operations: Vec<Operation>) {
    let batch = Batch::new(operations).with(Atomicity::Atomic);
    let outcome = steering.apply(FENCE, &batch).await.expect("a live engine");
    outcome.into_result().expect("room for every rule");
}

fn forwarding_rule() -> SteeringRule {
    let pattern = Pattern {
        port: Some(PortRef::vf(0)),
        ip_proto: Some(IpProtocol::TCP),
        ..to([10, 0, 0, 0], 24)
    };
    let actions = vec![Action::Count, Action::Forward(PortRef::vf(1))];
    SteeringRule::new(
        Cookie(u128::MAX),
        Owner::Agent,
        Priority(50_000),
        pattern,
        actions,
    )
}

/// A rule that the frames do not match, in front of the one that they match.
fn other_rule(number: u16) -> SteeringRule {
    let [high, low] = number.to_be_bytes();
    let tcp = Some(IpProtocol::TCP);
    let pattern = match number % 8 {
        0 => to([172, 16, high, low], 32),
        1 => Pattern {
            ip_proto: tcp,
            ..to([172, 17, high, low], 32)
        },
        2 => Pattern {
            port: Some(PortRef::vf(2)),
            ..to([172, 18, high, low], 32)
        },
        3 => Pattern {
            ip_proto: tcp,
            l4_dst: Some(8080.into()),
            ..to([172, 19, high, low], 32)
        },
        4 => Pattern {
            ip_src: Some(prefix([172, 20, high, low], 32)),
            ..Pattern::default()
        },
        5 => Pattern {
            ip_proto: tcp,
            l4_dst: Some(number.into()),
            l4_src: Some(1.into()),
            ..Pattern::default()
        },
        6 => to([172 + high, low, 0, 0], 16),
        _ => Pattern {
            port: Some(PortRef::vf(2)),
            ip_proto: tcp,
            ..to([172, high, low, 0], 24)
        },
    };
    SteeringRule::new(
        Cookie(number.into()),
        Owner::Agent,
        Priority(number.into()),
        pattern,
        vec![Action::Drop],
    )
}

fn to(address: [u8; 4], length: u8) -> Pattern {
    Pattern {
        ip_dst: Some(prefix(address, length)),
        ..Pattern::default()
    }
}

fn prefix(address: [u8; 4], length: u8) -> IpMatch {
    IpNet::new(address.into(), length)
        .expect("at most 32 bits")
        .into()
}

/// Seconds per frame, of flows that the table knows, in each of `windows` windows.
fn hits(windows: usize) -> Vec<f64> {
    let mut node = Node::new(1024);
    node.forward(WINDOW);
    (0..windows).map(|_| node.window()).collect()
}

/// Seconds per frame, each its flow's first, in each of `windows` windows.
fn misses(windows: usize) -> Vec<f64> {
    let mut node = Node::new(FLOWS as u32);
    node.forward(FLOWS);
    let mut window = || {
        node.forget();
        node.window()
    };
    (0..windows).map(|_| window()).collect()
}

/// Time that `frames` frames take, by windows.
fn time(frames: u64, run: fn(usize) -> Vec<f64>) -> Duration {
    let windows = run(frames.div_ceil(WINDOW) as usize);
    let mean = windows.iter().sum::<f64>() / windows.len() as f64;
    Duration::from_secs_f64(mean * frames as f64)
}

/// Time for `count` rule updates, `batch` at a time, while another thread forwards; and how many frames it forwarded.
fn updates(count: u64, batch: u16) -> (Duration, u64) {
    let Node { mut engine, steering } = Node::new(1024);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let (ready, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let forwarding = scope.spawn(|| {
            let mut forwarded = 0;
            while !ended.load(Ordering::Relaxed) {
                forwarded += engine.turn() as u64;
                ready.store(true, Ordering::Relaxed);
            }
            forwarded
        });
        while !ready.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        let started = Instant::now();
        runtime.block_on(async {
            let add: Vec<_> = (0..batch)
                .map(|n| Operation::Add(other_rule(RULES + n)))
                .collect();
            let remove = (0..batch).map(|n| other_rule(RULES + n));
            let remove: Vec<_> = remove
                .map(|r| Operation::Remove {
                    owner: r.owner,
                    cookie: r.cookie,
                })
                .collect();
            for _ in 0..count.div_ceil(2 * u64::from(batch)) {
                apply(&steering, add.clone()).await;
                apply(&steering, remove.clone()).await;
            }
        });
        let time = started.elapsed();
        ended.store(true, Ordering::Relaxed);
        (time, forwarding.join().expect("the worker ends"))
    })
}

/// The figures in the units of their bars: the best and the middle of many short windows, for others may be using the
/// machine.
fn bars(_: &mut Criterion) {
    let rates = |run: fn(usize) -> Vec<f64>| {
        let mut windows = run(200);
        windows.sort_by(f64::total_cmp);
        [windows[0], windows[windows.len() / 2]].map(|seconds| 1e-6 / seconds)
    };
    for (name, run) in [("hit", hits as fn(usize) -> Vec<f64>), ("miss", misses)] {
        let [best, middle] = rates(run);
        println!("64-octet frames, one core, {name}: best {best:.1} Mpps, median {middle:.1} Mpps");
    }
    for batch in [1, 16, 256] {
        const COUNT: u64 = 40_000;
        let (time, frames) = updates(COUNT, batch);
        println!(
            "rule updates in batches of {batch}: {:.0} k/s while forwarding {:.1} Mpps",
            COUNT as f64 / time.as_secs_f64() / 1e3,
            frames as f64 / time.as_secs_f64() / 1e6,
        );
    }
}

fn figures(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dataplane");
    group.sample_size(10).throughput(Throughput::Elements(1));
    group.bench_function("frame_hit", |bencher| {
        bencher.iter_custom(|frames| time(frames, hits))
    });
    group.bench_function("frame_miss", |bencher| {
        bencher.iter_custom(|frames| time(frames, misses))
    });
    group.bench_function("rule_update_in_256", |bencher| {
        bencher.iter_custom(|count| updates(count, 256).0)
    });
    group.finish();
}

criterion_group!(benches, bars, figures);
criterion_main!(benches);
