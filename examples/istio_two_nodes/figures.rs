//! What is measured: latency and CPU of requests that cross nodes under mutual TLS, and memory.

use dpumesh_examples::measure::{CpuMeter, resident_kib};
use dpumesh_examples::report::{Progress, Report};

use super::Result;
use super::scenarios::ensure;
use super::world::{RATINGS, World};

/// Requests of one measurement.
const REQUESTS: u64 = 5000;

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
