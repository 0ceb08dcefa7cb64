//! What pods on DPUs and pods behind ordinary sidecars of the same istiod have to do with each other, and what a client outside of the mesh may.

use std::cell::RefCell;
use std::net::SocketAddr;

use dpumesh_examples::capture::{Capture, Captured};
use dpumesh_examples::workload::http_client::{self, Options, Summary};

use super::Result;
use super::kubelet::HTTP_PORT;
use super::ordinary::Ordinary;
use super::scenarios::{SECRET, Scenario, by, ensure, is_tls_data, told, with};
use super::world::{FRONT, ORDERS, REVIEWS, STOCK, Service, World};

/// All of them, in order.
pub(crate) const ALL: &[Scenario] = &[
    ("ordinary sidecar: PERMISSIVE, then STRICT", both_ways),
    ("ordinary sidecar: allow by principal", principals),
    ("a plain client from outside", outsider),
];

const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

/// Who asks whom: to a DPU's pods on either node, from them, and between ordinary sidecars.
const CALLS: [(&str, Service); 5] = [
    ("orders-1", REVIEWS),
    ("orders-1", FRONT),
    ("front-1", ORDERS),
    ("ratings-1", STOCK),
    ("stock-1", ORDERS),
];

/// Requests of one call.
const COUNT: u64 = 40;

/// Each call is answered by a pod of its service.
fn calls(world: &World) -> Result<u64> {
    for (from, service) in CALLS {
        let summary = world.get(from, service, COUNT, &|options| {
            options.path = SECRET.to_owned();
            options.reconnect = true;
        })?;
        let own = |server: &String| server.starts_with(service.name);
        let right = with(&summary, 200) == COUNT && summary.served_by.keys().all(own);
        ensure(right, || {
            format!("{from} to {}: {}", service.name, told(&summary))
        })?;
    }
    Ok(CALLS.len() as u64 * COUNT)
}

/// What the ordinary machine's uplink carries meanwhile.
fn watched<T>(world: &World, work: impl FnOnce() -> Result<T>) -> Result<(T, Captured)> {
    let capture = Capture::start(&world.ordinary()?.machine, Ordinary::UPLINK, |_| true)?;
    let outcome = work()?;
    Ok((outcome, capture.stop()?))
}

fn reachable(world: &World) -> Result<()> {
    for (from, service) in CALLS {
        let last = RefCell::new(Summary::default());
        let reached = world.until(&format!("{from} reaches {}", service.name), |world| {
            let summary = world.get(from, service, 1, &|_| {})?;
            *last.borrow_mut() = summary;
            Ok(with(&last.borrow(), 200) == 1)
        });
        reached.map_err(|error| format!("{error}: {}", told(&last.borrow())))?;
    }
    Ok(())
}

fn both_ways(world: &mut World) -> Result<String> {
    reachable(world)?;
    let mut seen = Vec::new();
    for mode in ["PERMISSIVE", "STRICT"] {
        if mode == "STRICT" {
            world.apply(STRICT, |world| Ok(plainly(world, 1)?.answered == 0))?;
        }
        let (answered, captured) = watched(world, || calls(world))?;
        let plain = captured.count(|frame| frame.contains(SECRET.as_bytes()));
        let records = captured.count(is_tls_data);
        ensure(plain == 0 && records > 0, || {
            format!("{mode}: {plain} frames with the request's path, {records} TLS records")
        })?;
        seen.push(format!(
            "{mode}: {answered} of {answered}, {records} TLS records and no octet of the request on the wire"
        ));
    }
    world.revert_until(|world| Ok(plainly(world, 1)?.answered == 1))?;
    Ok(seen.join("; "))
}

/// Only `principal` may call `service`.
fn only(service: Service, principal: &str) -> String {
    let name = service.name;
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}-only, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/shop/sa/{principal}]}}}}]
"
    )
}

/// Who a caller is seen as, on either side: a pod on a DPU by an ordinary sidecar, and the other way round.
fn principals(world: &mut World) -> Result<String> {
    reachable(world)?;
    let yaml = format!("{}---\n{}", only(REVIEWS, ORDERS.name), only(ORDERS, FRONT.name));
    let expected = [
        ("orders-1", REVIEWS, 200),
        ("stock-1", REVIEWS, 403),
        ("front-1", REVIEWS, 403),
        ("front-1", ORDERS, 200),
        ("ratings-1", ORDERS, 403),
        ("stock-1", ORDERS, 403),
    ];
    let holds = |world: &World, count: u64| -> Result<Option<String>> {
        for (from, service, status) in expected {
            let summary = world.get(from, service, count, &|_| {})?;
            if with(&summary, status) != count {
                return Ok(Some(format!("{from} to {}: {}", service.name, told(&summary))));
            }
        }
        Ok(None)
    };
    let effect = world.apply(&yaml, |world| Ok(holds(world, 12)?.is_none()))?;
    if let Some(wrong) = holds(world, COUNT)? {
        return Err(wrong.into());
    }
    world.revert_until(|world| {
        let mut reached = expected
            .iter()
            .map(|(from, service, _)| world.get(from, *service, 12, &|_| {}));
        reached.try_fold(true, |all, summary| Ok(all && with(&summary?, 200) == 12))
    })?;
    let told = expected.map(|(from, service, status)| format!("{from} to {} {status}", service.name));
    Ok(format!("{}; {effect}", told.join(", ")))
}

/// Requests from outside of the mesh for a pod on the first node, in clear text, each on its own connection.
fn plainly(world: &World, count: u64) -> Result<Summary> {
    let to = world.nodes.pod("reviews-1")?.address;
    let mut options = Options::new(SocketAddr::new(to, HTTP_PORT));
    options.count = count;
    options.reconnect = true;
    options.path = SECRET.to_owned();
    options.timeout_ms = 5000;
    Ok(world.ordinary()?.outsider.run(|| http_client::get(&options))??)
}

fn outsider(world: &mut World) -> Result<String> {
    world.until("PERMISSIVE answers plaintext", |world| {
        Ok(plainly(world, 1)?.answered == 1)
    })?;
    let permissive = plainly(world, COUNT)?;
    ensure(by(&permissive, "reviews-1") == COUNT, || {
        format!("PERMISSIVE: {}", told(&permissive))
    })?;
    let effect = world.apply(STRICT, |world| Ok(plainly(world, 1)?.answered == 0))?;
    let before = world.nodes.all[0].denied()?;
    let (refused, captured) = watched(world, || plainly(world, COUNT))?;
    let counted = world.nodes.all[0].denied()? - before;
    ensure(refused.answered == 0, || format!("STRICT: {}", told(&refused)))?;
    ensure(counted == COUNT, || {
        format!("the proxy counted {counted} of {COUNT} refused connections")
    })?;
    let arrived = captured.count(|frame| frame.contains(SECRET.as_bytes()));
    ensure(arrived > 0, || "the plaintext was not on the wire".to_owned())?;
    let inside = world.get("orders-1", REVIEWS, COUNT, &|_| {})?;
    ensure(with(&inside, 200) == COUNT, || {
        format!("by an ordinary sidecar meanwhile: {}", told(&inside))
    })?;
    world.revert_until(|world| Ok(plainly(world, 1)?.answered == 1))?;
    Ok(format!(
        "plaintext is answered while PERMISSIVE, {COUNT} of {COUNT} refused by STRICT with {:?} and counted by the proxy; {effect}",
        refused.errors.keys().collect::<Vec<_>>()
    ))
}
