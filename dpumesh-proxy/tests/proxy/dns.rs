//! Clusters whose endpoints are names. Each case is checked at Envoy too; names are those of loopback, which the machine knows itself.

use std::net::SocketAddr;

use crate::envoy::{Subject, at_both};
use crate::harness::{Endpoint, bootstrap};

fn named(kind: &str, names: &[(&str, SocketAddr)], more: &str) -> String {
    let endpoints: Vec<String> = names
        .iter()
        .map(|(name, endpoint)| {
            let port = endpoint.port();
            format!("{{endpoint: {{address: {{socket_address: {{address: {name}, port_value: {port}}}}}}}}}")
        })
        .collect();
    format!(
        "[{{name: app, type: {kind}, connect_timeout: 1s, dns_lookup_family: V4_ONLY{more}, load_assignment: {{cluster_name: app, \
         endpoints: [{{lb_endpoints: [{}]}}]}}}}]",
        endpoints.join(", ")
    )
}

const ALL: &str = "[{match: {prefix: /}, route: {cluster: app}}]";

fn statuses(subject: &Subject, requests: usize) -> Vec<u16> {
    let mut client = subject.client();
    (0..requests).map(|_| client.get("/").status()).collect()
}

#[test]
fn every_address_of_every_name_is_an_endpoint() {
    let second = Endpoint::start("second");
    at_both(
        |endpoint, _| {
            let names = [("localhost", endpoint.address), ("127.0.0.1", second.address)];
            bootstrap(ALL, &named("STRICT_DNS", &names, ""), "")
        },
        |subject, endpoint| {
            subject.await_value("cluster.app.membership_total", 2);
            let before = second.requests();
            assert_eq!(statuses(subject, 10), [200; 10]);
            assert_eq!(endpoint.requests(), 5);
            assert_eq!(second.requests() - before, 5);
            subject.await_stat("cluster.app.update_success", 2);
            let clusters = subject.admin("/clusters");
            let hostname = format!("app::{}::hostname::localhost", endpoint.address);
            assert!(clusters.contains(&hostname), "{}: {clusters}", subject.name());
        },
    );
}

#[test]
fn the_first_address_of_the_name_is_the_endpoint() {
    at_both(
        |endpoint, _| {
            let names = [("localhost", endpoint.address)];
            bootstrap(ALL, &named("LOGICAL_DNS", &names, ""), "")
        },
        |subject, endpoint| {
            subject.await_value("cluster.app.membership_total", 1);
            assert_eq!(statuses(subject, 4), [200; 4]);
            assert_eq!(endpoint.requests(), 4);
        },
    );
}

/// As istiod writes it.
#[test]
fn names_are_looked_up_again() {
    let more = ", dns_refresh_rate: 0.05s, respect_dns_ttl: true, dns_jitter: 0s, typed_dns_resolver_config: {name: envoy.network.dns_resolver.cares, \
         typed_config: {\"@type\": type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig, udp_max_queries: 100}}";
    at_both(
        |endpoint, _| {
            let names = [("localhost", endpoint.address)];
            bootstrap(ALL, &named("STRICT_DNS", &names, more), "")
        },
        |subject, _| {
            assert_eq!(statuses(subject, 1), [200]);
            if subject.name() == "ours" {
                // Envoy goes by the lifetime of what the hosts file says.
                let again = subject.await_stat("cluster.app.update_success", 3);
                assert!(again <= subject.stat("cluster.app.update_attempt"));
                subject.await_stat("cluster.app.update_no_rebuild", 2);
            }
        },
    );
}

#[test]
fn a_name_that_nobody_knows_has_no_endpoint() {
    at_both(
        |endpoint, _| {
            let names = [
                ("nobody.invalid", endpoint.address),
                ("localhost", endpoint.address),
            ];
            bootstrap(ALL, &named("STRICT_DNS", &names, ", dns_refresh_rate: 1s"), "")
        },
        |subject, endpoint| {
            subject.await_value("cluster.app.membership_total", 1);
            assert_eq!(statuses(subject, 4), [200; 4]);
            assert_eq!(endpoint.requests(), 4);
        },
    );
    at_both(
        |endpoint, _| {
            let names = [("nobody.invalid", endpoint.address)];
            bootstrap(ALL, &named("STRICT_DNS", &names, ", dns_refresh_rate: 1s"), "")
        },
        |subject, _| assert_eq!(statuses(subject, 1), [503]),
    );
}
