//! The kernel stream engine end to end, without a dataplane: a router namespace stands in its place.
//!
//! ```text
//! pod ──veth── router ──veth── stack (stk0, proxy)
//!                 └────veth── server
//! ```
//! What comes from the stack the router sends to the pod or the server; everything else it sends to the stack. The
//! two ends of each veth pair share a MAC and resolve no neighbours, so that every frame is taken by the other end;
//! the pair at the stack has the MAC of an ingress port.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use dpumesh_hw::netlink::nft::{Interception, NfTables};
use dpumesh_hw::netlink::{
    Address, LinkChange, Netlink, PROTOCOL, Route, RouteMetrics, Rule, VethEnd, sysctl,
};
use dpumesh_hw::netns::Namespace;
use dpumesh_hw::netns::testing::{self, Case, RunAs};
use dpumesh_hw::stream::kernel::{
    HAIRPIN_MARK, InboundPort, KernelEngine, KernelStack, KernelStackConfig, LocalSource, Origin,
    connect_from, transparent_listener,
};
use dpumesh_hw::stream::{
    ConnectRequest, Families, IngressPort, ListenOptions, Stream, StreamEngine, StreamErrorKind,
    StreamListenerExt,
};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const DEADLINE: Duration = Duration::from_secs(10);
/// A refusal or a connection that takes longer than this has waited for a retransmission.
const AT_ONCE: Duration = Duration::from_millis(900);
const PROXY: u16 = 15001;
const INBOUND: u16 = 15006;
const INGRESS: u32 = 0x0102_0304;
const POD: [&str; 2] = ["10.1.0.5", "fd01::5"];
const SERVER: [&str; 2] = ["10.2.0.9", "fd02::9"];
const SERVICE: [&str; 2] = ["10.96.0.10", "fd96::10"];
const LOCAL: [&str; 2] = ["169.254.77.1", "fd77::1"];

fn main() -> ExitCode {
    let case = |name, run| Case {
        name,
        run_as: RunAs::Caller,
        run,
    };
    let nobody = |name, run| Case {
        name,
        run_as: RunAs::Nobody,
        run,
    };
    testing::main(&[
        case(
            "the_table_is_replaced_and_removed",
            the_table_is_replaced_and_removed,
        ),
        case(
            "a_listener_sees_original_addresses_and_port",
            a_listener_sees_original_addresses_and_port,
        ),
        case(
            "without_a_proxy_a_client_is_refused_at_once",
            without_a_proxy_a_client_is_refused_at_once,
        ),
        case(
            "no_other_listener_can_be_reached",
            no_other_listener_can_be_reached,
        ),
        case(
            "a_half_prepared_stack_lets_nothing_in",
            a_half_prepared_stack_lets_nothing_in,
        ),
        case(
            "a_frame_without_a_port_has_no_ingress",
            a_frame_without_a_port_has_no_ingress,
        ),
        case("a_datagram_reaches_no_socket", a_datagram_reaches_no_socket),
        case(
            "a_connection_leaves_with_the_pods_address",
            a_connection_leaves_with_the_pods_address,
        ),
        case(
            "a_pod_reaches_itself_through_the_local_source",
            a_pod_reaches_itself_through_the_local_source,
        ),
        case(
            "short_connections_do_not_use_up_the_ports",
            short_connections_do_not_use_up_the_ports,
        ),
        case(
            "two_listeners_share_the_connections",
            two_listeners_share_the_connections,
        ),
        case(
            "preparing_again_keeps_connections_and_leaves_nothing_stale",
            preparing_again,
        ),
        case(
            "path_mtu_discovery_works_through_the_final_drop",
            path_mtu_discovery_works,
        ),
        case(
            "a_thread_outside_the_stack_gets_no_socket",
            a_thread_outside_the_stack_gets_no_socket,
        ),
        case(
            "an_aborted_stream_ends_with_a_reset",
            an_aborted_stream_ends_with_a_reset,
        ),
        case(
            "what_comes_to_pods_comes_to_the_inbound_port",
            what_comes_to_pods_comes_to_the_inbound_port,
        ),
        case(
            "from_pod_to_pod_comes_to_the_inbound_port",
            from_pod_to_pod_comes_to_the_inbound_port,
        ),
        nobody(
            "an_ordinary_users_listener_sees_original_addresses",
            a_listener_sees_original_addresses_and_port,
        ),
        nobody(
            "an_ordinary_users_client_is_refused_at_once",
            without_a_proxy_a_client_is_refused_at_once,
        ),
        nobody(
            "an_ordinary_users_connection_leaves_with_the_pods_address",
            a_connection_leaves_with_the_pods_address,
        ),
    ])
}

fn the_table_is_replaced_and_removed() {
    let namespace = Namespace::create().expect("created");
    let mut tables = NfTables::open_in(&namespace).expect("socket");
    assert_eq!(tables.counters().expect("asked"), None);
    for port in [15001, 15002] {
        tables
            .replace(&Interception {
                interface: "stk0".into(),
                port,
                inbound: None,
            })
            .expect("replaced");
        assert!(tables.counters().expect("asked").is_some());
    }
    let refused = tables
        .replace(&Interception {
            interface: "stk0".into(),
            port: 0,
            inbound: None,
        })
        .expect_err("port 0");
    assert!(refused.to_string().contains("stk0"), "{refused}");
    assert!(
        tables.counters().expect("asked").is_some(),
        "a refusal leaves the old one"
    );
    tables.delete().expect("deleted");
    tables.delete().expect("deleted again");
    assert_eq!(tables.counters().expect("asked"), None);
}

fn a_listener_sees_original_addresses_and_port() {
    let node = Node::new();
    let engine = KernelEngine::new(node.prepare());
    engine.enter_worker().expect("entered");
    runtime().block_on(async {
        let mut listener = engine.listen(&ListenOptions::new(PROXY)).expect("listening");
        for family in 0..2 {
            let to = at(SERVICE[family], 8080);
            let client = node.client(to).expect("connected");
            let accepted = listener.accept().await.expect("accepted");
            assert_eq!(accepted.original_destination, to);
            assert_eq!(accepted.source, client.local_addr().expect("address"));
            assert_eq!(accepted.source.ip(), ip(POD[family]));
            assert_eq!(accepted.ingress, IngressPort::new(INGRESS));
            let mut stream = accepted.stream;
            (&client).write_all(b"request").expect("written");
            let mut buffer = [0; 7];
            stream.read_exact(&mut buffer).await.expect("read");
            stream.write_all(b"answer").await.expect("written");
            stream.shutdown().await.expect("half closed");
            let mut answer = String::new();
            (&client).read_to_string(&mut answer).expect("read");
            assert_eq!((&buffer, answer.as_str()), (b"request", "answer"));
        }
    });
    let counters = engine.stack().counters().expect("asked").expect("in place");
    assert!(
        counters.intercepted.packets >= 8 && counters.refused.packets == 0,
        "{counters:?}"
    );
}

fn without_a_proxy_a_client_is_refused_at_once() {
    let node = Node::new();
    let stack = node.prepare();
    for address in SERVICE {
        node.refuses(at(address, 8080));
    }
    assert_eq!(
        stack
            .counters()
            .expect("asked")
            .expect("in place")
            .refused
            .packets,
        2
    );
}

fn no_other_listener_can_be_reached() {
    let node = Node::new();
    node.prepare();
    // A wildcard listener for both families beside the proxy, and one in its place that is not transparent.
    let other = |port| {
        node.stack
            .run(|| TcpListener::bind(at("::", port)))
            .expect("ran")
            .expect("bound")
    };
    let (beside, in_place) = (other(8080), other(PROXY));
    for address in SERVICE {
        node.refuses(at(address, 8080));
        node.refuses(at(address, PROXY));
    }
    nobody_came(&in_place);
    drop(in_place);
    // With a proxy for one family, that family goes to it, whatever the port, and the other is still refused.
    let options = ListenOptions {
        families: Families::V6,
        ..ListenOptions::new(PROXY)
    };
    let proxy = node.listen(&options);
    node.client(at(SERVICE[1], 8080)).expect("connected");
    assert_eq!(
        proxy.accept().expect("accepted").0.local_addr().expect("address"),
        at(SERVICE[1], 8080)
    );
    node.refuses(at(SERVICE[0], 8080));
    nobody_came(&beside);
}

fn nobody_came(listener: &TcpListener) {
    listener.set_nonblocking(true).expect("non-blocking");
    assert_eq!(
        listener.accept().expect_err("nobody came").kind(),
        ErrorKind::WouldBlock
    );
}

fn a_half_prepared_stack_lets_nothing_in() {
    let node = Node::new();
    let mut impossible = config();
    impossible.metrics.congestion = Some("no-such-control".into());
    // An address of the stack's own is delivered without any route of ours.
    let mut netlink = Netlink::open_in(&node.stack).expect("socket");
    let link = netlink.link("lo").expect("lo").index;
    netlink
        .add_address(&Address {
            link,
            net: ip(SERVICE[0]).into(),
        })
        .expect("address");
    let error = KernelStack::prepare(&node.stack, impossible)
        .expect_err("refused")
        .to_string();
    assert!(error.contains("route 0.0.0.0/0"), "{error}");
    runs(&node.stack, "stk0");
    runs(&node.router, "r-stack");
    node.drops_datagrams(SERVICE[0], "0.0.0.0");
}

fn a_frame_without_a_port_has_no_ingress() {
    let node = Node::new();
    let engine = KernelEngine::new(node.prepare());
    for (namespace, name) in [(&node.router, "r-stack"), (&node.stack, "stk0")] {
        let mut netlink = Netlink::open_in(namespace).expect("socket");
        let link = netlink.link(name).expect(name).index;
        netlink
            .change_link(link, &LinkChange::new().mac([2, 0, 0, 0, 0, 9]))
            .expect("changed");
    }
    engine.enter_worker().expect("entered");
    runtime().block_on(async {
        let mut listener = engine.listen(&ListenOptions::new(PROXY)).expect("listening");
        let _client = node.client(at(SERVICE[0], 80)).expect("connected");
        assert_eq!(listener.accept().await.expect("accepted").ingress, None);
    });
}

fn a_datagram_reaches_no_socket() {
    let node = Node::new();
    node.prepare();
    node.drops_datagrams(SERVICE[0], "0.0.0.0");
    node.drops_datagrams(SERVICE[1], "::");
}

fn a_connection_leaves_with_the_pods_address() {
    let node = Node::new();
    let engine = KernelEngine::new(node.prepare());
    engine.enter_worker().expect("entered");
    runtime().block_on(async {
        for family in 0..2 {
            let server = node.server(at(SERVER[family], 80));
            let request = ConnectRequest {
                source: Some(ip(POD[family])),
                destination: at(SERVER[family], 80),
            };
            let mut stream = engine.connect(&request).await.expect("connected");
            let (mut accepted, peer) = server.accept().expect("accepted");
            assert_eq!(peer.ip(), ip(POD[family]));
            stream.write_all(b"ping").await.expect("written");
            let mut buffer = [0; 4];
            accepted.read_exact(&mut buffer).expect("read");
            accepted.write_all(&buffer).expect("written");
            stream.read_exact(&mut buffer).await.expect("came back");
            assert_eq!(&buffer, b"ping");
        }
        let refused = ConnectRequest {
            source: Some(ip(POD[0])),
            destination: at(SERVER[0], 81),
        };
        assert_eq!(
            engine.connect(&refused).await.expect_err("nobody there").kind(),
            StreamErrorKind::Refused
        );
        let mixed = ConnectRequest {
            source: Some(ip(POD[0])),
            destination: at(SERVER[1], 80),
        };
        assert_eq!(
            engine.connect(&mixed).await.expect_err("two families").kind(),
            StreamErrorKind::FamilyMismatch
        );
    });
}

fn a_pod_reaches_itself_through_the_local_source() {
    let node = Node::new();
    let engine = KernelEngine::new(node.prepare());
    engine.enter_worker().expect("entered");
    runtime().block_on(async {
        for family in 0..2 {
            let own = at(POD[family], 8080);
            let server = node
                .pod
                .run(|| TcpListener::bind(own))
                .expect("ran")
                .expect("bound");
            let request = ConnectRequest {
                source: Some(own.ip()),
                destination: own,
            };
            let mut stream = engine.connect(&request).await.expect("connected");
            let (mut accepted, peer) = server.accept().expect("accepted");
            assert_eq!(peer.ip(), ip(LOCAL[family]));
            accepted.write_all(b"myself").expect("written");
            let mut buffer = [0; 6];
            stream.read_exact(&mut buffer).await.expect("read");
            // The node's own connections have the same source.
            let own_request = ConnectRequest {
                source: None,
                destination: own,
            };
            engine.connect(&own_request).await.expect("connected");
            assert_eq!(server.accept().expect("accepted").1.ip(), ip(LOCAL[family]));
        }
    });
    let bare = KernelStackConfig::new("stk0", PROXY, LocalSource::default());
    let engine = KernelEngine::new(KernelStack::attach(&node.stack, bare).expect("attached"));
    let request = ConnectRequest {
        source: None,
        destination: at(POD[0], 8080),
    };
    let error = runtime()
        .block_on(engine.connect(&request))
        .expect_err("no source");
    assert_eq!(error.kind(), StreamErrorKind::NoLocalSource);
}

/// The stack with an inbound port, where the network's packets come in by `network`.
fn with_inbound(network: u32) -> KernelStackConfig {
    let network = IngressPort::new(network).expect("not 0");
    KernelStackConfig {
        inbound: Some(InboundPort {
            port: INBOUND,
            network,
        }),
        ..config()
    }
}

fn what_comes_to_pods_comes_to_the_inbound_port() {
    let node = Node::new();
    node.prepare();
    let outbound = node.listen(&ListenOptions::new(PROXY));
    let inbound = node.listen(&ListenOptions::new(INBOUND));
    for (network, listener) in [(INGRESS, &inbound), (INGRESS + 1, &outbound)] {
        KernelStack::prepare(&node.stack, with_inbound(network)).expect("prepared");
        for service in SERVICE {
            let client = node.client(at(service, 80)).expect("connected");
            let (accepted, peer) = listener.accept().expect("accepted");
            assert_eq!(peer.port(), client.local_addr().expect("bound").port());
            let meant = accepted.local_addr().expect("bound");
            assert_eq!((meant.ip().to_canonical(), meant.port()), (ip(service), 80));
        }
    }
}

fn from_pod_to_pod_comes_to_the_inbound_port() {
    const OTHER: [&str; 2] = ["10.1.0.6", "fd01::6"];
    let node = Node::new();
    node.prepare();
    let stack = KernelStack::prepare(&node.stack, with_inbound(u32::MAX)).expect("prepared");
    let pods = POD.into_iter().chain(OTHER).map(ip).collect();
    stack.set_local_pods(&pods).expect("told");
    let connect = |number: usize| {
        let origin = Origin {
            ip: ip(POD[number]),
            mark: HAIRPIN_MARK,
        };
        let stream = node.stack.run(|| connect_from(origin, at(OTHER[number], 8080)));
        let stream = stream.expect("ran").expect("connecting");
        stream.set_nonblocking(false).expect("blocking");
        stream
    };
    for number in [0, 1] {
        let mut refused = connect(number);
        let error = refused.read(&mut [0]).expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    }
    let listener = node.listen(&ListenOptions::new(INBOUND));
    for number in [0, 1] {
        let mut client = connect(number);
        let (mut accepted, peer) = listener.accept().expect("accepted");
        assert_eq!(peer.ip().to_canonical(), ip(POD[number]));
        let meant = accepted.local_addr().expect("bound").ip();
        assert_eq!(meant.to_canonical(), ip(OTHER[number]));
        accepted.write_all(b"hello").expect("written");
        let mut hello = [0; 5];
        client.read_exact(&mut hello).expect("read");
        assert_eq!(&hello, b"hello");
    }
    // A pod that is not of this node any more: such a connection leaves the stack.
    stack.set_local_pods(&BTreeSet::new()).expect("told");
    let server = node.server(at(SERVER[0], 80));
    let origin = Origin {
        ip: ip(POD[0]),
        mark: HAIRPIN_MARK,
    };
    let leaves = node.stack.run(|| connect_from(origin, at(SERVER[0], 80)));
    let _leaves = leaves.expect("ran").expect("connecting");
    let (_, peer) = server.accept().expect("accepted");
    assert_eq!(peer.ip(), ip(POD[0]));
}

fn short_connections_do_not_use_up_the_ports() {
    const PORTS: usize = 2000;
    let node = Node::new();
    let engine = KernelEngine::new(node.prepare());
    engine.enter_worker().expect("entered");
    let server = node.server(at(SERVER[0], 80));
    let request = ConnectRequest {
        source: Some(ip(POD[0])),
        destination: at(SERVER[0], 80),
    };
    // The proxy closes first, so that TIME_WAIT is on its side.
    let short = async || -> Result<(), StreamErrorKind> {
        let mut stream = engine.connect(&request).await.map_err(|error| error.kind())?;
        let (mut accepted, _) = server.accept().expect("accepted");
        stream.shutdown().await.expect("shut down");
        assert_eq!(accepted.read(&mut [0]).expect("end of stream"), 0);
        drop(accepted);
        assert_eq!(stream.read(&mut [0]).await.expect("end of stream"), 0);
        Ok(())
    };
    let range = format!("60000 {}", 60000 + PORTS - 1);
    sysctl::set(&node.stack, "ipv4/ip_local_port_range", &range).expect("narrowed");
    sysctl::set(&node.stack, "ipv4/tcp_tw_reuse", "0").expect("switched off");
    runtime().block_on(async {
        let mut made = 0;
        let exhausted = loop {
            match short().await {
                Ok(()) => made += 1,
                Err(kind) => break kind,
            }
            assert!(made <= PORTS, "more connections than ports");
        };
        assert_eq!(exhausted, StreamErrorKind::SourcePortsExhausted, "after {made}");
    });
    // What `prepare` sets cures it. The kernel waits a second before it uses a port again (newer kernels: as long as
    // they are told).
    node.prepare();
    sysctl::set(&node.stack, "ipv4/ip_local_port_range", &range).expect("narrowed");
    let delayed = sysctl::set(&node.stack, "ipv4/tcp_tw_reuse_delay", "1").is_err();
    let start = Instant::now();
    runtime().block_on(async {
        for _ in 0..10_000 {
            let waiting = Instant::now();
            while let Err(kind) = short().await {
                assert_eq!(kind, StreamErrorKind::SourcePortsExhausted);
                let limit = if delayed {
                    DEADLINE
                } else {
                    Duration::from_millis(100)
                };
                assert!(waiting.elapsed() < limit, "ports are not used again");
            }
        }
    });
    println!("10000 connections over {PORTS} ports in {:?}", start.elapsed());
}

fn two_listeners_share_the_connections() {
    let node = Node::new();
    node.prepare();
    let listeners = [
        node.listen(&ListenOptions::new(PROXY)),
        node.listen(&ListenOptions::new(PROXY)),
    ];
    let clients: Vec<TcpStream> = (0..100)
        .map(|number| node.client(at(SERVICE[number % 2], 80)).expect("connected"))
        .collect();
    let waiting = listeners.map(|listener| {
        listener.set_nonblocking(true).expect("non-blocking");
        std::iter::from_fn(|| listener.accept().ok()).count()
    });
    assert_eq!(waiting.iter().sum::<usize>(), clients.len());
    assert!(waiting.iter().all(|count| *count >= 20), "{waiting:?}");
    let alone = ListenOptions {
        reuse_port: false,
        ..ListenOptions::new(PROXY)
    };
    let first = node
        .stack
        .run(|| transparent_listener(&alone))
        .expect("ran")
        .expect("the port is free again");
    let second = node.stack.run(|| transparent_listener(&alone)).expect("ran");
    assert_eq!(second.expect_err("taken").kind(), ErrorKind::AddrInUse);
    drop(first);
}

fn preparing_again() {
    let node = Node::new();
    let first = node.prepare();
    let listener = node.listen(&ListenOptions::new(PROXY));
    let mut client = node.client(at(SERVICE[0], 80)).expect("connected");
    let (mut accepted, _) = listener.accept().expect("accepted");
    node.prepare();
    let mut netlink = Netlink::open_in(&node.stack).expect("socket");
    let mut ours = |table: u32| {
        let rules = netlink.rules().expect("listed");
        let rules: Vec<Rule> = rules
            .into_iter()
            .filter(|rule| rule.protocol == PROTOCOL)
            .collect();
        assert!(rules.iter().all(|rule| rule.table == table), "{rules:?}");
        let routes = netlink.routes(None).expect("listed");
        let routes: Vec<Route> = routes
            .into_iter()
            .filter(|route| route.protocol == PROTOCOL)
            .collect();
        assert!(
            routes
                .iter()
                .all(|route| route.table == table || route.table == Route::MAIN),
            "{routes:?}"
        );
        (rules.len(), routes.len())
    };
    assert_eq!(ours(100), (2, 4));
    let mut other = config();
    other.table = 200;
    other.metrics.congestion = Some("cubic".into());
    let second = KernelStack::prepare(&node.stack, other).expect("prepared");
    assert_eq!(ours(200), (2, 4), "the first table's rule and routes are gone");
    client.write_all(b"still here").expect("written");
    let mut buffer = [0; 10];
    accepted.read_exact(&mut buffer).expect("the connection went on");
    let congestion = |stream: &TcpStream| SockRef::from(stream).tcp_congestion().expect("asked");
    let (_client, (fresh, _)) = (
        node.client(at(SERVICE[0], 80)).expect("connected"),
        listener.accept().expect("accepted"),
    );
    assert!(congestion(&fresh).starts_with(b"cubic"));

    second.withdraw().expect("withdrawn");
    first.withdraw().expect("again, harmless");
    assert_eq!(second.counters().expect("asked"), None);
    assert!(
        netlink
            .rules()
            .expect("listed")
            .iter()
            .all(|rule| rule.protocol != PROTOCOL)
    );
    node.prepare();
    assert!(second.counters().expect("asked").is_some(), "and back again");
}

fn path_mtu_discovery_works() {
    const OCTETS: usize = 1 << 20;
    let node = Node::new();
    let stack = node.prepare();
    for family in 0..2 {
        // The router's way to the server is narrower than either end knows.
        let mut router = Netlink::open_in(&node.router).expect("socket");
        let link = router.link("r-server").expect("r-server").index;
        let metrics = RouteMetrics {
            mtu: Some(1300),
            ..RouteMetrics::default()
        };
        let narrow = host_route(SERVER[family])
            .on(link)
            .table(FROM_STACK)
            .metrics(metrics);
        router.replace_route(&narrow).expect("narrowed");
        let server = node.server(at(SERVER[family], 80));
        let upstream = node
            .stack
            .run(|| connect_from(ip(POD[family]).into(), at(SERVER[family], 80)))
            .expect("ran")
            .expect("begun");
        upstream.set_nonblocking(false).expect("blocking");
        let (mut accepted, _) = server.accept().expect("accepted");
        accepted.set_read_timeout(Some(DEADLINE)).expect("timeout");
        std::thread::scope(|scope| {
            scope.spawn(|| (&upstream).write_all(&vec![7; OCTETS]).expect("written"));
            accepted
                .read_exact(&mut vec![0; OCTETS])
                .expect("all of it came through");
        });
        let let_through = stack
            .counters()
            .expect("asked")
            .expect("in place")
            .path_mtu
            .packets;
        assert!(let_through > family as u64, "{let_through}");
    }
}

fn a_thread_outside_the_stack_gets_no_socket() {
    let node = Node::new();
    let engine = KernelEngine::new(node.prepare());
    runtime().block_on(async {
        let error = engine.listen(&ListenOptions::new(PROXY)).expect_err("outside");
        assert_eq!(error.kind(), StreamErrorKind::NotEntered);
        let request = ConnectRequest {
            source: Some(ip(POD[0])),
            destination: at(SERVER[0], 80),
        };
        let error = engine.connect(&request).await.expect_err("outside");
        assert_eq!(error.kind(), StreamErrorKind::NotEntered, "{error}");
    });
}

fn an_aborted_stream_ends_with_a_reset() {
    let node = Node::new();
    let engine = KernelEngine::new(node.prepare());
    engine.enter_worker().expect("entered");
    runtime().block_on(async {
        let mut listener = engine.listen(&ListenOptions::new(PROXY)).expect("listening");
        let mut client = node.client(at(SERVICE[0], 80)).expect("connected");
        let stream: Stream = listener.accept().await.expect("accepted").stream;
        stream.abort();
        client.set_read_timeout(Some(DEADLINE)).expect("timeout");
        assert_eq!(
            client.read(&mut [0]).expect_err("reset").kind(),
            ErrorKind::ConnectionReset
        );
    });
}

/// The router's table for what comes from the stack.
const FROM_STACK: u32 = 20;

/// A node without a dataplane.
struct Node {
    pod: Namespace,
    server: Namespace,
    router: Namespace,
    stack: Namespace,
}

impl Node {
    fn new() -> Self {
        let create = || Namespace::create().expect("created");
        let node = Self {
            pod: create(),
            server: create(),
            router: create(),
            stack: create(),
        };
        let mut router = Netlink::open_in(&node.router).expect("socket");
        let ingress = IngressPort::new(INGRESS).expect("not 0").to_mac();
        for (number, (far, name, far_name)) in [
            (&node.pod, "r-pod", "eth0"),
            (&node.server, "r-server", "eth0"),
            (&node.stack, "r-stack", "stk0"),
        ]
        .into_iter()
        .enumerate()
        {
            let mac = if name == "r-stack" {
                ingress
            } else {
                [2, 0, 0, 0, 0, number as u8]
            };
            let far_end = VethEnd::new(far_name).mac(mac).in_namespace(far);
            router
                .create_veth(&VethEnd::new(name).mac(mac), &far_end)
                .expect("veth");
            let near = router.link(name).expect("made").index;
            router
                .change_link(near, &LinkChange::new().arp(false).up())
                .expect("up");
        }
        node.host(&node.pod, POD);
        node.host(&node.server, SERVER);
        for (namespace, name) in [
            (&node.pod, "eth0"),
            (&node.server, "eth0"),
            (&node.router, "r-pod"),
            (&node.router, "r-server"),
        ] {
            runs(namespace, name);
        }
        node.route();
        node
    }

    /// An ordinary host: addresses and default routes.
    fn host(&self, namespace: &Namespace, addresses: [&str; 2]) {
        let mut netlink = Netlink::open_in(namespace).expect("socket");
        let link = netlink.link("eth0").expect("eth0").index;
        netlink
            .change_link(link, &LinkChange::new().arp(false).up())
            .expect("up");
        for address in addresses {
            netlink
                .add_address(&Address {
                    link,
                    net: ip(address).into(),
                })
                .expect("address");
        }
        netlink.add_route(&Route::default_v4().on(link)).expect("route");
        netlink.add_route(&Route::default_v6().on(link)).expect("route");
    }

    fn route(&self) {
        let mut netlink = Netlink::open_in(&self.router).expect("socket");
        let mut link = |name| netlink.link(name).expect(name).index;
        let (pod, server, stack) = (link("r-pod"), link("r-server"), link("r-stack"));
        let settings =
            ["ipv4/ip_forward", "ipv6/conf/all/forwarding"].map(|key| (key.to_owned(), "1".to_owned()));
        sysctl::set_all(&self.router, &settings).expect("forwarding");
        // Reports of path MTU need a sender.
        for address in ["10.9.0.1", "fd09::1"] {
            netlink
                .add_address(&Address {
                    link: stack,
                    net: ip(address).into(),
                })
                .expect("address");
        }
        for family in 0..2 {
            netlink
                .add_route(&host_route(POD[family]).on(pod).table(FROM_STACK))
                .expect("route");
            netlink
                .add_route(&host_route(SERVER[family]).on(server).table(FROM_STACK))
                .expect("route");
            netlink
                .add_rule(&Rule::incoming(family == 1, "r-stack", FROM_STACK, 10))
                .expect("rule");
        }
        netlink.add_route(&Route::default_v4().on(stack)).expect("route");
        netlink.add_route(&Route::default_v6().on(stack)).expect("route");
    }

    fn prepare(&self) -> KernelStack {
        let stack = KernelStack::prepare(&self.stack, config()).expect("prepared");
        for (namespace, name) in [(&self.stack, "stk0"), (&self.router, "r-stack")] {
            runs(namespace, name);
        }
        stack
    }

    /// A client in the pod.
    fn client(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        self.pod
            .run(|| TcpStream::connect_timeout(&to, DEADLINE))
            .expect("ran")
    }

    fn refuses(&self, to: SocketAddr) {
        let start = Instant::now();
        let error = self.client(to).expect_err("no proxy");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        assert!(start.elapsed() < AT_ONCE, "{to}: {:?}", start.elapsed());
    }

    /// A datagram from the pod is dropped and reaches no wildcard socket of the stack.
    fn drops_datagrams(&self, to: &str, wildcard: &str) {
        // Larger than what the router's own IPv6 housekeeping adds to the counter.
        const OCTETS: usize = 1400;
        let receiver = self
            .stack
            .run(|| UdpSocket::bind(at(wildcard, 5353)))
            .expect("ran")
            .expect("bound");
        let sender = self
            .pod
            .run(|| UdpSocket::bind(at(wildcard, 0)))
            .expect("ran")
            .expect("bound");
        let mut tables = NfTables::open_in(&self.stack).expect("socket");
        let mut dropped = || {
            tables
                .counters()
                .expect("asked")
                .expect("in place")
                .dropped
                .octets
        };
        let before = dropped();
        sender.send_to(&[0; OCTETS], at(to, 5353)).expect("sent");
        until("it is dropped", || dropped() >= before + OCTETS as u64);
        receiver.set_nonblocking(true).expect("non-blocking");
        assert_eq!(
            receiver.recv(&mut [0; OCTETS]).expect_err("nothing came").kind(),
            ErrorKind::WouldBlock
        );
    }

    fn server(&self, at: SocketAddr) -> TcpListener {
        self.server
            .run(|| TcpListener::bind(at))
            .expect("ran")
            .expect("bound")
    }

    /// A transparent listener as a plain blocking socket.
    fn listen(&self, options: &ListenOptions) -> TcpListener {
        let listener = self
            .stack
            .run(|| transparent_listener(options))
            .expect("ran")
            .expect("listening");
        listener.set_nonblocking(false).expect("blocking");
        listener
    }
}

/// Waits until an interface passes packets.
fn runs(namespace: &Namespace, name: &str) {
    let mut netlink = Netlink::open_in(namespace).expect("socket");
    until("it passes packets", || netlink.link(name).expect(name).running);
}

fn config() -> KernelStackConfig {
    let local = LocalSource {
        v4: Some(LOCAL[0].parse().expect("v4")),
        v6: Some(LOCAL[1].parse().expect("v6")),
    };
    KernelStackConfig::new("stk0", PROXY, local)
}

fn host_route(address: &str) -> Route {
    Route::new(ip(address).into())
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime")
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "not in {DEADLINE:?}: {what}");
        std::thread::yield_now();
    }
}
