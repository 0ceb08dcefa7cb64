//! Istio's metrics: what both ends of a connection report, with Istio's names, labels and fallbacks. A stock Envoy has no such
//! metrics; what is expected is what Istio's own filter documents.

use std::net::{Shutdown, SocketAddr};

use crate::harness::{Endpoint, Running, await_true, bootstrap, cluster, replace};
use crate::mesh::{Authority, FRONT, REVIEWS, http, inbound, outbound, tcp};

const FRONT_POD: &str = "front-1.shop: {addresses: '127.0.0.1,fd00::1', workload: front, namespace: shop, canonical_name: front, canonical_revision: v1, cluster: c1, app: front-app, version: '1'}";
const REVIEWS_POD: &str = "reviews-1.shop: {addresses: 127.0.0.1, workload: reviews-v2, namespace: shop, canonical_name: reviews, canonical_revision: v2, cluster: c2, app: reviews-app, version: ''}";

/// Cluster metadata (with a comma before it) that says who the local pods are, and what service the cluster is.
fn metadata(pods: &str, service: &str) -> String {
    format!(
        ", metadata: {{filter_metadata: {{dpumesh.workloads: {{{pods}}}, istio: {{services: [{service}]}}}}}}"
    )
}

const SERVICE: &str = "{host: reviews.shop.svc.cluster.local, name: reviews, namespace: shop}";

/// Two proxies with mesh TLS between them: front's and reviews'.
fn pair(endpoint: SocketAddr, filter: fn(&str) -> String) -> (Running, Running) {
    let authority = Authority::new();
    let text = inbound(endpoint, &filter("app"), "plain")
        .replace(
            "stat_prefix: in\n",
            "stat_prefix: in\n    traffic_direction: INBOUND\n",
        )
        .replace(
            "name: app, type: STATIC",
            &format!("name: app, type: STATIC{}", metadata(REVIEWS_POD, SERVICE)),
        );
    let inbound = Running::start_with_secrets(&text, authority.store(&[REVIEWS]));
    let own = format!("    {}\n    type: STATIC", &metadata(FRONT_POD, SERVICE)[2..]);
    let text = outbound(inbound.web(), REVIEWS, &filter("mesh"), &[FRONT])
        .replace(
            "{name: web, address",
            "{name: web, traffic_direction: OUTBOUND, address",
        )
        .replace("    type: STATIC", &own)
        .replace(
            "{tlsMode: istio}}}}]}]}",
            "{tlsMode: istio}, istio: {workload: 'reviews-v2;shop;reviews;v2;c2'}}}}]}]}",
        );
    assert!(text.contains("istio: {workload"), "{text}");
    let outbound = Running::start_with_secrets(&text, authority.store(&[FRONT]));
    (inbound, outbound)
}

fn scrape(running: &Running, pod: &str) -> String {
    running
        .admin("GET", &format!("/stats/prometheus?pod={pod}"))
        .text()
}

/// The value of `line` (name and labels) once it is there.
fn await_line(running: &Running, pod: &str, line: &str) -> u64 {
    let mut value = None;
    await_true(line, || {
        let text = scrape(running, pod);
        let found = text.lines().find_map(|l| l.strip_prefix(line));
        value = found.and_then(|v| v.trim().parse().ok());
        value.is_some()
    });
    value.unwrap_or_default()
}

/// From the peer's header the client learns more than from the endpoint's metadata: app and version.
const BY_FRONT: &str = "{reporter=\"source\",source_workload=\"front\",source_canonical_service=\"front\",source_canonical_revision=\"v1\",\
source_workload_namespace=\"shop\",source_principal=\"spiffe://td/ns/shop/sa/front\",source_app=\"front-app\",source_version=\"1\",source_cluster=\"c1\",\
destination_workload=\"reviews-v2\",destination_workload_namespace=\"shop\",destination_principal=\"spiffe://td/ns/shop/sa/reviews\",\
destination_app=\"APP\",destination_version=\"unknown\",destination_service=\"reviews.shop.svc.cluster.local\",\
destination_canonical_service=\"reviews\",destination_canonical_revision=\"v2\",destination_service_name=\"reviews\",\
destination_service_namespace=\"shop\",destination_cluster=\"c2\",";
const BY_REVIEWS: &str = "{reporter=\"destination\",source_workload=\"front\",source_canonical_service=\"front\",source_canonical_revision=\"v1\",\
source_workload_namespace=\"shop\",source_principal=\"spiffe://td/ns/shop/sa/front\",source_app=\"front-app\",source_version=\"1\",source_cluster=\"c1\",\
destination_workload=\"reviews-v2\",destination_workload_namespace=\"shop\",destination_principal=\"spiffe://td/ns/shop/sa/reviews\",\
destination_app=\"reviews-app\",destination_version=\"unknown\",destination_service=\"reviews.shop.svc.cluster.local\",\
destination_canonical_service=\"reviews\",destination_canonical_revision=\"v2\",destination_service_name=\"reviews\",\
destination_service_namespace=\"shop\",destination_cluster=\"c2\",";

#[test]
fn both_ends_report_a_request_with_all_they_know_of_each_other() {
    let endpoint = Endpoint::start("app");
    let (inbound, outbound) = pair(endpoint.address, http);
    let mut client = outbound.client();
    let seen = client.get("/").text();
    assert!(!seen.contains("x-envoy-peer-metadata"), "{seen}");
    let answer = client.get("/");
    assert!(answer.header("x-envoy-peer-metadata").is_none());
    assert_eq!(client.get("/status?404").status(), 404);
    let front = BY_FRONT.replace("APP", "reviews-app");
    let rest = |status: u16, security: &str| {
        format!(
            "request_protocol=\"http\",response_code=\"{status}\",grpc_response_status=\"\",response_flags=\"-\",connection_security_policy=\"{security}\""
        )
    };
    for (running, pod, labels, security) in [
        (&outbound, "front-1.shop", front.as_str(), "unknown"),
        (&inbound, "reviews-1.shop", BY_REVIEWS, "mutual_tls"),
    ] {
        let (good, bad) = (rest(200, security), rest(404, security));
        let line =
            |name: &str, labels: &str, rest: &str, more: &str| format!("{name}{labels}{rest}{more}}} ");
        let value = |name: &str, more: &str| await_line(running, pod, &line(name, labels, &good, more));
        let bad = line("istio_requests_total", labels, &bad, "");
        await_true(&bad, || scrape(running, pod).contains(&bad));
        assert_eq!(value("istio_requests_total", ""), 2);
        assert_eq!(await_line(running, pod, &bad), 1);
        for name in [
            "istio_request_duration_milliseconds",
            "istio_request_bytes",
            "istio_response_bytes",
        ] {
            assert_eq!(value(&format!("{name}_count"), ""), 2);
            assert_eq!(value(&format!("{name}_bucket"), ",le=\"+Inf\""), 2);
        }
        let octets = value("istio_request_bytes_sum", "");
        assert!((60..4000).contains(&octets), "{octets}");
        assert!(value("istio_response_bytes_sum", "") > 100);
    }
    // All pods together are told apart by labels of their own.
    let all = outbound.admin("GET", "/stats/prometheus").text();
    assert!(all.contains(",pod=\"front-1\",namespace=\"shop\"} 2\n"), "{all}");
    assert!(all.contains("# TYPE istio_request_duration_milliseconds histogram\n"));
    assert_eq!(scrape(&outbound, "nobody.shop"), "");
}

#[test]
fn both_ends_report_a_connection() {
    let endpoint = Endpoint::start("app");
    let (inbound, outbound) = pair(endpoint.address, tcp);
    let mut client = outbound.client();
    client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    await_true("the request is there", || endpoint.requests() == 1);
    // Without headers nothing is known of the peer but its certificate and, to who calls, the endpoint's metadata.
    let front = BY_FRONT.replace("APP", "unknown");
    let reviews = BY_REVIEWS
        .replace("source_workload=\"front\"", "source_workload=\"unknown\"")
        .replace(
            "source_canonical_service=\"front\"",
            "source_canonical_service=\"unknown\"",
        )
        .replace(
            "source_canonical_revision=\"v1\"",
            "source_canonical_revision=\"latest\"",
        )
        .replace("source_app=\"front-app\"", "source_app=\"unknown\"")
        .replace("source_version=\"1\"", "source_version=\"unknown\"")
        .replace("source_cluster=\"c1\"", "source_cluster=\"unknown\"");
    let ends = [
        (&outbound, "front-1.shop", front.as_str(), "unknown"),
        (&inbound, "reviews-1.shop", reviews.as_str(), "mutual_tls"),
    ];
    let line = |name: &str, labels: &str, security: &str| {
        format!(
            "istio_tcp_{name}_total{labels}request_protocol=\"tcp\",response_flags=\"-\",connection_security_policy=\"{security}\"}} "
        )
    };
    // While it is open, too.
    for (running, pod, labels, security) in ends {
        let value = |name| await_line(running, pod, &line(name, labels, security));
        assert_eq!(value("connections_opened"), 1);
        assert_eq!(value("connections_closed"), 0);
        assert_eq!(value("received_bytes"), 30);
        await_true("the answer has passed", || value("sent_bytes") > 50);
    }
    let _ = client.reader.get_ref().shutdown(Shutdown::Both);
    drop(client);
    for (running, pod, labels, security) in ends {
        let line = line("connections_closed", labels, security);
        await_true(&line, || await_line(running, pod, &line) == 1);
    }
}

/// An outbound proxy without TLS, its clusters in a file.
fn plain(endpoint: SocketAddr, pods: &str) -> (Running, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = |pods: &str| {
        let bare = cluster("bare", &[endpoint], "");
        let named = cluster("PassthroughCluster", &[endpoint], &metadata(pods, SERVICE));
        let kind = "'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, ";
        let typed = |text: &str| format!("{{{kind}{}", &text[1..]);
        format!(
            "version_info: '1'\nresources: [{}, {}]\n",
            typed(&bare),
            typed(&named)
        )
    };
    let clusters = folder.path().join("clusters.yaml");
    std::fs::write(&clusters, file(pods)).unwrap();
    let text = bootstrap(
        "[{match: {prefix: /pass}, route: {cluster: PassthroughCluster}}, {match: {prefix: /}, route: {cluster: bare}}]",
        "[]",
        "",
    )
    .replace("- name: web\n", "- name: web\n    traffic_direction: OUTBOUND\n")
    .replace(
        "static_resources:",
        &format!(
            "dynamic_resources: {{cds_config: {{path_config_source: {{path: {}}}}}}}\nstatic_resources:",
            clusters.display()
        ),
    );
    (Running::start_in(folder, &text, 2), file(""))
}

#[test]
fn what_is_not_known_is_unknown_and_series_leave_with_their_pod() {
    let endpoint = Endpoint::start("app");
    let (proxy, without) = plain(endpoint.address, FRONT_POD);
    let mut client = proxy.client();
    client.send("GET / HTTP/1.1\r\nHost: Some.Host:80\r\nx-envoy-peer-metadata: me\r\nx-envoy-peer-metadata-id: me\r\n\r\n");
    let seen = client.receive().text();
    assert!(!seen.contains("peer-metadata"), "not told to strangers: {seen}");
    client.send("GET /pass HTTP/1.1\r\nHost: other\r\n\r\n");
    assert_eq!(client.receive().status(), 200);
    let text = |service: &str, name: &str, namespace: &str| {
        format!(
            "source_principal=\"unknown\",source_app=\"front-app\",source_version=\"1\",source_cluster=\"c1\",destination_workload=\"unknown\",\
             destination_workload_namespace=\"unknown\",destination_principal=\"unknown\",destination_app=\"unknown\",destination_version=\"unknown\",\
             destination_service=\"{service}\",destination_canonical_service=\"unknown\",destination_canonical_revision=\"latest\",\
             destination_service_name=\"{name}\",destination_service_namespace=\"{namespace}\",destination_cluster=\"unknown\""
        )
    };
    for wanted in [
        text("Some.Host:80", "Some.Host:80", "unknown"),
        text("other", "PassthroughCluster", "unknown"),
    ] {
        await_true(&wanted, || scrape(&proxy, "front-1.shop").contains(&wanted));
    }
    // Pod gone, series gone; a connection that is still there counts for nobody.
    replace(&proxy.folder.path().join("clusters.yaml"), &without);
    await_true("the pod left", || {
        !proxy
            .admin("GET", "/stats/prometheus")
            .text()
            .contains("istio_requests")
    });
    assert_eq!(client.get("/").status(), 200);
    assert!(
        !proxy
            .admin("GET", "/stats/prometheus")
            .text()
            .contains("istio_requests")
    );
}

#[test]
fn a_workload_without_an_address_is_refused_by_name() {
    let pods = "a.b: {addresses: here}";
    let named = cluster("app", &["127.0.0.1:1".parse().unwrap()], &metadata(pods, SERVICE));
    let text = bootstrap(
        "[{match: {prefix: /}, route: {cluster: app}}]",
        &format!("[{named}]"),
        "",
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bootstrap.yaml");
    std::fs::write(&path, text).unwrap();
    let error = dpumesh_proxy::program::validate(&path).unwrap_err().to_string();
    assert!(
        error.contains("dpumesh.workloads") && error.contains("addresses must be IP addresses"),
        "{error}"
    );
}
