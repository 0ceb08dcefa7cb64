//! What a proxy says of its work: histograms. Each case is checked at Envoy too.

use crate::envoy::at_both;
use crate::harness::{await_true, simple};

#[test]
fn histograms_have_envoys_names_and_forms() {
    at_both(
        |endpoint, _| simple(endpoint.address, ""),
        |subject, _| {
            let mut client = subject.client();
            for _ in 0..3 {
                assert_eq!(client.get("/").status(), 200);
            }
            drop(client);
            let labels = "envoy_http_conn_manager_prefix=\"web\"";
            for (name, family, labels, count) in [
                (
                    "http.web.downstream_rq_time",
                    "envoy_http_downstream_rq_time",
                    labels,
                    3,
                ),
                (
                    "http.web.downstream_cx_length_ms",
                    "envoy_http_downstream_cx_length_ms",
                    labels,
                    1,
                ),
                (
                    "cluster.app.upstream_rq_time",
                    "envoy_cluster_upstream_rq_time",
                    "envoy_cluster_name=\"app\"",
                    3,
                ),
                (
                    "cluster.app.upstream_cx_connect_ms",
                    "envoy_cluster_upstream_cx_connect_ms",
                    "envoy_cluster_name=\"app\"",
                    1,
                ),
            ] {
                let line = format!("{family}_count{{{labels}}} {count}\n");
                // Envoy merges its histograms every five seconds.
                await_true(&format!("{line} at {}", subject.name()), || {
                    subject.admin("GET", "/stats/prometheus").text().contains(&line)
                });
                let text = subject.admin("GET", "/stats/prometheus").text();
                assert!(text.contains(&format!("# TYPE {family} histogram\n")), "{family}");
                let bucket = |le: &str| format!("{family}_bucket{{{labels},le=\"{le}\"}} ");
                let bounds: Vec<&str> = text
                    .lines()
                    .filter_map(|l| l.strip_prefix(&format!("{family}_bucket{{{labels},le=\"")))
                    .filter_map(|l| l.split('"').next())
                    .collect();
                assert_eq!(
                    bounds,
                    [
                        "0.5", "1", "5", "10", "25", "50", "100", "250", "500", "1000", "2500", "5000",
                        "10000", "30000", "60000", "300000", "600000", "1800000", "3600000", "+Inf"
                    ]
                );
                assert!(text.contains(&format!("{}{count}\n", bucket("+Inf"))), "{name}");
                assert!(text.contains(&format!("{family}_sum{{{labels}}} ")), "{name}");
                let summary = subject.admin("GET", &format!("/stats?filter=^{name}$")).text();
                let values = summary
                    .strip_prefix(&format!("{name}: "))
                    .unwrap_or_else(|| panic!("{summary}"));
                let quantiles: Vec<&str> = values.split(' ').filter_map(|v| v.split('(').next()).collect();
                assert_eq!(
                    quantiles,
                    [
                        "P0", "P25", "P50", "P75", "P90", "P95", "P99", "P99.5", "P99.9", "P100"
                    ],
                    "{}",
                    subject.name()
                );
                for value in values.trim().split(' ') {
                    let (_, cumulative) = value.trim_end_matches(')').split_once(',').unwrap();
                    assert!(cumulative.parse::<f64>().is_ok_and(f64::is_finite), "{values}");
                }
            }
            let unused = "listener.nobody.downstream_cx_length_ms";
            assert!(!subject.admin("GET", "/stats").text().contains(unused));
            let usual = subject.admin("GET", "/stats?filter=upstream_cx_length_ms").text();
            assert!(
                usual.contains("cluster.app.upstream_cx_length_ms: No recorded values\n"),
                "{usual}"
            );
        },
    );
}
