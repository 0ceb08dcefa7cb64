//! What Istio's YAML has to change, one scenario each, as programs in the pods see it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use dpumesh_examples::capture::{Capture, Frame};
use dpumesh_examples::workload::http_client::{Options, Summary};

use super::Result;
use super::kubelet::PodSpec;
use super::node::WIRE;
use super::world::{FRONT, RATINGS, REVIEWS, SERVICES, World};

/// A scenario: its name and how it is played.
pub(crate) type Scenario = (&'static str, fn(&mut World) -> Result<String>);

/// All of them, in order.
pub(crate) const ALL: &[Scenario] = &[
    ("plain calls between all pods", plain),
    ("VirtualService: 90/10, then 50/50", split),
    ("VirtualService: route by header", header_route),
    ("DestinationRule: subsets", subsets),
    ("VirtualService: timeout", timeout),
    ("VirtualService: retries", retries),
    ("VirtualService: faults", faults),
    ("AuthorizationPolicy: deny by path", deny),
    ("AuthorizationPolicy: allow by principal", allow),
    ("PeerAuthentication: STRICT", strict),
    ("ServiceEntry", service_entry),
    ("a pod's configuration that its proxy refuses", quarantine),
    ("a new pod joins and leaves", join_and_leave),
    ("istiod stopped", istiod_stopped),
    ("adapter killed", adapter_killed),
    ("proxy killed", proxy_killed),
    ("node agent restarted", agent_restarted),
];

/// Fails with `message` unless it holds.
pub(crate) fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(message().into()) }
}

pub(crate) fn told(summary: &Summary) -> String {
    let failure = summary
        .failure
        .as_ref()
        .map_or_else(String::new, |answer| format!(", one of them {answer:?}"));
    format!(
        "statuses {:?}, served by {:?}, errors {:?}{failure}",
        summary.statuses, summary.served_by, summary.errors
    )
}

/// How many were answered with this status.
pub(crate) fn with(summary: &Summary, status: u16) -> u64 {
    summary.statuses.get(&status).copied().unwrap_or(0)
}

pub(crate) fn by(summary: &Summary, pod: &str) -> u64 {
    summary.served_by.get(pod).copied().unwrap_or(0)
}

/// The subsets that routes speak of.
const SUBSETS: &str = "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec:
  host: reviews.shop.svc.cluster.local
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
";

/// A VirtualService for reviews with these entries of `http`. Each answer by it names its step.
fn reviews(step: &str, http: &str) -> String {
    let indented: String = http.lines().map(|line| format!("  {line}\n")).collect();
    let marked = indented.replace(
        "MARK",
        &format!("headers: {{response: {{set: {{x-step: {step}}}}}}}"),
    );
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: reviews, namespace: shop}}\nspec:\n  hosts: [reviews.shop.svc.cluster.local]\n  http:\n{marked}"
    )
}

/// A VirtualService for reviews that does nothing but name its step.
fn marked(step: &str) -> String {
    reviews(
        step,
        "- MARK\n  route: [{destination: {host: reviews.shop.svc.cluster.local}}]",
    )
}

fn weighted(first: u32) -> String {
    let second = 100 - first;
    reviews(
        &format!("w{first}"),
        &format!(
            "- MARK\n  route:\n  - {{destination: {{host: reviews.shop.svc.cluster.local, subset: v1}}, weight: {first}}}\n  - {{destination: {{host: reviews.shop.svc.cluster.local, subset: v2}}, weight: {second}}}"
        ),
    )
}

/// Who asks, one on each node.
const CLIENTS: [&str; 2] = ["front-1", "ratings-1"];

/// Whether the next answers on both nodes are by this step; an empty one: by none.
fn step(world: &World, wanted: &str) -> Result<bool> {
    for from in CLIENTS {
        let summary = world.get(from, REVIEWS, 1, &|_| {})?;
        let seen = summary
            .first
            .as_ref()
            .and_then(|answer| answer.headers.get("x-step"));
        if !summary.statuses.contains_key(&200) || seen.map_or("", String::as_str) != wanted {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether both pods of reviews answer this path with this status, asked from either node.
pub(crate) fn answers(world: &World, from: &[&str], path: &str, status: u16) -> Result<bool> {
    for from in from {
        let summary = world.get(from, REVIEWS, 12, &|options| options.path = path.to_owned())?;
        if with(&summary, status) != 12 {
            return Ok(false);
        }
    }
    Ok(true)
}

fn plain(world: &mut World) -> Result<String> {
    let names: Vec<String> = world.nodes.pods().map(|pod| pod.spec.name.clone()).collect();
    let mut answered = 0;
    for from in &names {
        for service in SERVICES
            .into_iter()
            .filter(|service| !from.starts_with(service.name))
        {
            world.until(&format!("{from} reaches {}", service.name), |world| {
                let summary = world.get(from, service, 1, &|_| {})?;
                Ok(summary.statuses.contains_key(&200))
            })?;
            let summary = world.get(from, service, 10, &|_| {})?;
            let own = |server: &String| server.starts_with(service.name);
            let right = with(&summary, 200) == 10 && summary.served_by.keys().all(own);
            ensure(right, || {
                format!("{from} to {}: {}", service.name, told(&summary))
            })?;
            answered += 10;
        }
        for to in names.iter().filter(|to| *to != from) {
            let summary = world.get_at(from, world.nodes.pod(to)?.address, 5)?;
            let right = with(&summary, 200) == 5 && by(&summary, to) == 5;
            ensure(right, || format!("{from} to {to} by address: {}", told(&summary)))?;
            answered += 5;
        }
    }
    Ok(format!(
        "{answered} of {answered} answered with 200, by service and by address, on one node and across"
    ))
}

fn split(world: &mut World) -> Result<String> {
    let first = world.apply(&format!("{SUBSETS}---\n{}", weighted(90)), |world| {
        step(world, "w90")
    })?;
    let many = world.get("front-1", REVIEWS, 2000, &|options| options.connections = 4)?;
    let few = by(&many, "reviews-2");
    // 2000 draws at 10 %: five standard deviations are 67.
    ensure(with(&many, 200) == 2000 && few.abs_diff(200) <= 67, || {
        told(&many)
    })?;
    let second = world.apply(&format!("{SUBSETS}---\n{}", weighted(50)), |world| {
        step(world, "w50")
    })?;
    let halves = world.get("front-1", REVIEWS, 2000, &|options| options.connections = 4)?;
    let half = by(&halves, "reviews-2");
    ensure(with(&halves, 200) == 2000 && half.abs_diff(1000) <= 112, || {
        told(&halves)
    })?;
    let reverted = world.revert_until(|world| step(world, ""))?;
    Ok(format!(
        "{} to {few} of 2000, {first}; then {} to {half}, {second}; reverted after {} ms",
        2000 - few,
        2000 - half,
        reverted.as_millis()
    ))
}

fn header_route(world: &mut World) -> Result<String> {
    let yaml = reviews(
        "header",
        "- MARK\n  match: [{headers: {x-version: {exact: \"2\"}}}]\n  route: [{destination: {host: reviews.shop.svc.cluster.local, subset: v2}}]\n- MARK\n  route: [{destination: {host: reviews.shop.svc.cluster.local, subset: v1}}]",
    );
    let effect = world.apply(&format!("{SUBSETS}---\n{yaml}"), |world| step(world, "header"))?;
    let version = |options: &mut Options| options.headers.push(("x-version".to_owned(), "2".to_owned()));
    let chosen = world.get("front-1", REVIEWS, 100, &version)?;
    let others = world.get("front-1", REVIEWS, 100, &|_| {})?;
    let right = by(&chosen, "reviews-2") == 100 && by(&others, "reviews-1") == 100;
    ensure(right, || {
        format!("with the header: {}; without: {}", told(&chosen), told(&others))
    })?;
    world.revert_until(|world| step(world, ""))?;
    Ok(format!(
        "x-version: 2 to reviews-2, 100 of 100, all others to reviews-1; {effect}"
    ))
}

fn subsets(world: &mut World) -> Result<String> {
    let to = |subset: &str| {
        let http = format!(
            "- MARK\n  route: [{{destination: {{host: reviews.shop.svc.cluster.local, subset: {subset}}}}}]"
        );
        format!("{SUBSETS}---\n{}", reviews(subset, &http))
    };
    let mut effects = Vec::new();
    for (subset, pod) in [("v1", "reviews-1"), ("v2", "reviews-2")] {
        effects.push(world.apply(&to(subset), |world| step(world, subset))?);
        let summary = world.get("ratings-1", REVIEWS, 100, &|_| {})?;
        ensure(by(&summary, pod) == 100, || {
            format!("{subset}: {}", told(&summary))
        })?;
    }
    world.revert_until(|world| step(world, ""))?;
    let both = world.get("front-1", REVIEWS, 100, &|_| {})?;
    ensure(by(&both, "reviews-1") > 0 && by(&both, "reviews-2") > 0, || {
        told(&both)
    })?;
    Ok(format!(
        "v1: 100 of 100 by reviews-1; v2: 100 of 100 by reviews-2, {}; without it both",
        effects[1]
    ))
}

fn timeout(world: &mut World) -> Result<String> {
    let yaml = reviews(
        "timeout",
        "- MARK\n  timeout: 0.3s\n  route: [{destination: {host: reviews.shop.svc.cluster.local}}]",
    );
    let effect = world.apply(&yaml, |world| step(world, "timeout"))?;
    let slow = |options: &mut Options| options.path = "/slow?ms=1500".to_owned();
    let cut = world.get("front-1", REVIEWS, 3, &slow)?;
    let right = with(&cut, 504) == 3 && cut.latency_us.max < 1_200_000.0;
    ensure(right, || {
        format!("{}, slowest {:.0} µs", told(&cut), cut.latency_us.max)
    })?;
    world.revert_until(|world| step(world, ""))?;
    let whole = world.get("front-1", REVIEWS, 1, &slow)?;
    ensure(with(&whole, 200) == 1, || format!("without it: {}", told(&whole)))?;
    Ok(format!(
        "504 after {:.0} ms, the route allows 300; {effect}",
        cut.latency_us.p50 / 1000.0
    ))
}

fn retries(world: &mut World) -> Result<String> {
    let yaml = |attempts: u32| {
        reviews(
            &format!("retry{attempts}"),
            &format!(
                "- MARK\n  retries: {{attempts: {attempts}, perTryTimeout: 0.2s, retryOn: \"5xx\"}}\n  route: [{{destination: {{host: reviews.shop.svc.cluster.local}}}}]"
            ),
        )
    };
    let slow = |options: &mut Options| options.path = "/slow?ms=1900".to_owned();
    let mut took = Vec::new();
    for attempts in [1, 3] {
        let wanted = format!("retry{attempts}");
        world.apply(&yaml(attempts), |world| step(world, &wanted))?;
        let summary = world.get("front-1", REVIEWS, 2, &slow)?;
        ensure(with(&summary, 504) == 2, || told(&summary))?;
        took.push(summary.latency_us.p50 / 1000.0);
    }
    // Two tries and four of 200 ms each, with short pauses between.
    let right = (380.0..800.0).contains(&took[0]) && (780.0..1800.0).contains(&took[1]);
    ensure(right, || format!("{took:?} ms"))?;
    world.revert_until(|world| step(world, ""))?;
    Ok(format!(
        "tries of 200 ms: with 1 retry given up after {:.0} ms, with 3 after {:.0} ms",
        took[0], took[1]
    ))
}

fn faults(world: &mut World) -> Result<String> {
    let route = "route: [{destination: {host: reviews.shop.svc.cluster.local}}]";
    let yaml = reviews(
        "fault",
        &format!(
            "- MARK\n  match: [{{uri: {{prefix: /broken}}}}]\n  fault: {{abort: {{percentage: {{value: 50}}, httpStatus: 418}}}}\n  {route}\n- MARK\n  match: [{{uri: {{prefix: /late}}}}]\n  fault: {{delay: {{percentage: {{value: 100}}, fixedDelay: 0.25s}}}}\n  {route}\n- MARK\n  {route}"
        ),
    );
    let effect = world.apply(&yaml, |world| step(world, "fault"))?;
    let broken = world.get("front-1", REVIEWS, 400, &|options| {
        options.path = "/broken".to_owned()
    })?;
    let aborted = with(&broken, 418);
    // 400 draws at 50 %: five standard deviations are 50.
    ensure(
        aborted.abs_diff(200) <= 50 && aborted + with(&broken, 200) == 400,
        || told(&broken),
    )?;
    let late = world.get("front-1", REVIEWS, 3, &|options| {
        options.path = "/late".to_owned()
    })?;
    let delayed = with(&late, 200) == 3 && late.latency_us.p50 >= 250_000.0;
    ensure(delayed, || {
        format!("{}, p50 {:.0} µs", told(&late), late.latency_us.p50)
    })?;
    world.revert_until(|world| step(world, ""))?;
    let whole = world.get("front-1", REVIEWS, 50, &|options| {
        options.path = "/broken".to_owned()
    })?;
    ensure(with(&whole, 200) == 50, || {
        format!("without it: {}", told(&whole))
    })?;
    Ok(format!(
        "{aborted} of 400 aborted with 418, all of /late {:.0} ms late; {effect}",
        late.latency_us.p50 / 1000.0
    ))
}

fn deny(world: &mut World) -> Result<String> {
    let yaml = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reviews-deny, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews}}
  action: DENY
  rules:
  - to: [{operation: {paths: [\"/admin*\"]}}]
";
    let effect = world.apply(yaml, |world| answers(world, &CLIENTS, "/admin", 403))?;
    for from in CLIENTS {
        let denied = world.get(from, REVIEWS, 40, &|options| {
            options.path = "/admin/keys".to_owned()
        })?;
        let others = world.get(from, REVIEWS, 40, &|_| {})?;
        let right = with(&denied, 403) == 40 && with(&others, 200) == 40;
        ensure(right, || {
            format!("{from}: /admin/keys {}; / {}", told(&denied), told(&others))
        })?;
    }
    let reverted = world.revert_until(|world| answers(world, &CLIENTS, "/admin", 200))?;
    Ok(format!(
        "/admin* 403 on both nodes, the rest 200; {effect}; reverted after {} ms",
        reverted.as_millis()
    ))
}

fn allow(world: &mut World) -> Result<String> {
    let yaml = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reviews-allow, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/front]}}]
    to: [{operation: {paths: [\"/api/*\"]}}]
";
    let effect = world.apply(yaml, |world| {
        Ok(answers(world, &["ratings-1"], "/api/1", 403)? && answers(world, &["front-1"], "/other", 403)?)
    })?;
    let mut seen = Vec::new();
    for (from, path, expected) in [
        ("front-1", "/api/1", 200),
        ("front-1", "/other", 403),
        ("ratings-1", "/api/1", 403),
    ] {
        let summary = world.get(from, REVIEWS, 40, &|options| options.path = path.to_owned())?;
        ensure(with(&summary, expected) == 40, || {
            format!("{from} {path}: {}", told(&summary))
        })?;
        seen.push(format!("{from} {path} {expected}"));
    }
    let others = world.get("ratings-1", FRONT, 10, &|_| {})?;
    ensure(with(&others, 200) == 10, || {
        format!("front is not meant: {}", told(&others))
    })?;
    let back = world.get("front-1", RATINGS, 10, &|_| {})?;
    ensure(with(&back, 200) == 10, || {
        format!("ratings is not meant: {}", told(&back))
    })?;
    world.revert_until(|world| answers(world, &["ratings-1"], "/api/1", 200))?;
    Ok(format!("{}; {effect}", seen.join(", ")))
}

/// What a request says in its path, to be looked for on the wire.
pub(crate) const SECRET: &str = "/a-secret-in-the-path";

fn strict(world: &mut World) -> Result<String> {
    let yaml = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
";
    // Clients that are told to speak plaintext: with PERMISSIVE they may.
    let plaintext = "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews-plaintext, namespace: shop}
spec:
  host: reviews.shop.svc.cluster.local
  trafficPolicy: {tls: {mode: DISABLE}}
";
    let tls = on_the_wire(world)?;
    ensure(tls.plain == 0 && tls.records > 0, || {
        format!("between mesh proxies: {tls:?}")
    })?;
    world.apply(plaintext, |world| Ok(on_the_wire(world)?.plain > 0))?;
    let permissive = world.get("front-1", REVIEWS, 20, &|_| {})?;
    ensure(with(&permissive, 200) == 20, || {
        format!("plaintext, PERMISSIVE: {}", told(&permissive))
    })?;
    let effect = world.apply(yaml, |world| answers(world, &CLIENTS, "/", 503))?;
    let refused = world.get("front-1", REVIEWS, 40, &|options| options.reconnect = true)?;
    ensure(with(&refused, 503) == 40, || {
        format!("plaintext, STRICT: {}", told(&refused))
    })?;
    world.nodes.control.delete(plaintext)?;
    world.forget(plaintext);
    world.until("mutual TLS again", |world| answers(world, &CLIENTS, "/", 200))?;
    let again = on_the_wire(world)?;
    ensure(again.plain == 0 && again.records > 0, || {
        format!("STRICT: {again:?}")
    })?;
    world.revert()?;
    Ok(format!(
        "on the wire {} TLS records and no octet of the request; plaintext is answered while PERMISSIVE, 40 of 40 refused by STRICT; {effect}",
        again.records
    ))
}

/// What a capture between the nodes saw of requests across.
#[derive(Debug)]
struct Seen {
    /// Frames with the request's path.
    plain: usize,
    /// Frames that begin with a TLS record of application data.
    records: usize,
}

fn on_the_wire(world: &World) -> Result<Seen> {
    let capture = Capture::start(&world.nodes.all[0].soc, WIRE, |_| true)?;
    let summary = world.get("front-1", REVIEWS, 20, &|options| {
        options.path = SECRET.to_owned()
    })?;
    let captured = capture.stop()?;
    ensure(by(&summary, "reviews-2") > 0 || with(&summary, 503) > 0, || {
        told(&summary)
    })?;
    Ok(Seen {
        plain: captured.count(|frame| frame.contains(SECRET.as_bytes())),
        records: captured.count(is_tls_data),
    })
}

/// Within VXLAN: a TCP segment that begins with a record of TLS 1.2 or 1.3 (RFC 8446 §5.1).
pub(crate) fn is_tls_data(frame: &Frame) -> bool {
    const OUTER: usize = 14 + 20 + 8 + 8; // Ethernet, IPv4 without options, UDP, VXLAN
    const INNER: usize = OUTER + 14 + 20; // Ethernet, IPv4 without options
    let Some(tcp) = frame.octets.get(INNER..) else {
        return false;
    };
    let payload = tcp
        .get(12)
        .and_then(|offset| tcp.get(usize::from(offset >> 4) * 4..));
    payload.is_some_and(|payload| payload.starts_with(&[23, 3, 3]))
}

fn service_entry(world: &mut World) -> Result<String> {
    let outside: IpAddr = [10, 96, 9, 9].into();
    let server = world.nodes.pod("ratings-1")?.address;
    let yaml = format!(
        "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside, namespace: shop}}
spec:
  hosts: [api.example.com]
  addresses: [{outside}]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}]
  endpoints: [{{address: {server}}}]
"
    );
    let ask = |world: &World, count| {
        world.get("front-1", FRONT, count, &|options| {
            options.address = SocketAddr::new(outside, 80);
            options.host = Some("api.example.com".to_owned());
            options.timeout_ms = 200;
            options.reconnect = true;
        })
    };
    let before = ask(world, 1)?;
    ensure(with(&before, 200) == 0, || {
        format!("without it: {}", told(&before))
    })?;
    let effect = world.apply(&yaml, |world| Ok(with(&ask(world, 1)?, 200) == 1))?;
    let summary = ask(world, 50)?;
    ensure(by(&summary, "ratings-1") == 50, || told(&summary))?;
    let reverted = world.revert_until(|world| Ok(with(&ask(world, 1)?, 200) == 0))?;
    Ok(format!(
        "api.example.com at {outside}: 50 of 50; {effect}; gone {} ms after its deletion",
        reverted.as_millis()
    ))
}

fn quarantine(world: &mut World) -> Result<String> {
    // istiod passes on what a filter of this kind is given; a proxy knows that no response has this status.
    let yaml = "apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: wrong, namespace: shop}
spec:
  workloadSelector: {labels: {app: reviews, version: v2}}
  configPatches:
  - applyTo: HTTP_FILTER
    match:
      context: SIDECAR_INBOUND
      listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager, subFilter: {name: envoy.filters.http.router}}}}
    patch:
      operation: INSERT_BEFORE
      value:
        name: envoy.filters.http.fault
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault
          abort: {http_status: 999, percentage: {numerator: 100}}
";
    let quarantined = |world: &World, pod: &str| world.nodes.all[1].quarantined(pod);
    world.apply_only(yaml)?;
    let begun = Instant::now();
    world.until("reviews-2 is quarantined", |world| {
        Ok(quarantined(world, "reviews-2")?.is_some())
    })?;
    let took = begun.elapsed();
    let reason = quarantined(world, "reviews-2")?.unwrap_or_default();
    ensure(
        reason.to_lowercase().replace('_', "").contains("httpstatus"),
        || format!("no word of the field in {reason:?}"),
    )?;
    ensure(quarantined(world, "ratings-1")?.is_none(), || {
        "ratings-1 is quarantined too".to_owned()
    })?;
    // It goes on with what it had, and its neighbours change with the mesh.
    flows(world, 100)?;
    let effect = world.apply(&marked("beside"), |world| step(world, "beside"))?;
    // That change was one of its own configuration too: it is tried again, and refused again.
    world.until("reviews-2 stays quarantined", |world| {
        Ok(quarantined(world, "reviews-2")?.is_some())
    })?;
    let reverted =
        world.revert_until(|world| Ok(quarantined(world, "reviews-2")?.is_none() && step(world, "")?))?;
    flows(world, 50)?;
    Ok(format!(
        "reviews-2 alone is quarantined {} ms after kubectl, and answers by its last good configuration, 200 of 200; a change of its neighbours goes on: {effect}; let in again {} ms after the deletion",
        took.as_millis(),
        reverted.as_millis()
    ))
}

fn join_and_leave(world: &mut World) -> Result<String> {
    let begun = Instant::now();
    world.add_pods(&[PodSpec::new("reviews-3", "reviews", "v1", 1)])?;
    let ready = begun.elapsed();
    let first = world.get("reviews-3", RATINGS, 1, &|_| {})?;
    let governed = begun.elapsed();
    ensure(with(&first, 200) == 1, || {
        format!("the first request: {}", told(&first))
    })?;
    world.until("others reach the new pod", |world| {
        Ok(by(&world.get("front-1", REVIEWS, 6, &|_| {})?, "reviews-3") > 0)
    })?;
    let reached = begun.elapsed();
    let all = world.get("front-1", REVIEWS, 90, &|_| {})?;
    let shared = all.served_by.values().all(|count| *count > 10) && all.served_by.len() == 3;
    ensure(shared && with(&all, 200) == 90, || told(&all))?;
    world.note("pod: from its creation to its first governed request", governed);
    world.note("pod: from its creation to others' first request", reached);
    world.remove_pod("reviews-3")?;
    world.until("nobody is sent to the pod that left", |world| {
        let summary = world.get("front-1", REVIEWS, 12, &|_| {})?;
        Ok(with(&summary, 200) == 12 && by(&summary, "reviews-3") == 0)
    })?;
    let after = world.get("front-1", REVIEWS, 60, &|_| {})?;
    ensure(with(&after, 200) == 60 && after.served_by.len() == 2, || {
        told(&after)
    })?;
    Ok(format!(
        "from the pod's creation: {} ms until it runs, {} ms until its first governed request, {} ms until others reach it; gone again",
        ready.as_millis(),
        governed.as_millis(),
        reached.as_millis()
    ))
}

/// Traffic on new connections, on one node and across.
fn flows(world: &World, count: u64) -> Result<()> {
    for from in CLIENTS {
        let summary = world.get(from, REVIEWS, count, &|options| options.reconnect = true)?;
        ensure(
            with(&summary, 200) == count && summary.served_by.len() == 2,
            || format!("{from}: {}", told(&summary)),
        )?;
    }
    Ok(())
}

/// A change reaches both nodes, and goes away again.
fn can_be_changed(world: &mut World, step_name: &str) -> Result<Duration> {
    let begun = Instant::now();
    world.apply(&marked(step_name), |world| step(world, step_name))?;
    let took = begun.elapsed();
    world.revert_until(|world| step(world, ""))?;
    Ok(took)
}

fn istiod_stopped(world: &mut World) -> Result<String> {
    world.nodes.control.stop_istiod()?;
    let without = flows(world, 200);
    // Whatever came of it: the scenarios behind this one need it.
    world.nodes.control.start_istiod()?;
    without?;
    flows(world, 50)?;
    let took = can_be_changed(world, "istiod")?;
    Ok(format!(
        "without istiod 400 of 400 on new connections; after its start a change is in force within {} ms",
        took.as_millis()
    ))
}

fn adapter_killed(world: &mut World) -> Result<String> {
    let mut adapter = world.nodes.all[0]
        .adapter
        .take()
        .ok_or("the adapter is not running")?;
    adapter.kill()?;
    flows(world, 200)?;
    let nodes = &mut world.nodes;
    nodes.all[0].start_adapter(&nodes.control)?;
    flows(world, 50)?;
    let took = can_be_changed(world, "adapter")?;
    Ok(format!(
        "without it 400 of 400 on new connections; after its start a change is in force within {} ms",
        took.as_millis()
    ))
}

fn proxy_killed(world: &mut World) -> Result<String> {
    let mut proxy = world.nodes.all[0]
        .proxy
        .take()
        .ok_or("the proxy is not running")?;
    let capture = Capture::start(&world.nodes.all[0].soc, WIRE, |_| true)?;
    proxy.kill()?;
    let closed = world.get("front-1", REVIEWS, 20, &|options| {
        options.reconnect = true;
        options.path = SECRET.to_owned();
    })?;
    let captured = capture.stop()?;
    let leaked = captured.count(|frame| frame.contains(SECRET.as_bytes()));
    ensure(closed.answered == 0 && leaked == 0, || {
        format!("{}, {leaked} leaked", told(&closed))
    })?;
    let begun = Instant::now();
    world.nodes.all[0].start_proxy()?;
    world.until("it serves again", |world| answers(world, &CLIENTS, "/", 200))?;
    let recovered = begun.elapsed();
    flows(world, 100)?;
    Ok(format!(
        "20 of 20 requests failed with {:?}, nothing of them on the wire; serves again {} ms after its start",
        closed.errors.keys().collect::<Vec<_>>(),
        recovered.as_millis()
    ))
}

fn agent_restarted(world: &mut World) -> Result<String> {
    let before = world.nodes.all[0].leases()?;
    let mut agent = world.nodes.all[0]
        .agent
        .take()
        .ok_or("the agent is not running")?;
    agent.kill()?;
    flows(world, 100)?;
    world.nodes.all[0].start_agent()?;
    flows(world, 100)?;
    let after = world.nodes.all[0].leases()?;
    ensure(before == after, || format!("before {before}, after {after}"))?;
    let leases = before["records"].as_array().map_or(0, Vec::len);
    ensure(leases == 2, || format!("{leases} leases"))?;
    Ok(format!(
        "without it and after its start 400 of 400 on new connections; {leases} leases as they were"
    ))
}
