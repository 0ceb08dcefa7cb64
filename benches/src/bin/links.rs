//! One TCP stream through the dataplane, side by side with a veth pair in the same run.
//!
//! ```text
//! veth       client ── veth ── server
//! plain      client ─VF─► engine ─VF─► server                  the pods' kernels cut and sum every packet
//! offloads   client ─VF─► engine ─VF─► server                  super-frames, checksums left open
//! overlay    client ─VF─► engine ─► VXLAN ── veth ─► engine ─VF─► server
//! ```
//! MTU 1500 (pods of the overlay 1450), cubic, writes of 16 KiB, forwarding rules only, no proxy. Each engine is a thread of
//! this process, everything is in anonymous namespaces that end with it. Rounds are interleaved and a ratio is taken
//! within its round, so that what disturbs the machine disturbs both sides; printed are medians with the median absolute
//! deviation, once with all threads on one processor and once with none bound.
//!
//! `--smoke` runs one short round, `--json FILE` writes the figures as JSON as well.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dpumesh_core::steering::{
    Action, Atomicity, Batch, Cookie, Encapsulation, Group, IpMatch, IpProtocol, Operation, Owner, Pattern,
    Priority, RewriteField, SteeringRule, TunnelKind,
};
use dpumesh_core::{Epoch, Fence, FlowSteering, MacAddr, Mtu, PortIo, PortRef, Vni};
use dpumesh_hw::dataplane::{
    Engine, EngineConfig, EngineHandle, PortPolicy, SoftSteering, software_capabilities,
};
use dpumesh_hw::events::EventHub;
use dpumesh_hw::netlink::{Address, LinkChange, Netlink, VethEnd};
use dpumesh_hw::netns::{self, Namespace};
use dpumesh_hw::stream::IngressPort;
use dpumesh_tap::device::{TapPort, UdpUplink, create_tap};
use ipnet::IpNet;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::runtime::Runtime;

const MTU: u16 = 1500;
/// Octets of Ethernet, IPv4, UDP and VXLAN headers around a packet of the overlay, less the inner Ethernet header's place.
const ENCAPSULATION: u16 = 50;
const WRITE: usize = 16 << 10;
const GATEWAY: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xfe]);
const UPLINK: PortRef = PortRef::Uplink(0);
/// Where packets out of the tunnel are classified.
const INNER: Group = Group(1);
const FENCE: Fence = Fence(Epoch(1));
const VTEPS: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
/// Longest wait for a peer.
const PATIENCE: Duration = Duration::from_secs(20);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("links: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let options = Options::read(std::env::args().skip(1))?;
    netns::ensure_privilege()?;
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/net/tun") {
        println!("SKIP links: /dev/net/tun does not open ({error})");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let paths = [
        Path::veth()?,
        Path::one_engine(&runtime, "plain", false)?,
        Path::one_engine(&runtime, "offloads", true)?,
        Path::overlay(&runtime)?,
    ];
    for path in &paths {
        path.transfer(Pinning::Free, Duration::from_millis(50))
            .map_err(|error| format!("{}: {error}", path.name))?;
    }
    let pinnings = [Pinning::OneCore, Pinning::Free];
    let mut results = pinnings.map(|pinning| (pinning, Rounds::default()));
    for _ in 0..options.rounds {
        for (pinning, rounds) in &mut results {
            for path in &paths {
                let measured = path.transfer(*pinning, options.each)?;
                rounds.0.entry(path.name).or_default().push(measured);
            }
        }
    }
    let drops: BTreeMap<&str, BTreeMap<String, u64>> = paths
        .iter()
        .map(|path| Ok((path.name, path.drops(&runtime)?)))
        .collect::<Result<_>>()?;
    print(&results, &options, &drops);
    if let Some(file) = &options.json {
        fs::write(file, format!("{:#}\n", as_json(&results, &options, &drops)))?;
    }
    Ok(())
}

struct Options {
    rounds: usize,
    each: Duration,
    json: Option<PathBuf>,
}

impl Options {
    fn read(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            rounds: 7,
            each: Duration::from_secs(1),
            json: None,
        };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--smoke" => (options.rounds, options.each) = (1, Duration::from_millis(200)),
                "--json" => options.json = Some(arguments.next().ok_or("--json needs a file")?.into()),
                other => {
                    return Err(
                        format!("unknown argument {other}; there are --smoke and --json FILE").into(),
                    );
                }
            }
        }
        Ok(options)
    }
}

// ---- what is compared ----

/// A way from one pod to another.
struct Path {
    name: &'static str,
    client: Namespace,
    server: Namespace,
    to: IpAddr,
    engines: Vec<Worker>,
    /// Where the engines' uplinks are.
    _socs: Vec<Namespace>,
}

impl Path {
    fn veth() -> Result<Self> {
        let [client, server] = [Namespace::create()?, Namespace::create()?];
        join(&client, &server)?;
        for (number, namespace) in [&client, &server].into_iter().enumerate() {
            configure(namespace, WIRE, MTU, pod_address(number), 24)?;
        }
        Ok(Self {
            name: "veth",
            client,
            server,
            to: pod_address(1).into(),
            engines: Vec::new(),
            _socs: Vec::new(),
        })
    }

    fn one_engine(runtime: &Runtime, name: &'static str, offloads: bool) -> Result<Self> {
        let engine = Worker::start(name)?;
        let pods = [Pod::new(0, MTU, offloads)?, Pod::new(1, MTU, offloads)?];
        let rules = [0, 1].map(|number| pods[number].delivery(Group::default(), None));
        let [client, server] = pods;
        let namespaces = [client.namespace.try_clone()?, server.namespace.try_clone()?];
        runtime.block_on(async {
            engine.add_pod(client).await?;
            engine.add_pod(server).await?;
            engine.install(rules.into()).await
        })?;
        let [client, server] = namespaces;
        Ok(Self {
            name,
            client,
            server,
            to: pod_address(1).into(),
            engines: vec![engine],
            _socs: Vec::new(),
        })
    }

    fn overlay(runtime: &Runtime) -> Result<Self> {
        let socs = [Namespace::create()?, Namespace::create()?];
        join(&socs[0], &socs[1])?;
        let vni = Vni::try_from(42)?;
        let (mut engines, mut namespaces) = (Vec::new(), Vec::new());
        for (here, soc) in socs.iter().enumerate() {
            configure(soc, WIRE, MTU, VTEPS[here], 24)?;
            let engine = Worker::start(&format!("overlay-{here}"))?;
            let pod = Pod::new(here, MTU - ENCAPSULATION, true)?;
            namespaces.push(pod.namespace.try_clone()?);
            let rules = vec![
                departure(here, vni),
                arrival(here),
                pod.delivery(INNER, Some(vni)),
            ];
            let uplink = UdpUplink::bind(UPLINK, soc, VTEPS[here].into(), Mtu::try_from(MTU)?)?;
            let policy = PortPolicy::Uplink {
                mac: UdpUplink::mac_of(VTEPS[here].into()),
                ingress: ingress(100)?,
            };
            runtime.block_on(async {
                engine.add_pod(pod).await?;
                engine.open(Box::new(uplink), policy).await?;
                engine.install(rules).await
            })?;
            engines.push(engine);
        }
        let [server, client] =
            [namespaces.pop(), namespaces.pop()].map(|namespace| namespace.ok_or("two pods"));
        let to = pod_address(1).into();
        Ok(Self {
            name: "overlay",
            client: client?,
            server: server?,
            to,
            engines,
            _socs: socs.into(),
        })
    }

    /// Sends for `each` and waits until all of it has come.
    fn transfer(&self, pinning: Pinning, each: Duration) -> Result<Measured> {
        for engine in &self.engines {
            pinning.apply(engine.thread_id)?;
        }
        let listener = self
            .server
            .run(|| TcpListener::bind(SocketAddr::new(self.to, 0)))??;
        let address = listener.local_addr()?;
        let receiver = thread::spawn(move || receive(&listener, pinning));
        let client = self.client.run(|| connect(address))??;
        let cpu = self.cpu()?;
        let sender = thread::spawn(move || send(client, pinning, each));
        let (began, sent) = sender.join().map_err(|_| "the sender panicked")??;
        let (ended, received) = receiver.join().map_err(|_| "the receiver panicked")??;
        if sent != received {
            return Err(format!("{received} octets arrived of {sent}").into());
        }
        let octets = received as f64;
        Ok(Measured {
            gigabits: octets * 8.0 / ended.duration_since(began).as_secs_f64() / 1e9,
            micros_per_megabyte: (self.cpu()? - cpu).as_secs_f64() * 1e6 / (octets / 1e6),
        })
    }

    /// CPU time of the engines.
    fn cpu(&self) -> Result<Duration> {
        self.engines.iter().map(Worker::cpu).sum()
    }

    fn drops(&self, runtime: &Runtime) -> Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        for engine in &self.engines {
            for (reason, count) in runtime.block_on(engine.handle.stats())?.drops {
                *all.entry(reason.to_string()).or_default() += count;
            }
        }
        Ok(all)
    }
}

/// An engine on a thread of its own, until it is dropped.
struct Worker {
    handle: EngineHandle,
    steering: SoftSteering,
    thread_id: Pid,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(name: &str) -> Result<Self> {
        let (engine, handle) = Engine::new(&EngineConfig::new(0x5eed_0123_4567_89ab))?;
        let limits = software_capabilities(1 << 10);
        let steering = SoftSteering::new("links", handle.clone(), limits, FENCE.0, EventHub::default());
        let (tell, told) = mpsc::channel();
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            let _ = tell.send(gettid()); // the starter waits for it
            if let Err(error) = engine.run() {
                eprintln!("links: engine: {error}");
            }
        })?;
        Ok(Self {
            handle,
            steering,
            thread_id: told.recv()?,
            thread: Some(thread),
        })
    }

    async fn open(&self, io: Box<dyn PortIo>, policy: PortPolicy) -> Result<()> {
        let admitted = self.handle.set_policy(io.port(), Some(policy)).await?;
        if !(admitted && self.handle.open_port(io).await?) {
            return Err("the engine refuses a port".into());
        }
        Ok(())
    }

    async fn add_pod(&self, pod: Pod) -> Result<()> {
        let policy = PortPolicy::Vf {
            mac: pod.mac,
            addresses: vec![pod.address.into()],
            gateway: GATEWAY,
            ingress: ingress(pod.number as u32 + 1)?,
        };
        self.open(Box::new(pod.io), policy).await
    }

    async fn install(&self, rules: Vec<SteeringRule>) -> Result<()> {
        let operations = rules.into_iter().map(Operation::Add).collect();
        let batch = Batch::new(operations).with(Atomicity::Atomic);
        self.steering.apply(FENCE, &batch).await?.into_result()?;
        Ok(())
    }

    fn cpu(&self) -> Result<Duration> {
        let file = format!("/proc/self/task/{}/schedstat", self.thread_id);
        let text = fs::read_to_string(file)?;
        let nanoseconds = text.split_whitespace().next().ok_or("schedstat is empty")?;
        Ok(Duration::from_nanos(nanoseconds.parse()?))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.handle.stop();
        let _ = self.thread.take().map(JoinHandle::join); // a panic was printed where it happened
    }
}

/// A pod with its VF.
struct Pod {
    number: usize,
    namespace: Namespace,
    address: Ipv4Addr,
    mac: MacAddr,
    io: TapPort,
}

impl Pod {
    fn new(number: usize, mtu: u16, offloads: bool) -> Result<Self> {
        let (namespace, address) = (Namespace::create()?, pod_address(number));
        create_tap(&namespace, VF)?;
        let mut io = TapPort::attach(PortRef::vf(number as u16), &namespace, VF, Mtu::try_from(mtu)?)?;
        if !offloads {
            io.withdraw_offloads()?;
        }
        configure(&namespace, VF, mtu, address, 24)?;
        let mac = Netlink::open_in(&namespace)?
            .link(VF)?
            .mac
            .ok_or("a TAP has a MAC")?;
        Ok(Self {
            number,
            namespace,
            address,
            mac: MacAddr(mac),
            io,
        })
    }

    /// The rule by which packets to this pod reach it, out of a tunnel or not.
    fn delivery(&self, group: Group, vni: Option<Vni>) -> SteeringRule {
        let pattern = Pattern {
            vni,
            ip_dst: Some(IpMatch::from(IpAddr::V4(self.address))),
            ..Pattern::default()
        };
        let actions = vec![
            Action::Count,
            Action::Rewrite(RewriteField::EthSrc(GATEWAY)),
            Action::Rewrite(RewriteField::EthDst(self.mac)),
            Action::Forward(PortRef::vf(self.number as u16)),
        ];
        rule(self.number as u128, pattern, actions).in_group(group)
    }
}

/// The rule by which packets to the other node's pod get there.
fn departure(here: usize, vni: Vni) -> SteeringRule {
    let there = 1 - here;
    let outer = Encapsulation {
        kind: TunnelKind::Vxlan,
        vni,
        local: VTEPS[here].into(),
        remote: VTEPS[there].into(),
        eth_src: GATEWAY,
        eth_dst: GATEWAY,
    };
    let pattern = Pattern {
        ip_dst: Some(IpMatch::from(IpAddr::V4(pod_address(there)))),
        ..Pattern::default()
    };
    rule(
        10,
        pattern,
        vec![Action::Count, Action::Encapsulate(outer), Action::Forward(UPLINK)],
    )
}

/// The rule by which packets from the network leave their tunnel.
fn arrival(here: usize) -> SteeringRule {
    let pattern = Pattern {
        port: Some(UPLINK),
        ip_proto: Some(IpProtocol::UDP),
        l4_dst: Some(4789.into()),
        ip_dst: Some(IpMatch::from(IpAddr::V4(VTEPS[here]))),
        ..Pattern::default()
    };
    rule(
        11,
        pattern,
        vec![
            Action::Count,
            Action::Decapsulate(TunnelKind::Vxlan),
            Action::Jump(INNER),
        ],
    )
}

fn rule(cookie: u128, pattern: Pattern, actions: Vec<Action>) -> SteeringRule {
    SteeringRule::new(
        Cookie(cookie),
        Owner::Agent,
        Priority(cookie as u32),
        pattern,
        actions,
    )
}

fn ingress(number: u32) -> Result<IngressPort> {
    Ok(IngressPort::new(number).ok_or("an ingress number is not 0")?)
}

fn pod_address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 0, number as u8 + 1)
}

/// Name of a pod's interface.
const VF: &str = "vf0";
/// Name of a veth end.
const WIRE: &str = "wire0";

fn join(near: &Namespace, far: &Namespace) -> Result<()> {
    let ends = [near, far].map(|namespace| VethEnd::new(WIRE).in_namespace(namespace).mtu(MTU.into()));
    Ok(Netlink::open_in(near)?.create_veth(&ends[0], &ends[1])?)
}

fn configure(namespace: &Namespace, name: &str, mtu: u16, address: Ipv4Addr, length: u8) -> Result<()> {
    let mut netlink = Netlink::open_in(namespace)?;
    let link = netlink.link(name)?.index;
    netlink.change_link(link, &LinkChange::new().mtu(mtu.into()).up())?;
    Ok(netlink.add_address(&Address {
        link,
        net: IpNet::new(address.into(), length)?,
    })?)
}

// ---- traffic ----

/// Where the threads of a transfer run: sender, receiver and engines.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pinning {
    OneCore,
    Free,
}

impl Pinning {
    fn apply(self, thread: Pid) -> Result<()> {
        let mut processors = CpuSet::new();
        let count = match self {
            Self::OneCore => 1,
            Self::Free => CpuSet::count(),
        };
        for processor in 0..count {
            processors.set(processor)?;
        }
        Ok(sched_setaffinity(thread, &processors)?)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::OneCore => "one core",
            Self::Free => "free",
        }
    }
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_tcp_congestion(b"cubic")?;
    socket.connect_timeout(&address.into(), PATIENCE)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

fn send(mut stream: TcpStream, pinning: Pinning, each: Duration) -> Result<(Instant, u64)> {
    pinning.apply(Pid::from_raw(0))?;
    let (octets, began) = ([0x5a; WRITE], Instant::now());
    let mut sent = 0;
    while began.elapsed() < each {
        stream.write_all(&octets)?;
        sent += WRITE as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    Ok((began, sent))
}

fn receive(listener: &TcpListener, pinning: Pinning) -> Result<(Instant, u64)> {
    pinning.apply(Pid::from_raw(0))?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut buffer, mut received) = (vec![0; 1 << 17], 0);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok((Instant::now(), received)),
            Ok(count) => received += count as u64,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

// ---- figures ----

/// One transfer.
#[derive(Clone, Copy)]
struct Measured {
    /// Gigabits per second.
    gigabits: f64,
    /// Microseconds of the engines' CPU per megabyte.
    micros_per_megabyte: f64,
}

/// Transfers of each path, in the order of the rounds.
#[derive(Default)]
struct Rounds(BTreeMap<&'static str, Vec<Measured>>);

/// What shall be how many times what.
struct Bar {
    path: &'static str,
    beside: &'static str,
    at_least: f64,
    aim: Option<f64>,
}

const PATHS: [&str; 4] = ["veth", "plain", "offloads", "overlay"];

const BARS: [Bar; 3] = [
    Bar {
        path: "offloads",
        beside: "veth",
        at_least: 0.5,
        aim: None,
    },
    Bar {
        path: "offloads",
        beside: "plain",
        at_least: 4.0,
        aim: None,
    },
    Bar {
        path: "overlay",
        beside: "offloads",
        at_least: 0.25,
        aim: Some(0.5),
    },
];

/// Median and median absolute deviation.
#[derive(Clone, Copy)]
struct Figure {
    median: f64,
    spread: f64,
}

impl Figure {
    fn of(values: &[f64]) -> Self {
        let middle = median(values.to_vec());
        Self {
            median: middle,
            spread: median(values.iter().map(|value| (value - middle).abs()).collect()),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Rounds {
    fn gigabits(&self, path: &str) -> Vec<f64> {
        self.0[path].iter().map(|measured| measured.gigabits).collect()
    }

    fn cpu(&self, path: &str) -> Figure {
        let all: Vec<f64> = self.0[path]
            .iter()
            .map(|measured| measured.micros_per_megabyte)
            .collect();
        Figure::of(&all)
    }

    fn ratio(&self, bar: &Bar) -> Figure {
        let pairs = self.gigabits(bar.path).into_iter().zip(self.gigabits(bar.beside));
        Figure::of(&pairs.map(|(path, beside)| path / beside).collect::<Vec<_>>())
    }
}

type Drops<'a> = BTreeMap<&'a str, BTreeMap<String, u64>>;

fn print(results: &[(Pinning, Rounds)], options: &Options, drops: &Drops<'_>) {
    println!(
        "One TCP stream, MTU {MTU}, cubic, writes of {WRITE} octets; {}",
        environment()
    );
    println!("{} rounds of {} ms", options.rounds, options.each.as_millis());
    for (pinning, rounds) in results {
        println!(
            "\n{:<10} {:>9} {:>7} {:>17}",
            pinning.name(),
            "Gb/s",
            "±",
            "engine CPU µs/MB"
        );
        for path in PATHS {
            let (speed, cpu) = (Figure::of(&rounds.gigabits(path)), rounds.cpu(path));
            println!(
                "{path:<10} {:>9.2} {:>7.2} {:>17.0}",
                speed.median, speed.spread, cpu.median
            );
        }
        for bar in &BARS {
            let ratio = rounds.ratio(bar);
            let verdict = if ratio.median >= bar.at_least {
                "met"
            } else {
                "MISSED"
            };
            let aim = bar.aim.map(|aim| format!(", aim {aim}")).unwrap_or_default();
            println!(
                "{} / {}: {:.2} ± {:.2} (at least {}{aim}: {verdict})",
                bar.path, bar.beside, ratio.median, ratio.spread, bar.at_least
            );
        }
    }
    println!("\ndropped by the engines: {drops:?}");
}

fn as_json(results: &[(Pinning, Rounds)], options: &Options, drops: &Drops<'_>) -> Value {
    let pinnings = results.iter().map(|(pinning, rounds)| {
        let paths = PATHS.map(|path| {
            let speed = Figure::of(&rounds.gigabits(path));
            json!({"name": path, "gigabits_per_second": speed.median, "spread": speed.spread,
                "engine_cpu_us_per_megabyte": rounds.cpu(path).median})
        });
        let ratios = BARS.each_ref().map(|bar| {
            let ratio = rounds.ratio(bar);
            json!({"path": bar.path, "beside": bar.beside, "ratio": ratio.median, "spread": ratio.spread,
                "at_least": bar.at_least, "aim": bar.aim, "met": ratio.median >= bar.at_least})
        });
        json!({"pinning": pinning.name(), "paths": paths, "ratios": ratios})
    });
    json!({"environment": environment(), "mtu": MTU, "write_octets": WRITE, "rounds": options.rounds,
        "milliseconds_each": options.each.as_millis() as u64, "pinnings": pinnings.collect::<Vec<_>>(), "drops": drops})
}

fn environment() -> String {
    let read = |file: &str| {
        fs::read_to_string(file)
            .unwrap_or_else(|_| "unknown".into())
            .trim()
            .to_owned()
    };
    let processors = thread::available_parallelism().map_or(0, usize::from);
    format!(
        "kernel {}, {processors} processors, default congestion control {}, halt polling {} ns, load {}",
        read("/proc/sys/kernel/osrelease"),
        read("/proc/sys/net/ipv4/tcp_congestion_control"),
        read("/sys/module/haltpoll/parameters/guest_halt_poll_ns"),
        read("/proc/loadavg"),
    )
}
