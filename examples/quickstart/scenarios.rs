//! What the two nodes have to show, one scenario each: traffic that programs in pods see, and what was counted or captured
//! beside it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use dpumesh_cni::rules::{self, GATEWAY};
use dpumesh_core::steering::{
    Action, Atomicity, Batch, Cookie, IpMatch, Operation, Owner, Pattern, Placement, Priority, SteeringRule,
};
use dpumesh_core::{Fence, FlowSteering};
use dpumesh_examples::capture::{Capture, Frame};
use dpumesh_examples::children::{Process, Run};
use dpumesh_examples::workload::http_client::Summary;
use dpumesh_examples::workload::spoof::Spoofed;
use dpumesh_examples::workload::tcp::{Connected, Outcome, Sent};
use dpumesh_examples::workload::udp::Answers;
use dpumesh_examples::workload::{self, READY};
use dpumesh_hw::channel::Dataplane;
use dpumesh_hw::netns::Namespace;
use serde::de::DeserializeOwned;

use super::faults::ways_around;
use super::mesh::{HTTP_PORT, SERVICE_PORT, TCP_PORT, http_service, tcp_service};
use super::node::{Nodes, POD_INTERFACE, Result, RunningPod, WIRE};
use super::security;

/// Longest that a client may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// UDP port that is open between pods, and one that is not.
pub(crate) const OPEN_UDP: u16 = 7;
const CLOSED_UDP: u16 = 4000;
/// What the TCP scenario sends.
const BULK: u64 = 100_000_000;

/// The nodes with the servers in their pods.
pub(crate) struct World {
    pub(crate) run: Arc<Run>,
    // Ended before the nodes they run in.
    servers: Vec<Process>,
    pub(crate) nodes: Nodes,
}

/// A scenario: its name and how it is played.
pub(crate) type Scenario = (&'static str, fn(&mut World) -> Result<String>);

/// All of them, in order.
pub(crate) const ALL: &[Scenario] = &[
    ("HTTP on one node", same_node),
    ("HTTP across nodes", across_nodes),
    ("90/10 split", split),
    ("route by header", header_route),
    ("timeout", timeout),
    ("dead and missing endpoints", dead_endpoints),
    ("mTLS across nodes", security::mutual_tls),
    ("authorization denied", security::authorization),
    ("retry", security::retry),
    ("certificates renewed under load", security::renewal),
    ("100 MB over TCP, byte-exact", bulk),
    ("IPv6", ipv6),
    ("spoofed frames", spoofed),
    ("no way around the proxy", no_way_around),
    ("UDP, ICMP and DNS by rule", without_proxy),
    ("hardware table full", table_full),
    ("a pod leaves and another comes", pod_comes_and_goes),
];

impl World {
    /// Starts a server of each kind in every pod.
    pub(crate) fn new(nodes: Nodes, run: Arc<Run>) -> Result<Self> {
        let mut servers = Vec::new();
        for running in nodes.all.iter().flat_map(|node| &node.pods) {
            servers.extend(start_servers(&run, running)?);
        }
        Ok(Self { run, servers, nodes })
    }

    /// The servers in the pods.
    pub(crate) fn servers(&self) -> impl Iterator<Item = &Process> {
        self.servers.iter()
    }

    /// The pod from which clients ask: the first of the first node.
    pub(crate) fn client(&self) -> &RunningPod {
        self.nodes.pod(0, 0)
    }

    /// Runs a client in a pod and reads its result.
    pub(crate) fn play<T: DeserializeOwned>(&self, pod: &Namespace, arguments: &[&str]) -> Result<T> {
        let command = workload::command(arguments.iter().copied().chain(["--json"]));
        Ok(Process::json(&self.run, arguments[0], pod, command, PATIENCE)?)
    }

    /// Asks the HTTP service from the client pod.
    pub(crate) fn get(&self, host: &str, count: u64, more: &[&str]) -> Result<Summary> {
        self.get_from(self.client(), false, host, count, more)
    }

    pub(crate) fn get_from(
        &self,
        pod: &RunningPod,
        ipv6: bool,
        host: &str,
        count: u64,
        more: &[&str],
    ) -> Result<Summary> {
        let address = SocketAddr::new(http_service(ipv6), SERVICE_PORT).to_string();
        let count = count.to_string();
        let mut arguments = vec!["http-get", &address, "--host", host, "--count", &count];
        arguments.extend(more);
        self.play(&pod.namespace, &arguments)
    }

    pub(crate) fn drops(&self, node: usize, reason: &str) -> Result<u64> {
        let node = &self.nodes.all[node];
        let stats = node.ask(node.client.stats())?;
        Ok(stats.drops.get(reason).copied().unwrap_or(0))
    }

    pub(crate) fn counted(&self, node: usize, cookie: Cookie) -> Result<u64> {
        let node = &self.nodes.all[node];
        let cookies = [cookie];
        let counters = node.ask(node.client.counters(Owner::Agent, &cookies))?;
        Ok(counters
            .first()
            .copied()
            .flatten()
            .map_or(0, |counters| counters.packets))
    }
}

fn start_servers(run: &Run, running: &RunningPod) -> Result<Vec<Process>> {
    let name = &running.pod.name;
    let mut servers = Vec::new();
    for address in &running.pod.addresses {
        let at = |port| SocketAddr::new(*address, port).to_string();
        let roles = [
            vec!["http-server".to_owned(), at(HTTP_PORT), name.clone()],
            vec!["tcp-sink".to_owned(), at(TCP_PORT)],
            vec!["udp-echo".to_owned(), at(OPEN_UDP)],
        ];
        for role in roles {
            let title = format!("{} in {name}", role[0]);
            let mut server = Process::start(run, &title, &running.namespace, workload::command(&role))?;
            server.wait_for_line(READY, PATIENCE)?;
            servers.push(server);
        }
    }
    Ok(servers)
}

/// Fails with `message` unless it holds.
pub(crate) fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(message().into()) }
}

/// Every request was answered with 200 by `server`, which saw the client's own address.
pub(crate) fn all_from(
    summary: &Summary,
    count: u64,
    server: &RunningPod,
    client: &RunningPod,
) -> Result<()> {
    let ok = summary.statuses.get(&200).copied() == Some(count);
    let by = summary.served_by.get(&server.pod.name).copied() == Some(count);
    let sees = summary.seen_as.keys().all(|seen| {
        seen.parse::<IpAddr>()
            .is_ok_and(|seen| client.pod.addresses.contains(&seen.to_canonical()))
    });
    ensure(ok && by && sees, || {
        format!(
            "{count} requests: statuses {:?}, errors {:?}, served by {:?}, client seen as {:?}",
            summary.statuses, summary.errors, summary.served_by, summary.seen_as
        )
    })
}

fn same_node(world: &mut World) -> Result<String> {
    let (client, server) = (world.client(), world.nodes.pod(0, 1));
    let punted = world.counted(0, rules::intercept(&client.pod))?;
    let summary = world.get("local", 200, &[])?;
    all_from(&summary, 200, server, client)?;
    let punted = world.counted(0, rules::intercept(&client.pod))? - punted;
    ensure(punted >= 200, || {
        format!("only {punted} packets of the client went to the proxy")
    })?;
    Ok(format!(
        "200 of 200 from {}, which saw the client's own address; p50 {:.0} µs",
        server.pod.name, summary.latency_us.p50
    ))
}

fn across_nodes(world: &mut World) -> Result<String> {
    let overlay = world.nodes.plan.overlay;
    let capture = Capture::start(&world.nodes.all[0].own.soc, WIRE, |_| true)?;
    let summary = world.get("remote", 200, &[])?;
    let captured = capture.stop()?;
    let (client, server) = (world.client(), world.nodes.pod(1, 1));
    all_from(&summary, 200, server, client)?;
    let pods: BTreeSet<IpAddr> = client
        .pod
        .addresses
        .iter()
        .chain(&server.pod.addresses)
        .copied()
        .collect();
    let inside = captured.count(|frame| {
        frame
            .encapsulated()
            .is_some_and(|(vni, inner)| vni == 42 && between(&pods, inner.source, inner.destination))
    });
    let plain = captured.count(|frame| {
        frame
            .datagram()
            .is_some_and(|outer| between(&pods, outer.source, outer.destination))
    });
    ensure(captured.lost == 0, || {
        format!("the capture lost {} frames", captured.lost)
    })?;
    let as_planned = if overlay {
        inside > 0 && plain == 0
    } else {
        plain > 0 && inside == 0
    };
    ensure(as_planned, || {
        format!("on the wire: {inside} packets in VXLAN, {plain} without")
    })?;
    let how = if overlay {
        format!("{inside} packets in VXLAN 42, none without")
    } else {
        format!("{plain} packets as they are")
    };
    Ok(format!(
        "200 of 200 from {}; on the wire {how}; p50 {:.0} µs",
        server.pod.name, summary.latency_us.p50
    ))
}

fn between(pods: &BTreeSet<IpAddr>, source: IpAddr, destination: IpAddr) -> bool {
    pods.contains(&source) && pods.contains(&destination)
}

fn split(world: &mut World) -> Result<String> {
    let summary = world.get("split", 2000, &["--connections", "8"])?;
    let served = |pod: &RunningPod| summary.served_by.get(&pod.pod.name).copied().unwrap_or(0);
    let (many, few) = (served(world.nodes.pod(0, 1)), served(world.nodes.pod(1, 1)));
    // 2000 draws at 10 %: five standard deviations are 67.
    ensure(many + few == 2000 && few.abs_diff(200) <= 67, || {
        format!("{many} to {few}, errors {:?}", summary.errors)
    })?;
    Ok(format!("{many} to {few} of 2000"))
}

fn header_route(world: &mut World) -> Result<String> {
    let summary = world.get("split", 100, &["--header", "x-version: 2"])?;
    all_from(&summary, 100, world.nodes.pod(1, 1), world.client())?;
    Ok(format!(
        "x-version: 2 went to {}, 100 of 100",
        world.nodes.pod(1, 1).pod.name
    ))
}

fn timeout(world: &mut World) -> Result<String> {
    let summary = world.get("slow", 3, &["--path", "/slow?ms=2000"])?;
    let refused = summary.statuses.get(&504).copied() == Some(3);
    ensure(refused && summary.latency_us.max < 1_000_000.0, || {
        format!(
            "statuses {:?}, errors {:?}, slowest {:.0} µs",
            summary.statuses, summary.errors, summary.latency_us.max
        )
    })?;
    Ok(format!(
        "504 after {:.0} ms; the route allows 200",
        summary.latency_us.p50 / 1000.0
    ))
}

fn dead_endpoints(world: &mut World) -> Result<String> {
    for host in ["dead", "nobody"] {
        let summary = world.get(host, 3, &[])?;
        ensure(summary.statuses.get(&503).copied() == Some(3), || {
            format!(
                "{host}: statuses {:?}, errors {:?}",
                summary.statuses, summary.errors
            )
        })?;
    }
    Ok("503 from an endpoint that refuses, 503 from a cluster without endpoints".to_owned())
}

fn bulk(world: &mut World) -> Result<String> {
    let address = SocketAddr::new(tcp_service(false), TCP_PORT).to_string();
    let bytes = BULK.to_string();
    let sent: Sent = world.play(
        &world.client().namespace,
        &["tcp-send", &address, "--bytes", &bytes],
    )?;
    ensure(sent.intact && sent.received.octets == BULK, || {
        format!("sent {:?}, received {:?}", sent.sent, sent.received)
    })?;
    Ok(format!(
        "CRC-32 {:08x} on both ends, {:.0} Mbit/s across nodes",
        sent.received.crc32, sent.mbit_per_s
    ))
}

fn ipv6(world: &mut World) -> Result<String> {
    let client = world.client();
    let here = world.get_from(client, true, "local", 100, &[])?;
    all_from(&here, 100, world.nodes.pod(0, 1), client)?;
    let there = world.get_from(client, true, "remote", 100, &[])?;
    all_from(&there, 100, world.nodes.pod(1, 1), client)?;
    Ok("100 of 100 on one node, 100 of 100 across nodes".to_owned())
}

fn spoofed(world: &mut World) -> Result<String> {
    let victim = world.nodes.pod(0, 1);
    let to = SocketAddr::new(victim.pod.addresses[0], OPEN_UDP).to_string();
    let another = world.nodes.pod(1, 0).pod.addresses[0].to_string();
    let before = (world.drops(0, "spoofed_mac")?, world.drops(0, "spoofed_ip")?);
    let capture = Capture::start(&victim.namespace, POD_INTERFACE, |_| true)?;
    let gateway = GATEWAY.to_string();
    let arguments = [
        "spoof",
        POD_INTERFACE,
        "--to",
        &to,
        "--to-mac",
        &gateway,
        "--as-ip",
        &another,
        "--count",
        "10",
    ];
    let sent: Spoofed = world.play(&world.client().namespace, &arguments)?;
    let honest = |frame: &Frame| frame.contains(workload::spoof::HONEST.as_bytes());
    capture.wait_for(sent.honest, Duration::from_secs(2));
    let captured = capture.stop()?;
    let forged = captured.count(|frame| {
        frame.contains(workload::spoof::WRONG_MAC.as_bytes())
            || frame.contains(workload::spoof::WRONG_IP.as_bytes())
    });
    let after = (world.drops(0, "spoofed_mac")?, world.drops(0, "spoofed_ip")?);
    let (macs, addresses) = (after.0 - before.0, after.1 - before.1);
    ensure(captured.any(honest), || {
        "not even the honest frames arrived".to_owned()
    })?;
    ensure(
        forged == 0 && macs == sent.wrong_mac && addresses == sent.wrong_ip,
        || {
            format!(
                "{forged} forged frames arrived; counted {macs} wrong MACs and {addresses} wrong addresses"
            )
        },
    )?;
    Ok(format!(
        "{macs} wrong MACs and {addresses} wrong addresses dropped and counted, the honest ones arrived"
    ))
}

fn no_way_around(world: &mut World) -> Result<String> {
    let server = world.nodes.pod(1, 1).pod.addresses[0];
    let ports = [HTTP_PORT, TCP_PORT, 22];
    let mut proxy = world.nodes.all[0]
        .proxy
        .take()
        .ok_or("the proxy is not running")?;
    let capture = Capture::start(&world.nodes.all[0].own.soc, WIRE, |_| true)?;
    proxy.kill()?;
    let mut slowest = 0.0_f64;
    for port in ports {
        for target in [
            SocketAddr::new(server, port),
            SocketAddr::new(http_service(false), port),
        ] {
            let connected: Connected =
                world.play(&world.client().namespace, &["tcp-connect", &target.to_string()])?;
            ensure(connected.outcome == Outcome::Refused, || {
                format!("{target}: {connected:?} while the proxy was down")
            })?;
            slowest = slowest.max(connected.connect_ms);
        }
    }
    let captured = capture.stop()?;
    let leaked = ways_around(world, &captured);
    ensure(leaked == 0 && captured.lost == 0, || {
        format!(
            "{leaked} TCP packets of the pod on the wire, {} frames lost by the capture",
            captured.lost
        )
    })?;
    world.nodes.start_proxy(0)?;
    let summary = world.get("remote", 50, &[])?;
    all_from(&summary, 50, world.nodes.pod(1, 1), world.client())?;
    Ok(format!(
        "proxy killed: 6 of 6 connections refused within {slowest:.0} ms, no TCP packet on the wire; it serves again after its restart"
    ))
}

fn without_proxy(world: &mut World) -> Result<String> {
    let client = world.client();
    let (near, far) = (
        world.nodes.pod(0, 1).pod.addresses.clone(),
        world.nodes.pod(1, 1).pod.addresses.clone(),
    );
    let mut answered = 0;
    for address in near.iter().chain(&far) {
        let target = SocketAddr::new(*address, OPEN_UDP).to_string();
        let udp: Answers = world.play(&client.namespace, &["udp-send", &target, "--count", "5"])?;
        let icmp: Answers = world.play(&client.namespace, &["ping", &address.to_string(), "--count", "5"])?;
        ensure(udp.answered == 5 && icmp.answered == 5, || {
            format!(
                "{address}: {} of 5 datagrams and {} of 5 pings were answered",
                udp.answered, icmp.answered
            )
        })?;
        answered += udp.answered + icmp.answered;
    }
    let before = world.counted(0, rules::other_udp(&client.pod))?;
    let target = SocketAddr::new(far[0], CLOSED_UDP).to_string();
    let closed: Answers = world.play(
        &client.namespace,
        &["udp-send", &target, "--count", "5", "--timeout-ms", "100"],
    )?;
    let dropped = world.counted(0, rules::other_udp(&client.pod))? - before;
    ensure(closed.answered == 0 && dropped == 5, || {
        format!(
            "of 5 datagrams to a closed port {} were answered and {dropped} counted as dropped",
            closed.answered
        )
    })?;
    Ok(format!(
        "{answered} of 40 echo datagrams and pings answered; 5 of 5 datagrams to another port dropped and counted"
    ))
}

/// Owner of the rules that fill the table.
const FILLER: Owner = Owner::User(1);

fn table_full(world: &mut World) -> Result<String> {
    let node = &world.nodes.all[0];
    let hardware = node.client.capabilities().steering.hardware_rules;
    let batch_max = node.client.capabilities().steering.batch_max as usize;
    let fence = Fence(node.client.epoch());
    let client = &world.client().pod;
    let rules: Vec<Operation> = (0..hardware + 100)
        .map(|number| Operation::Add(filler(client.port, number, number == hardware + 99)))
        .collect();
    for chunk in rules.chunks(batch_max) {
        let batch = Batch::new(chunk.to_vec()).with(Atomicity::Continue);
        node.ask(node.client.apply(fence, &batch))?.into_result()?;
    }
    let placed = node.ask(node.client.list(FILLER))?;
    let in_hardware = placed
        .iter()
        .filter(|rule| rule.placement == Placement::Hardware)
        .count();
    let in_software: Vec<&str> = placed
        .iter()
        .filter_map(|rule| {
            if let Placement::Software(why) = &rule.placement {
                Some(why.as_str())
            } else {
                None
            }
        })
        .collect();
    let why = in_software.last().copied().unwrap_or("none").to_owned();
    // The last filler rule is in software, and acts: it drops what was let through before.
    let last = filler_target(hardware + 99).to_string();
    let before = world.counted_for(0, FILLER, filler_cookie(hardware + 99))?;
    let _: Answers = world.play(
        &world.client().namespace,
        &["udp-send", &last, "--count", "5", "--timeout-ms", "50"],
    )?;
    let hits = world.counted_for(0, FILLER, filler_cookie(hardware + 99))? - before;
    let summary = world.get("remote", 50, &[])?;
    let flushed = node.ask(node.client.flush(fence, FILLER))?;
    all_from(&summary, 50, world.nodes.pod(1, 1), world.client())?;
    ensure(in_hardware > 0 && in_software.len() >= 100 && hits == 5, || {
        format!(
            "{in_hardware} rules in hardware, {} in software ({why}); the last one was hit {hits} times",
            in_software.len()
        )
    })?;
    ensure(flushed == hardware + 100, || format!("{flushed} rules flushed"))?;
    Ok(format!(
        "{in_hardware} rules in hardware, {} in software ({why}); those act, and HTTP goes on",
        in_software.len()
    ))
}

impl World {
    fn counted_for(&self, node: usize, owner: Owner, cookie: Cookie) -> Result<u64> {
        let node = &self.nodes.all[node];
        let cookies = [cookie];
        let counters = node.ask(node.client.counters(owner, &cookies))?;
        Ok(counters
            .first()
            .copied()
            .flatten()
            .map_or(0, |counters| counters.packets))
    }
}

fn filler_cookie(number: u64) -> Cookie {
    Cookie((0xf0 << 64) | u128::from(number))
}

fn filler_target(number: u64) -> SocketAddr {
    let address = IpAddr::from((0xc612_0000_u32 + number as u32).to_be_bytes()); // 198.18.0.0/15, RFC 2544
    SocketAddr::new(address, OPEN_UDP)
}

/// A rule with a mask that the agent's rules have as well, and without a counter unless it is asked about: so it is the
/// entries that run out, not the masks or the counters.
fn filler(port: dpumesh_core::PortRef, number: u64, count: bool) -> SteeringRule {
    let target = IpMatch::from(filler_target(number).ip());
    let pattern = Pattern {
        port: Some(port),
        ip_dst: Some(target),
        ..Pattern::default()
    };
    let actions = if count {
        vec![Action::Count, Action::Drop]
    } else {
        vec![Action::Drop]
    };
    SteeringRule::new(filler_cookie(number), FILLER, Priority(1), pattern, actions)
}

fn pod_comes_and_goes(world: &mut World) -> Result<String> {
    let number = world.nodes.plan.pods_per_node;
    let plan = world.nodes.plan.clone();
    world.nodes.all[1].add_pod(number, &plan)?;
    let added = world.nodes.all[1].pods.len() - 1;
    world.nodes.apply_rules()?;
    let newcomer = world.nodes.pod(1, added);
    let servers = start_servers(&world.run, newcomer)?;
    let target = SocketAddr::new(newcomer.pod.addresses[0], HTTP_PORT).to_string();
    let name = newcomer.pod.name.clone();
    let summary: Summary = world.play(&world.client().namespace, &["http-get", &target, "--count", "20"])?;
    let served = summary.served_by.get(&name).copied();
    drop(servers);
    world.nodes.all[1].remove_pod(added)?;
    world.nodes.apply_rules()?;
    ensure(served == Some(20), || {
        format!("statuses {:?}, errors {:?}", summary.statuses, summary.errors)
    })?;
    let gone: Connected = world.play(
        &world.client().namespace,
        &["tcp-connect", &target, "--say", "hello", "--timeout-ms", "500"],
    )?;
    ensure(gone.outcome != Outcome::Answered, || {
        "the pod that left still answers".to_owned()
    })?;
    Ok(format!(
        "{name} answered 20 of 20 requests and answers no more after it left"
    ))
}
