//! What is measured: latency and CPU of requests that cross nodes under mutual TLS, and memory, on request also that of a
//! node with many pods beside a node with one, which is what a sidecar would hold.

use std::net::{Ipv4Addr, SocketAddr};

use dpumesh_examples::measure::{CpuMeter, resident_kib};
use dpumesh_examples::report::{Progress, Report};

use serde_json::json;

use super::Result;
use super::kubelet::{HTTP_PORT, NAMESPACE, PodSpec};
use super::node::list;
use super::scenarios::ensure;
use super::world::{RATINGS, SERVICES, STOCK, World};

/// Requests of one measurement.
const REQUESTS: u64 = 5000;

/// Services beside the mesh's own, and pods of the first node, where memory is measured at scale.
const SCALE: (u8, usize) = (200, 20);

/// Measures on the quiet mesh.
pub(crate) fn measure(world: &World, report: &mut Report, progress: &Progress) -> Result<()> {
    progress.step("CPU for a request across nodes, mutual TLS");
    let mut processes = Vec::new();
    for node in &world.nodes.all {
        let number = node.index + 1;
        processes.push((format!("dpu-dataplane-{number}"), node.dataplane.id()));
        if let Some(proxy) = &node.proxy {
            processes.push((proxy.name().to_owned(), proxy.id()));
        }
    }
    let ask = |count| world.get("front-1", RATINGS, count, &|options| options.connections = 8);
    ask(500)?;
    let meter = CpuMeter::start(processes.iter().map(|(name, pid)| (name.as_str(), *pid)))?;
    let summary = ask(REQUESTS)?;
    let spent = meter.per_unit(REQUESTS)?;
    ensure(summary.statuses.get(&200) == Some(&REQUESTS), || {
        format!("{:?}", summary.statuses)
    })?;
    let sum = |part: &str| {
        spent
            .iter()
            .filter(|(name, _)| name.starts_with(part))
            .map(|(_, us)| us)
            .sum()
    };
    report
        .cpu_us_per_request
        .set("both proxies, 8 connections", sum("proxy"));
    report
        .cpu_us_per_request
        .set("both dataplanes, 8 connections", sum("dpu-dataplane"));
    report
        .latency_us
        .set("across nodes, 8 connections", summary.latency_us);
    if let Some(ordinary) = &world.nodes.ordinary {
        progress.step("CPU for a request between two ordinary sidecars, mutual TLS");
        let envoys = ordinary
            .sidecars
            .iter()
            .map(|sidecar| (sidecar.pod.as_str(), sidecar.envoy.id()));
        let ask = |count| world.get("orders-1", STOCK, count, &|options| options.connections = 8);
        ask(500)?;
        let meter = CpuMeter::start(envoys)?;
        let beside = ask(REQUESTS)?;
        let spent = meter.per_unit(REQUESTS)?;
        ensure(beside.statuses.get(&200) == Some(&REQUESTS), || {
            format!("{:?}", beside.statuses)
        })?;
        report.cpu_us_per_request.set(
            "two ordinary sidecars on one node, 8 connections",
            spent.iter().map(|(_, us)| us).sum(),
        );
        report
            .latency_us
            .set("between ordinary sidecars, 8 connections", beside.latency_us);
        let sidecar = ordinary.sidecar("orders-1")?;
        report
            .rss_kib
            .set(sidecar.envoy.name(), resident_kib(sidecar.envoy.id())?);
    }
    let one = world.get("front-1", RATINGS, 1000, &|_| {})?;
    report
        .latency_us
        .set("across nodes, 1 connection", one.latency_us);
    for node in &world.nodes.all {
        for process in [&node.proxy, &node.adapter, &node.agent].into_iter().flatten() {
            report.rss_kib.set(process.name(), resident_kib(process.id())?);
        }
        report
            .rss_kib
            .set(node.dataplane.name(), resident_kib(node.dataplane.id())?);
    }
    Ok(())
}

/// Memory of the first node's programs with one pod and with many, and many services, beside an ordinary sidecar that knows the same services,
/// and as many of those as there are pods. A sidecar is its Envoy here; Istio's agent beside it is not counted.
pub(crate) fn scale(world: &mut World, report: &mut Report, progress: &Progress) -> Result<()> {
    let (services, pods) = SCALE;
    progress.step(&format!("memory: 1 pod and {services} services"));
    let objects = (1..=services).map(|number| {
        json!({"apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("more-{number}"), "namespace": NAMESPACE},
            "spec": {"clusterIP": Ipv4Addr::new(10, 96, 2, number), "selector": {"app": RATINGS.name},
                "ports": [{"name": "http", "port": 80, "targetPort": HTTP_PORT}]}})
    });
    world.nodes.control.apply(&list(objects.collect()))?;
    world.remove_pod("reviews-1")?;
    let last = SocketAddr::from((Ipv4Addr::new(10, 96, 2, services), 80));
    reaches(world, "front-1", last)?;
    remember(world, report, 1, services)?;
    progress.step(&format!("memory: {pods} pods and {services} services"));
    for number in 1..pods {
        let app = SERVICES[number % SERVICES.len()].name;
        world.add_pods(&[PodSpec::new(&format!("more-{number}"), app, "v1", 0)])?;
    }
    reaches(world, &format!("more-{}", pods - 1), last)?;
    remember(world, report, pods, services)
}

fn reaches(world: &World, from: &str, address: SocketAddr) -> Result<()> {
    world.until("the last service answers", |world| {
        let answered = world.get(from, RATINGS, 1, &|options| {
            options.address = address;
            options.host = Some(address.ip().to_string());
        })?;
        Ok(answered.statuses.get(&200) == Some(&1))
    })
}

fn remember(world: &World, report: &mut Report, pods: usize, services: u8) -> Result<()> {
    let what = format!("pods: {pods}, services: {services}");
    let node = &world.nodes.all[0];
    for process in [&node.proxy, &node.adapter].into_iter().flatten() {
        let name = format!("{}: {what}", process.name());
        report.rss_kib.set(&name, resident_kib(process.id())?);
    }
    let Some(ordinary) = &world.nodes.ordinary else {
        return Ok(());
    };
    let sidecar = resident_kib(ordinary.sidecar("orders-1")?.envoy.id())?;
    let name = format!("one ordinary sidecar (Envoy alone): {what}");
    report.rss_kib.set(&name, sidecar);
    if pods > 1 {
        let name = format!("{pods} ordinary sidecars of {sidecar} KiB: {what}");
        report.rss_kib.set(&name, sidecar * pods as u64);
    }
    Ok(())
}
