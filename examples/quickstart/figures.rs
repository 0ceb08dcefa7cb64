//! Latency, CPU and memory of the mesh beside a plain veth pair.
//!
//! Latency is measured at one connection, twice: with every process bound to one CPU, and with the scheduler free to
//! choose. Where waking another core is dear, the two differ by more than anything in between.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use dpumesh_examples::children::Process;
use dpumesh_examples::measure::{CpuMeter, cpus, pin, resident_kib};
use dpumesh_examples::report::{Progress, Report};
use dpumesh_examples::workload::http_client::Summary;
use dpumesh_examples::workload::{self, READY};
use dpumesh_hw::netlink::{Address, LinkChange, Netlink, VethEnd};
use dpumesh_hw::netns::Namespace;
use ipnet::IpNet;

use super::mesh::{HTTP_PORT, SERVICE_PORT, http_service};
use super::node::Result;
use super::scenarios::World;

/// Requests of one latency measurement.
const REQUESTS: &str = "2000";
/// How long CPU is measured.
const LOAD_MS: &str = "3000";
/// Connections under which it is measured.
const CONNECTIONS: &str = "32";
const PATIENCE: Duration = Duration::from_secs(10);

/// Measures everything and enters it into the report.
pub(crate) fn measure(world: &World, report: &mut Report, progress: &Progress) -> Result<()> {
    let direct = Direct::start(world)?;
    let all = cpus()?;
    for (pinning, chosen) in [("one core", &all[..1]), ("free", &all[..])] {
        progress.step(&format!("latency, {pinning}"));
        bind(world, &direct, chosen)?;
        let straight = SocketAddr::new(direct.address, HTTP_PORT).to_string();
        let service = SocketAddr::new(http_service(false), SERVICE_PORT).to_string();
        let client = &world.client().namespace;
        let paths = [
            ("direct", &direct.client, straight, "direct"),
            ("mesh, same node", client, service.clone(), "local"),
            ("mesh, across nodes", client, service, "remote"),
        ];
        for (path, namespace, address, host) in paths {
            let arguments = ["http-get", &address, "--host", host, "--count", REQUESTS];
            let summary: Summary = world.play(namespace, &arguments)?;
            report
                .latency_us
                .set(format!("{path}, {pinning}"), summary.latency_us);
        }
    }
    progress.step("CPU for a request");
    cpu(world, report)?;
    for node in &world.nodes.all {
        let (dataplane, proxy) = node.processes();
        report.rss_kib.set(
            format!("dataplane, node {}", node.index + 1),
            resident_kib(dataplane)?,
        );
        if let Some(proxy) = proxy {
            report
                .rss_kib
                .set(format!("proxy, node {}", node.index + 1), resident_kib(proxy)?);
        }
    }
    Ok(())
}

/// CPU of the first node's dataplane and proxy for a request that stays on the node, at 32 connections.
fn cpu(world: &World, report: &mut Report) -> Result<()> {
    let (dataplane, proxy) = world.nodes.all[0].processes();
    let proxy = proxy.ok_or("the proxy is not running")?;
    let meter = CpuMeter::start([("dataplane", dataplane), ("proxy", proxy)])?;
    let service = SocketAddr::new(http_service(false), SERVICE_PORT).to_string();
    let arguments = [
        "http-get",
        &service,
        "--host",
        "local",
        "--connections",
        CONNECTIONS,
        "--for-ms",
        LOAD_MS,
    ];
    let summary: Summary = world.play(&world.client().namespace, &arguments)?;
    let spent = meter.per_unit(summary.answered)?;
    let sum = spent.iter().map(|(_, micros)| micros).sum();
    for (name, micros) in spent {
        report.cpu_us_per_request.set(name, micros);
    }
    report.cpu_us_per_request.set("sum", sum);
    Ok(())
}

/// Binds everything that takes part to some CPUs: dataplanes, proxies, servers, and the clients, which inherit ours.
fn bind(world: &World, direct: &Direct, chosen: &[usize]) -> Result<()> {
    pin(std::process::id(), chosen)?;
    for node in &world.nodes.all {
        let (dataplane, proxy) = node.processes();
        for process in [Some(dataplane), proxy].into_iter().flatten() {
            pin(process, chosen)?;
        }
    }
    for server in world.servers().chain([&direct.server]) {
        pin(server.id(), chosen)?;
    }
    Ok(())
}

/// Two namespaces joined by a veth pair: what the mesh is compared with.
struct Direct {
    client: Namespace,
    address: IpAddr,
    // Ended before its namespace.
    server: Process,
    _namespace: Namespace,
}

impl Direct {
    fn start(world: &World) -> Result<Self> {
        let (client, server) = (Namespace::create()?, Namespace::create()?);
        let [near, far] = [&client, &server].map(|namespace| VethEnd::new("direct0").in_namespace(namespace));
        Netlink::open_in(&client)?.create_veth(&near, &far)?;
        let address = |end| IpAddr::V4(Ipv4Addr::new(192, 0, 2, end));
        for (namespace, end) in [(&client, 129), (&server, 130)] {
            let mut netlink = Netlink::open_in(namespace)?;
            let link = netlink.link("direct0")?;
            netlink.change_link(link.index, &LinkChange::new().up())?;
            netlink.add_address(&Address {
                link: link.index,
                net: IpNet::new(address(end), 30)?,
            })?;
        }
        let command = workload::command([
            "http-server".to_owned(),
            format!("0.0.0.0:{HTTP_PORT}"),
            "direct".to_owned(),
        ]);
        let mut process = Process::start(&world.run, "http-server, direct", &server, command)?;
        process.wait_for_line(READY, PATIENCE)?;
        Ok(Self {
            client,
            address: address(130),
            server: process,
            _namespace: server,
        })
    }
}
