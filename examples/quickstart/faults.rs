//! What the two nodes have to survive, one scenario each: crowds, connections that end badly, packets that do not fit,
//! programs that are killed, files that are broken ([`reload`]), strangers on the agent's channel.
//!
//! The contract when a program is down: what the pods' traffic needs of it fails closed. Without its proxy a node answers
//! TCP with a RST; without its dataplane nothing leaves a pod. A pod keeps interface, addresses and routes throughout.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use dpumesh_cni::rules;
use dpumesh_core::DpuId;
use dpumesh_examples::capture::{Capture, Captured, Datagram, Frame};
use dpumesh_examples::children::Process;
use dpumesh_examples::workload::http_client::Summary;
use dpumesh_examples::workload::tcp::{Connected, ENDED, Outcome, RESET_ME, Sent};
use dpumesh_examples::workload::udp::Answers;
use dpumesh_examples::workload::{self, READY};
use dpumesh_hw::channel::Dataplane;
use dpumesh_hw::channel::trust::{Authority, Credentials, Party};
use dpumesh_hw::netlink::{LinkChange, Netlink, Snapshot};
use serde::de::DeserializeOwned;

use super::mesh::{HTTP_PORT, SERVICE_PORT, TCP_PORT, http_service, tcp_service};
use super::node::{POD_INTERFACE, Result, RunningPod, WIRE};
use super::reload;
use super::scenarios::{OPEN_UDP, PATIENCE, Scenario, World, all_from, ensure};

/// All of them, in order.
pub(crate) const ALL: &[Scenario] = &[
    ("1000 connections on one node", crowd_on_one_node),
    ("1000 connections across nodes", crowd_across_nodes),
    ("half-closed connections", half_close),
    ("resets across nodes", resets),
    ("zero window", zero_window),
    ("packets longer than the path carries", mtu_mismatch),
    ("proxy killed under load", proxy_killed),
    ("dataplane killed under load", dataplane_killed),
    ("broken files for the proxy under load", reload::broken_files),
    ("strangers on the agent's channel", strangers),
];

/// Connections of a crowd.
const CROWD: u64 = 1000;
/// Connections that make the load under which programs are killed.
const LOAD: &str = "16";
/// How long that load lasts.
const LOAD_LASTS: Duration = Duration::from_secs(5);
/// Port of the servers that scenarios start for themselves.
const OWN_PORT: u16 = 9100;
/// How long a slow receiver takes nothing.
const PAUSE: Duration = Duration::from_millis(3500);
/// More than all buffers from pod to pod hold.
const MORE_THAN_BUFFERS: u64 = 60_000_000;
/// The longest that traffic may take to flow again after the dataplane has been started.
const RECOVERY: Duration = Duration::from_secs(5);

fn crowd_on_one_node(world: &mut World) -> Result<String> {
    crowd(world, "local", world.nodes.pod(0, 1))
}

fn crowd_across_nodes(world: &mut World) -> Result<String> {
    crowd(world, "remote", world.nodes.pod(1, 1))
}

fn crowd(world: &World, host: &str, server: &RunningPod) -> Result<String> {
    let connections = CROWD.to_string();
    let summary = world.get(
        host,
        CROWD,
        &[
            "--connections",
            &connections,
            "--together",
            "--timeout-ms",
            "30000",
        ],
    )?;
    all_from(&summary, CROWD, server, world.client())?;
    ensure(summary.open_at_once == CROWD, || {
        format!("only {} were open at once", summary.open_at_once)
    })?;
    let took = summary.elapsed_us as f64 / 1000.0;
    Ok(format!(
        "{CROWD} open at once, each answered with 200 by {}, in {took:.0} ms",
        server.pod.name
    ))
}

/// The sink answers only after the sender has closed its half: the answer travels on a half-closed connection.
fn half_close(world: &mut World) -> Result<String> {
    let client = &world.client().namespace;
    let mut targets = vec![
        SocketAddr::new(tcp_service(false), TCP_PORT),
        SocketAddr::new(tcp_service(true), TCP_PORT),
    ];
    for server in [world.nodes.pod(0, 1), world.nodes.pod(1, 1)] {
        targets.extend(
            server
                .pod
                .addresses
                .iter()
                .map(|address| SocketAddr::new(*address, TCP_PORT)),
        );
    }
    for target in &targets {
        for bytes in ["0", "1", "1000000"] {
            let sent: Sent = world.play(client, &["tcp-send", &target.to_string(), "--bytes", bytes])?;
            ensure(sent.intact, || {
                format!("{target}: sent {:?}, received {:?}", sent.sent, sent.received)
            })?;
        }
    }
    let count = targets.len() * 3;
    Ok(format!(
        "{count} of {count} answers came back after the sender had closed its half, IPv4 and IPv6, service and pod"
    ))
}

fn resets(world: &mut World) -> Result<String> {
    for server in [world.nodes.pod(0, 1), world.nodes.pod(1, 1)] {
        for address in &server.pod.addresses {
            let target = SocketAddr::new(*address, OWN_PORT).to_string();
            reset_by_client(world, server, &target)?;
            reset_by_server(world, server, &target)?;
        }
    }
    Ok("a RST of the client reached the server and a RST of the server the client, 4 of 4 paths".to_owned())
}

fn reset_by_client(world: &World, server: &RunningPod, target: &str) -> Result<()> {
    let mut witness = start_witness(world, server, target)?;
    let arguments = ["tcp-connect", target, "--say", "hello", "--reset"];
    let connected: Connected = world.play(&world.client().namespace, &arguments)?;
    ensure(connected.outcome == Outcome::Answered, || {
        format!("{target}: {connected:?}")
    })?;
    let end = witness.wait_for_line(ENDED, PATIENCE)?;
    ensure(end == "reset", || {
        format!("{target}: the client reset the connection, the server saw {end:?}")
    })
}

fn reset_by_server(world: &World, server: &RunningPod, target: &str) -> Result<()> {
    let _witness = start_witness(world, server, target)?;
    let connected: Connected = world.play(
        &world.client().namespace,
        &["tcp-connect", target, "--say", RESET_ME],
    )?;
    ensure(connected.outcome == Outcome::Reset, || {
        format!("{target}: the server reset, the client saw {connected:?}")
    })
}

fn start_witness(world: &World, server: &RunningPod, target: &str) -> Result<Process> {
    start_server(world, server, vec!["tcp-witness".to_owned(), any_like(target)?])
}

/// The unspecified address of the family of `target`, with its port.
fn any_like(target: &str) -> Result<String> {
    let target: SocketAddr = target.parse()?;
    Ok(format!(
        "{}:{}",
        if target.is_ipv4() { "0.0.0.0" } else { "[::]" },
        target.port()
    ))
}

fn start_server(world: &World, pod: &RunningPod, role: Vec<String>) -> Result<Process> {
    let title = format!("{} in {}", role[0], pod.pod.name);
    let mut server = Process::start(&world.run, &title, &pod.namespace, workload::command(&role))?;
    server.wait_for_line(READY, PATIENCE)?;
    Ok(server)
}

/// A client that works while the scenario does something else.
pub(crate) struct Background {
    process: Process,
}

impl Background {
    fn start(world: &World, arguments: &[&str]) -> Result<Self> {
        let command = workload::command(arguments.iter().copied().chain(["--json"]));
        let process = Process::start(&world.run, arguments[0], &world.client().namespace, command)?;
        Ok(Self { process })
    }

    /// What it has to tell, if it ends well; otherwise how it ended and its last words.
    pub(crate) fn result<T: DeserializeOwned>(mut self) -> Result<std::result::Result<T, String>> {
        let status: ExitStatus = self.process.wait(PATIENCE)?;
        if !status.success() {
            return Ok(Err(format!("{status}: {}", self.process.stderr().trim())));
        }
        Ok(Ok(serde_json::from_str(
            &self.process.wait_for_line("", PATIENCE)?,
        )?))
    }
}

fn start_slow_sink(world: &World, server: &RunningPod) -> Result<Process> {
    let pause = PAUSE.as_millis().to_string();
    start_server(
        world,
        server,
        vec![
            "tcp-sink".to_owned(),
            format!("0.0.0.0:{OWN_PORT}"),
            "--pause-ms".to_owned(),
            pause,
        ],
    )
}

fn zero_window(world: &mut World) -> Result<String> {
    let server = world.nodes.pod(1, 1);
    let _sink = start_slow_sink(world, server)?;
    let target = SocketAddr::new(server.pod.addresses[0], OWN_PORT).to_string();
    let closed = |octets: &[u8]| announces_no_window(octets);
    let capture = Capture::start(&server.namespace, POD_INTERFACE, closed)?;
    let bytes = MORE_THAN_BUFFERS.to_string();
    let sender = Background::start(world, &["tcp-send", &target, "--bytes", &bytes])?;
    let is_closed = capture.wait_for(1, PAUSE);
    let others = world.get("remote", 200, &[])?;
    capture.stop()?;
    ensure(is_closed, || {
        format!("{bytes} octets did not close the receiver's window")
    })?;
    all_from(&others, 200, server, world.client())?;
    let sent: Sent = sender.result()??;
    let took = Duration::from_micros(sent.elapsed_us);
    ensure(sent.intact && took >= PAUSE, || format!("{sent:?}"))?;
    Ok(format!(
        "the receiver took nothing for {:.1} s and closed its window; all {} MB arrived after {:.1} s; others meanwhile: p50 {:.0} µs",
        PAUSE.as_secs_f64(),
        MORE_THAN_BUFFERS / 1_000_000,
        took.as_secs_f64(),
        others.latency_us.p50
    ))
}

/// Whether a frame is a TCP segment, no SYN and no RST, that says the sender has no room (RFC 9293, 3.1).
fn announces_no_window(frame: &[u8]) -> bool {
    segment(frame).is_some_and(|tcp| tcp[13] & (SYN | RST) == 0 && tcp[14..16] == [0, 0])
}

const SYN: u8 = 0x02;
const RST: u8 = 0x04;

/// The TCP header in an Ethernet frame, at least its 20 fixed octets; in IPv6 only without extension headers.
fn segment(frame: &[u8]) -> Option<&[u8]> {
    let ip = frame.get(14..)?;
    let (protocol, length) = match frame.get(12..14)? {
        [0x08, 0x00] => (*ip.get(9)?, usize::from(ip[0] & 0x0f) * 4),
        [0x86, 0xdd] => (*ip.get(6)?, 40),
        _ => return None,
    };
    let tcp = ip.get(length..)?;
    (protocol == 6 && tcp.len() >= 20).then_some(tcp)
}

fn mtu_mismatch(world: &mut World) -> Result<String> {
    let before = set_pod_mtu(world.client(), LONG_MTU)?;
    let played = with_long_packets(world, before);
    set_pod_mtu(world.client(), before)?;
    played
}

/// More than the overlay carries and, with its headers, more than the wire does.
const LONG_MTU: u32 = 1600;

/// Sets the MTU of a pod's interface and returns what it was.
fn set_pod_mtu(running: &RunningPod, mtu: u32) -> Result<u32> {
    let mut netlink = Netlink::open_in(&running.namespace)?;
    let link = netlink.link(POD_INTERFACE)?;
    netlink.change_link(link.index, &LinkChange::new().mtu(mtu))?;
    Ok(link.mtu)
}

fn with_long_packets(world: &World, carried: u32) -> Result<String> {
    let (client, server) = (world.client(), world.nodes.pod(1, 1));
    let told_before = too_big_sent(world)?;
    let mut told = 0;
    for address in &server.pod.addresses {
        let target = SocketAddr::new(*address, OPEN_UDP).to_string();
        let octets = (LONG_MTU - if address.is_ipv4() { 28 } else { 48 }).to_string();
        let arguments = [
            "udp-send",
            &target,
            "--octets",
            &octets,
            "--count",
            "5",
            "--timeout-ms",
            "500",
        ];
        let answers: Answers = world.play(&client.namespace, &arguments)?;
        // The kernel learns the path's MTU from the first answer; what it cuts into fragments then may pass or not.
        ensure(answers.too_big >= 1, || {
            format!("{target}: nobody told the sender of {octets} octets: {answers:?}")
        })?;
        told += answers.too_big;
        let short: Answers = world.play(
            &client.namespace,
            &["udp-send", &target, "--octets", "1000", "--count", "5"],
        )?;
        ensure(short.answered == 5, || {
            format!("{target}: short datagrams: {short:?}")
        })?;
    }
    let counted = too_big_sent(world)? - told_before;
    ensure(counted >= 2, || {
        format!("the dataplane counted {counted} messages to the sender")
    })?;
    for address in [server.pod.addresses[0], tcp_service(true)] {
        let target = SocketAddr::new(address, TCP_PORT).to_string();
        let sent: Sent = world.play(&client.namespace, &["tcp-send", &target, "--bytes", "5000000"])?;
        ensure(sent.intact, || {
            format!("{target}: sent {:?}, received {:?}", sent.sent, sent.received)
        })?;
    }
    let summary = world.get("remote", 50, &[])?;
    all_from(&summary, 50, server, client)?;
    Ok(format!(
        "a pod whose MTU says {LONG_MTU} instead of {carried} was told {told} times that datagrams are too big; TCP and HTTP are intact"
    ))
}

fn too_big_sent(world: &World) -> Result<u64> {
    let node = &world.nodes.all[0];
    Ok(node.ask(node.client.stats())?.too_big_sent)
}

/// HTTP across nodes, going on while the scenario kills or breaks something. Returns once it really is.
pub(crate) fn load(world: &World) -> Result<Background> {
    load_to(world, "remote", LOAD_LASTS)
}

/// The same to a host, for so long.
pub(crate) fn load_to(world: &World, host: &str, lasting: Duration) -> Result<Background> {
    let lasting = lasting.as_millis().to_string();
    let service = SocketAddr::new(http_service(false), SERVICE_PORT).to_string();
    let before = world.counted(0, rules::intercept(&world.client().pod))?;
    let load = Background::start(
        world,
        &[
            "http-get",
            &service,
            "--host",
            host,
            "--connections",
            LOAD,
            "--for-ms",
            &lasting,
            "--timeout-ms",
            "3000",
        ],
    )?;
    let begun = Instant::now();
    while world.counted(0, rules::intercept(&world.client().pod))? < before + 500 {
        ensure(begun.elapsed() < PATIENCE, || "the load did not begin".to_owned())?;
    }
    Ok(load)
}

/// Whatever was answered was answered by the right server for the right client, or says that the proxy could not.
fn none_answered_wrongly(world: &World, summary: &Summary) -> Result<u64> {
    let ok = summary.statuses.get(&200).copied().unwrap_or(0);
    let statuses = summary
        .statuses
        .keys()
        .all(|status| matches!(status, 200 | 502..=504));
    let by = summary
        .served_by
        .keys()
        .all(|name| *name == world.nodes.pod(1, 1).pod.name);
    let client = world.client();
    let seen = summary.seen_as.keys().all(|seen| {
        seen.parse::<IpAddr>()
            .is_ok_and(|seen| client.pod.addresses.contains(&seen.to_canonical()))
    });
    let malformed = summary
        .errors
        .keys()
        .any(|reason| reason.starts_with("malformed"));
    ensure(ok > 0 && statuses && by && seen && !malformed, || {
        format!(
            "statuses {:?}, errors {:?}, served by {:?}, client seen as {:?}",
            summary.statuses, summary.errors, summary.served_by, summary.seen_as
        )
    })?;
    Ok(ok)
}

fn proxy_killed(world: &mut World) -> Result<String> {
    let load = load(world)?;
    world.nodes.all[0]
        .proxy
        .take()
        .ok_or("the proxy is not running")?
        .kill()?;
    // What the proxy's own connections still have to say is theirs to say; a new one, or one to where only the pod
    // would send, is not.
    let capture = Capture::start(&world.nodes.all[0].own.soc, WIRE, |_| true)?;
    let server = world.nodes.pod(1, 1).pod.addresses[0];
    let mut refused = 0;
    for port in [HTTP_PORT, TCP_PORT, OWN_PORT] {
        for target in [
            SocketAddr::new(server, port),
            SocketAddr::new(http_service(false), port),
        ] {
            let connected: Connected =
                world.play(&world.client().namespace, &["tcp-connect", &target.to_string()])?;
            ensure(connected.outcome == Outcome::Refused, || {
                format!("{target}: {connected:?} while the proxy was down")
            })?;
            refused += 1;
        }
    }
    let captured = capture.stop()?;
    let ways_around = ways_around(world, &captured);
    ensure(ways_around == 0 && captured.lost == 0, || {
        format!(
            "{ways_around} packets of the pod went around the proxy, {} frames lost by the capture",
            captured.lost
        )
    })?;
    let begun = Instant::now();
    world.nodes.start_proxy(0)?;
    let first = world.get("remote", 1, &[])?;
    let recovered = begun.elapsed();
    all_from(&first, 1, world.nodes.pod(1, 1), world.client())?;
    let summary: Summary = load.result()??;
    let ok = none_answered_wrongly(world, &summary)?;
    let after = world.get("remote", 200, &[])?;
    all_from(&after, 200, world.nodes.pod(1, 1), world.client())?;
    Ok(format!(
        "{refused} of {refused} connections refused meanwhile, no way around on the wire; served again {:.1} s after its start; of the load {ok} answered, none wrongly, errors {:?}",
        recovered.as_secs_f64(),
        summary.errors
    ))
}

/// TCP packets of the client pod on the wire that no proxy that was killed has sent: to open a connection, or to the
/// service. The ends of the proxy's own connections carry the pod's address as well.
pub(crate) fn ways_around(world: &World, captured: &Captured) -> usize {
    let client = &world.client().pod.addresses;
    captured.count(|frame| {
        inner(frame).is_some_and(|(packet, tcp)| {
            let opens = tcp.is_none_or(|tcp| tcp[13] & SYN != 0);
            packet.protocol == 6
                && client.contains(&packet.source)
                && (opens || packet.destination == http_service(false))
        })
    })
}

/// The packet that pods sent each other in a frame on the wire, and its TCP header.
fn inner(frame: &Frame) -> Option<(Datagram<'_>, Option<&[u8]>)> {
    const OUTER: usize = 14 + 20 + 8 + 8; // Ethernet, IPv4 without options, UDP, VXLAN
    match frame.encapsulated() {
        Some((_, packet)) => Some((packet, frame.octets.get(OUTER..).and_then(segment))),
        None => Some((frame.datagram()?, segment(&frame.octets))),
    }
}

fn dataplane_killed(world: &mut World) -> Result<String> {
    let server = world.nodes.pod(1, 1).pod.addresses[0];
    let _sink = start_slow_sink(world, world.nodes.pod(1, 1))?;
    let before = networks(world)?;
    let target = SocketAddr::new(server, OWN_PORT).to_string();
    let bytes = MORE_THAN_BUFFERS.to_string();
    // It is established and has most of its octets before it when the dataplane ends.
    let established = Background::start(world, &["tcp-send", &target, "--bytes", &bytes])?;
    let load = load(world)?;
    world.nodes.all[0].dataplane.kill()?;
    let passed = while_down(world, server)?;
    ensure(networks(world)? == before, || {
        "a pod's addresses or routes changed with the dataplane's end".to_owned()
    })?;
    let begun = Instant::now();
    world.nodes.restart_dataplane(0)?;
    let again = world.get("remote", 1, &["--timeout-ms", "5000"])?;
    let recovered = begun.elapsed();
    all_from(&again, 1, world.nodes.pod(1, 1), world.client())?;
    ensure(recovered <= RECOVERY, || {
        format!("traffic flows again only after {recovered:?}")
    })?;
    ensure(networks(world)? == before, || {
        "a pod's interface, addresses or routes changed".to_owned()
    })?;
    let summary: Summary = load.result()??;
    let ok = none_answered_wrongly(world, &summary)?;
    let after = world.get("remote", 200, &[])?;
    all_from(&after, 200, world.nodes.pod(1, 1), world.client())?;
    let survived = established.result::<Sent>()?;
    let sent = survived.map_err(|how| format!("an established connection did not survive: {how}"))?;
    ensure(sent.intact, || {
        format!("an established connection lost octets: {sent:?}")
    })?;
    Ok(format!(
        "{passed}; traffic again after {:.1} s; an established connection survived, {} MB byte-exact; of the load {ok} answered, none wrongly, errors {:?}; pods kept interface, addresses and routes",
        recovered.as_secs_f64(),
        MORE_THAN_BUFFERS / 1_000_000,
        summary.errors
    ))
}

/// Nothing passes while there is no dataplane.
fn while_down(world: &World, server: IpAddr) -> Result<String> {
    let client = &world.client().namespace;
    let capture = Capture::start(&world.nodes.all[0].own.soc, WIRE, |_| true)?;
    let udp = SocketAddr::new(server, OPEN_UDP).to_string();
    let datagrams: Answers =
        world.play(client, &["udp-send", &udp, "--count", "3", "--timeout-ms", "100"])?;
    let pings: Answers = world.play(
        client,
        &["ping", &server.to_string(), "--count", "3", "--timeout-ms", "100"],
    )?;
    let http = SocketAddr::new(server, HTTP_PORT).to_string();
    let connected: Connected = world.play(client, &["tcp-connect", &http, "--timeout-ms", "300"])?;
    let captured = capture.stop()?;
    let pods = &world.client().pod.addresses;
    let left = captured.count(|frame| {
        frame.outgoing && inner(frame).is_some_and(|(packet, _)| pods.contains(&packet.source))
    });
    let passed = datagrams.answered + pings.answered;
    ensure(
        passed == 0 && connected.outcome != Outcome::Connected && left == 0 && captured.lost == 0,
        || {
            format!(
                "{passed} datagrams and pings answered, TCP {:?}, {left} packets on the wire without a dataplane",
                connected.outcome
            )
        },
    )?;
    Ok("nothing passed while it was down".to_owned())
}

/// What each pod of the first node has: interface, addresses, routes.
fn networks(world: &World) -> Result<Vec<Snapshot>> {
    let pods = world.nodes.all[0].pods.iter();
    pods.map(|running| Ok(Netlink::open_in(&running.namespace)?.snapshot()?))
        .collect()
}

fn strangers(world: &mut World) -> Result<String> {
    let node = &world.nodes.all[0];
    let (dpu, own) = (node.dpu().clone(), node.credentials());
    let forged = Authority::new(dpu.clone())?;
    let of_other = |certificate: Credentials| Credentials {
        authority: own.authority.clone(),
        ..certificate
    };
    let strangers = [
        (
            "another authority's agent",
            dpu.clone(),
            forged.issue(Party::Agent)?,
        ),
        (
            "the same, trusting the dataplane",
            dpu.clone(),
            of_other(forged.issue(Party::Agent)?),
        ),
        (
            "another authority's dataplane",
            dpu.clone(),
            of_other(forged.issue(Party::Dataplane)?),
        ),
        (
            "the other node's agent",
            dpu.clone(),
            of_other(world.nodes.all[1].credentials().clone()),
        ),
        (
            "one who means another card",
            DpuId("dpu-9".to_owned()),
            own.clone(),
        ),
    ];
    let rules = node
        .ask(dpumesh_core::FlowSteering::list(
            &node.client,
            dpumesh_core::steering::Owner::Agent,
        ))?
        .len();
    let mut reasons = Vec::new();
    for (who, dpu, credentials) in &strangers {
        match node.knock(dpu, credentials) {
            Ok(()) => return Err(format!("{who} was let in").into()),
            Err(reason) => reasons.push(format!("{who}: {reason}")),
        }
    }
    node.knock(&dpu, own)?;
    let kept = node
        .ask(dpumesh_core::FlowSteering::list(
            &node.client,
            dpumesh_core::steering::Owner::Agent,
        ))?
        .len();
    ensure(kept == rules, || format!("{rules} rules before, {kept} after"))?;
    let summary = world.get("remote", 50, &[])?;
    all_from(&summary, 50, world.nodes.pod(1, 1), world.client())?;
    Ok(format!(
        "{} of {} refused, the agent's own credentials taken, {kept} rules untouched",
        reasons.len(),
        strangers.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(flags: u8, window: [u8; 2]) -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 20];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        frame[14 + 9] = 6;
        frame[34 + 13] = flags;
        frame[34 + 14..34 + 16].copy_from_slice(&window);
        frame
    }

    #[test]
    fn a_closed_window_is_recognised() {
        const ACK: u8 = 0x10;
        assert!(announces_no_window(&frame(ACK, [0, 0])));
        assert!(!announces_no_window(&frame(ACK, [0, 1])));
        assert!(
            !announces_no_window(&frame(ACK | RST, [0, 0])),
            "a RST has no window"
        );
        let whole = frame(ACK, [0, 0]);
        for length in 0..whole.len() {
            assert!(!announces_no_window(&whole[..length]), "{length} octets");
        }
    }
}
