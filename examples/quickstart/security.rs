//! Mutual TLS between the nodes, and what it is good for.

use std::time::{Duration, Instant};

use dpumesh_examples::capture::{Capture, Captured};
use dpumesh_examples::workload::http_client::Summary;

use super::faults;
use super::node::{Nodes, Result, WIRE};
use super::scenarios::{PATIENCE, World, all_from, ensure};
use super::trust::identity;

/// Renewals while requests go on.
const RENEWALS: usize = 5;

pub(crate) fn mutual_tls(world: &mut World) -> Result<String> {
    let (secure, hidden) = captured(world, "secure")?;
    let (_, plain) = captured(world, "remote")?;
    let readable = |captured: &Captured| captured.count(|frame| frame.contains(b"HTTP/1.1"));
    ensure(hidden.lost == 0 && plain.lost == 0, || {
        "the capture lost frames".to_owned()
    })?;
    ensure(readable(&hidden) == 0, || {
        format!("{} frames on the wire can be read", readable(&hidden))
    })?;
    // That what would be seen is seen.
    ensure(readable(&plain) >= 200, || {
        format!(
            "only {} frames of plain requests were recognized",
            readable(&plain)
        )
    })?;
    Ok(format!(
        "200 of 200 from {}; of {} frames on the wire none can be read, of the same requests without TLS {}; p50 {:.0} µs",
        world.nodes.pod(1, 1).pod.name,
        hidden.frames.len(),
        readable(&plain),
        secure.latency_us.p50
    ))
}

fn captured(world: &World, host: &str) -> Result<(Summary, Captured)> {
    let capture = Capture::start(&world.nodes.all[0].own.soc, WIRE, |_| true)?;
    let summary = world.get(host, 200, &[])?;
    let captured = capture.stop()?;
    all_from(&summary, 200, world.nodes.pod(1, 1), world.client())?;
    Ok((summary, captured))
}

pub(crate) fn authorization(world: &mut World) -> Result<String> {
    let statuses = |summary: &Summary| summary.statuses.clone();
    let path = statuses(&world.get("secure", 20, &["--path", "/admin"])?);
    ensure(path.get(&403) == Some(&20), || format!("for /admin: {path:?}"))?;
    // Another identity: the same requests from the other node.
    let other = world.nodes.pod(1, 0);
    let identity = statuses(&world.get_from(other, false, "secure", 20, &[])?);
    ensure(identity.get(&403) == Some(&20), || {
        format!("of {}: {identity:?}", other.pod.name)
    })?;
    let allowed = world.get("secure", 20, &[])?;
    all_from(&allowed, 20, world.nodes.pod(1, 1), world.client())?;
    Ok("403 for 20 of 20 requests to /admin and for 20 of 20 of an identity without permission; 200 for the others".to_owned())
}

pub(crate) fn retry(world: &mut World) -> Result<String> {
    let without = world.get("flaky", 100, &["--reconnect"])?;
    let failed = without.statuses.get(&503).copied().unwrap_or(0);
    ensure(failed > 0, || {
        format!("nothing failed without a retry: {:?}", without.statuses)
    })?;
    let with = world.get("retried", 100, &["--reconnect"])?;
    all_from(&with, 100, world.nodes.pod(0, 1), world.client())?;
    Ok(format!(
        "one of two endpoints refuses: 503 for {failed} of 100 requests, for none of 100 where the route retries"
    ))
}

/// New keys and certificates while requests go on, on connections that last for ten requests each.
pub(crate) fn renewal(world: &mut World) -> Result<String> {
    let before = handshakes(world)?;
    let load = faults::load_to(world, "secure", Duration::from_secs(4))?;
    for _ in 0..RENEWALS {
        renew(&world.nodes, identity(0))?;
        await_handshakes(world, handshakes(world)? + 20)?;
    }
    let summary: Summary = load.result()??;
    let answered = summary.statuses.values().sum();
    all_from(&summary, answered, world.nodes.pod(1, 1), world.client())?;
    ensure(summary.errors.is_empty(), || {
        format!("errors {:?}", summary.errors)
    })?;
    let made = handshakes(world)? - before;
    // That a new certificate is what is shown: one for an identity that nobody lets in.
    renew(
        &world.nodes,
        "spiffe://quickstart.test/ns/default/sa/stranger".to_owned(),
    )?;
    await_status(world, 403)?;
    renew(&world.nodes, identity(0))?;
    await_status(world, 200)?;
    Ok(format!(
        "{RENEWALS} renewals on both nodes: all {answered} requests answered, {made} handshakes; with a stranger's certificate 403, and 200 again"
    ))
}

/// New certificates for both nodes; the first node's for `identity`.
fn renew(nodes: &Nodes, first: String) -> Result<()> {
    for (node, identity) in nodes.all.iter().zip([first, identity(1)]) {
        nodes.authority.issue(&identity, &node.secrets())?;
    }
    Ok(())
}

/// Handshakes that the first node's proxy has made with the other's.
fn handshakes(world: &World) -> Result<u64> {
    let stats = world.nodes.all[0].ask_proxy("/stats")?;
    let line = stats
        .lines()
        .find_map(|line| line.strip_prefix("cluster.secure-v4.ssl.handshake: "));
    Ok(line.ok_or("the proxy counts no handshakes")?.trim().parse()?)
}

fn await_handshakes(world: &World, count: u64) -> Result<()> {
    let begun = Instant::now();
    while handshakes(world)? < count {
        ensure(begun.elapsed() < PATIENCE, || "no new handshakes".to_owned())?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn await_status(world: &World, status: u16) -> Result<()> {
    let begun = Instant::now();
    loop {
        // More than one connection carries, so that a new one is made.
        let summary = world.get("secure", 20, &[])?;
        if summary.statuses.get(&status) == Some(&20) {
            return Ok(());
        }
        ensure(begun.elapsed() < PATIENCE, || {
            format!("statuses {:?} instead of {status}", summary.statuses)
        })?;
    }
}
