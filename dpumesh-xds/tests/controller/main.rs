//! `istio-dpu-controller` against the real kube-apiserver: the program as it is shipped, with the account and the role that it asks for, its webhook
//! registered, two adapters over mutual TLS, and an API that goes away and comes back.
//!
//! Needs the peers of `tests/peers`, already built; without them the test is skipped, loudly. `DPUMESH_PEERS_DIR` names a folder where they run.

#![cfg(feature = "kube")]

mod adapter;
mod cluster;

use std::time::{Duration, Instant};

use adapter::Adapter;
use cluster::{Cluster, Controller, Credentials, eventually};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

#[tokio::test]
async fn the_controller_tells_each_adapter_what_the_real_api_knows() {
    let Some(cluster) = Cluster::start().await else {
        return;
    };
    let credentials = Credentials::new(cluster.folder());
    let (n1, n2) = (cluster.name("n1"), cluster.name("n2"));
    let controller = Controller::start(&cluster, &credentials).await;
    cluster.node(&n1, Some("192.0.2.1")).await;
    cluster.node(&n2, Some("192.0.2.2")).await;
    let first = Adapter::connect(&controller, &credentials, &n1, &n1);
    let second = Adapter::connect(&controller, &credentials, &n2, &n2);
    eventually("both nodes are peers", || {
        first.peer(&n2).is_some() && second.peer(&n1).is_some()
    })
    .await;
    assert_eq!(first.peer(&n2).unwrap().tunnel_endpoint, "192.0.2.2");
    assert!(first.peer(&n1).is_none(), "nobody is its own peer");

    pods_come_and_go(&cluster, &first, &second, [&n1, &n2]).await;
    namespaces_opt_in(&cluster, &first, &n1).await;
    a_wrong_annotation_takes_a_node_away_and_nothing_else(&cluster, &controller, &first, &n2).await;
    a_service_beside_tcp_is_named(&cluster, &controller).await;
    what_an_adapter_refuses_is_shown_and_hinders_nothing(&cluster, &controller, &first, &n1).await;
    nobody_sees_anothers(&controller, &credentials, [&n1, &n2]).await;
    an_api_that_goes_away_takes_nothing_with_it(&cluster, &controller, &credentials, [&n1, &n2]).await;
    controller.end().await;
}

async fn pods_come_and_go(cluster: &Cluster, first: &Adapter, second: &Adapter, [n1, n2]: [&str; 2]) {
    let mut took = Vec::new();
    for index in 1..=5 {
        let (pod, key) = (format!("web-{index}"), cluster.key(&format!("web-{index}")));
        let since = Instant::now();
        let made = cluster
            .pod(&pod, n1, json!({"dpumesh.io/dataplane": "dpu", "app": "web"}))
            .await;
        let created = since.elapsed();
        let labels = made.metadata.labels.unwrap_or_default();
        assert_eq!(
            labels.get("sidecar.istio.io/inject").map(String::as_str),
            Some("false"),
            "{labels:?}"
        );
        assert_eq!(
            labels.get("security.istio.io/tlsMode").map(String::as_str),
            Some("istio"),
            "{labels:?}"
        );
        first.until(|adapter| adapter.bindings.contains_key(&key)).await;
        took.push((created, since.elapsed()));
        let binding = first.binding(&key).unwrap();
        assert_eq!(Some(binding.uid), made.metadata.uid);
        assert_eq!(
            (binding.node.as_str(), binding.service_account.as_str()),
            (n1, "default")
        );
        assert!(binding.addresses.is_empty() && !binding.ready);
        assert_eq!(binding.labels, labels);
    }
    for (created, bound) in took {
        println!(
            "pod created (webhook included) after {created:?}, Binding at the adapter {:?} after that",
            bound.saturating_sub(created)
        );
    }
    let key = cluster.key("web-1");
    let since = Instant::now();
    cluster.ready("web-1", "10.244.1.11").await;
    second
        .until(|adapter| adapter.peers[n1].addresses == ["10.244.1.11"])
        .await;
    println!(
        "address patched, and known to the other node's adapter after {:?}",
        since.elapsed()
    );
    first.until(|adapter| adapter.bindings[&key].ready).await;
    assert_eq!(first.binding(&key).unwrap().addresses, ["10.244.1.11"]);
    assert!(second.binding(&key).is_none(), "another node's pod");
    assert!(first.peer(n2).unwrap().addresses.is_empty());

    cluster.delete("web-1").await;
    first.until(|adapter| !adapter.bindings.contains_key(&key)).await;
    second
        .until(|adapter| adapter.peers[n1].addresses.is_empty())
        .await;
}

async fn namespaces_opt_in(cluster: &Cluster, first: &Adapter, n1: &str) {
    let plain = cluster.pod("plain", n1, json!({"app": "plain"})).await;
    assert_eq!(plain.metadata.labels.unwrap().len(), 1, "others are left alone");
    cluster.opt_namespace_in().await;
    let stamped = created_in_an_opted_in_namespace(cluster, n1).await;
    let labels = stamped.metadata.labels.unwrap();
    for (name, value) in [
        ("dpumesh.io/dataplane", "dpu"),
        ("sidecar.istio.io/inject", "false"),
        ("security.istio.io/tlsMode", "istio"),
    ] {
        assert_eq!(labels.get(name).map(String::as_str), Some(value), "{labels:?}");
    }
    let out = cluster
        .pod("out", n1, json!({"dpumesh.io/dataplane": "sidecar"}))
        .await;
    assert_eq!(out.metadata.labels.unwrap().len(), 1);
    let key = cluster.key(&stamped.metadata.name.unwrap());
    first.until(|adapter| adapter.bindings.contains_key(&key)).await;
    assert!(first.binding(&cluster.key("plain")).is_none());
    assert!(first.binding(&cluster.key("out")).is_none());
}

/// The first pod that the webhook was asked about: the API server itself learns of a namespace's labels a moment after they were written.
async fn created_in_an_opted_in_namespace(cluster: &Cluster, n1: &str) -> Pod {
    for attempt in 0..100 {
        let name = format!("stamped-{attempt}");
        let made = cluster.pod(&name, n1, json!({"app": "x"})).await;
        if made
            .metadata
            .labels
            .as_ref()
            .is_some_and(|labels| labels.len() > 1)
        {
            return made;
        }
        cluster.delete(&name).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no pod of an opted-in namespace was labelled within five seconds");
}

async fn a_wrong_annotation_takes_a_node_away_and_nothing_else(
    cluster: &Cluster,
    controller: &Controller,
    first: &Adapter,
    n2: &str,
) {
    let before = first.bindings();
    cluster
        .pod("far", n2, json!({"dpumesh.io/dataplane": "dpu"}))
        .await;
    cluster.annotate(n2, "192.0.2.2/24").await;
    first.until(|adapter| !adapter.peers.contains_key(n2)).await;
    assert_eq!(first.bindings(), before);
    let (code, page) = controller.page("/status");
    let page: serde_json::Value = serde_json::from_str(&page).unwrap();
    let findings = page["findings"].as_array().unwrap();
    let object = format!("node {n2}");
    let finding = findings
        .iter()
        .find(|finding| finding["object"] == object.as_str())
        .unwrap();
    assert!(
        finding["reason"].as_str().unwrap().contains("192.0.2.2/24"),
        "{finding}"
    );
    let plain = format!("pod {}", cluster.key("plain"));
    assert!(
        findings.iter().any(|finding| finding["object"] == plain.as_str()),
        "created before its namespace opted in"
    );
    assert_eq!((code, &page["ready"]), (200, &json!(true)));
    cluster.annotate(n2, "192.0.2.22").await;
    first.until(|adapter| adapter.peers.contains_key(n2)).await;
    assert_eq!(first.peer(n2).unwrap().tunnel_endpoint, "192.0.2.22");
}

async fn a_service_beside_tcp_is_named(cluster: &Cluster, controller: &Controller) {
    let address = cluster.service("names", 53, "UDP").await;
    let object = format!("service {}", cluster.key("names"));
    let finding = || {
        let page: serde_json::Value = serde_json::from_str(&controller.page("/status").1).unwrap();
        let findings = page["findings"].as_array().unwrap().clone();
        findings
            .into_iter()
            .find(|finding| finding["object"] == object.as_str())
    };
    eventually("the service is named", || finding().is_some()).await;
    let reason = finding().unwrap()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains(&format!("53/UDP at {address}")), "{reason}");
}

async fn what_an_adapter_refuses_is_shown_and_hinders_nothing(
    cluster: &Cluster,
    controller: &Controller,
    first: &Adapter,
    n1: &str,
) {
    let (bad, good, gone) = (cluster.key("bad"), cluster.key("good"), cluster.key("web-2"));
    first.refuse(&bad);
    let labels = json!({"dpumesh.io/dataplane": "dpu"});
    cluster.pod("bad", n1, labels.clone()).await;
    let health = || {
        let page: serde_json::Value = serde_json::from_str(&controller.page("/status").1).unwrap();
        page["adapters"][n1].clone()
    };
    let object = format!("binding {bad}");
    eventually("the refusal is shown", || {
        health()["refused"][&object].is_string()
    })
    .await;
    let reason = health()["refused"][&object].as_str().unwrap().to_owned();
    assert!(reason.contains("not to my taste"), "{reason}");
    cluster.delete("web-2").await;
    first.until(|adapter| !adapter.bindings.contains_key(&gone)).await;
    cluster.pod("good", n1, labels).await;
    first.until(|adapter| adapter.bindings.contains_key(&good)).await;
    assert!(first.binding(&bad).is_none());
    cluster.delete("bad").await;
    eventually("a refused one that is gone is no longer shown", || {
        health()["refused"].as_object().unwrap().is_empty()
    })
    .await;
    assert_eq!(health()["streams"], 1);
}

async fn nobody_sees_anothers(controller: &Controller, credentials: &Credentials, [n1, n2]: [&str; 2]) {
    let liar = Adapter::connect(controller, credentials, n1, n2);
    liar.until(|adapter| adapter.lost.is_some()).await;
    let reason = liar.lost().unwrap();
    assert!(
        reason.contains(&format!("adapter~{n1}")) && reason.contains(&format!("adapter~{n2}")),
        "{reason}"
    );
    let nobody = Adapter::connect_as(controller, credentials, "elsewhere.example.org", n1);
    nobody.until(|adapter| adapter.lost.is_some()).await;
    assert!(
        nobody.lost().unwrap().contains("adapter.NODE"),
        "{:?}",
        nobody.lost()
    );
    let bare = Adapter::connect_bare(controller, credentials, n1);
    bare.until(|adapter| adapter.lost.is_some()).await;
    for adapter in [liar, nobody, bare] {
        assert!(adapter.bindings().is_empty() && adapter.peer(n2).is_none());
    }
}

async fn an_api_that_goes_away_takes_nothing_with_it(
    cluster: &Cluster,
    controller: &Controller,
    credentials: &Credentials,
    [n1, n2]: [&str; 2],
) {
    let before = Adapter::connect(controller, credentials, n1, n1);
    before
        .until(|adapter| adapter.peers.contains_key(n2) && !adapter.bindings.is_empty())
        .await;
    let had = before.bindings();
    cluster.peers("stop", "apiserver");
    eventually("/readyz tells of the outage", || {
        controller.page("/readyz").0 == 503
    })
    .await;
    let (_, text) = controller.page("/readyz");
    assert!(text.contains("watch of"), "{text}");
    assert_eq!(controller.page("/healthz").0, 200);
    assert_eq!(before.bindings(), had);
    // One that comes back meanwhile gets the last that was known.
    let again = Adapter::connect(controller, credentials, n1, n1);
    again.until(|adapter| adapter.bindings == had).await;
    let since = Instant::now();
    cluster.peers("start", "apiserver");
    cluster
        .pod("late", n1, json!({"dpumesh.io/dataplane": "dpu"}))
        .await;
    let key = cluster.key("late");
    before.until(|adapter| adapter.bindings.contains_key(&key)).await;
    println!(
        "a pod created behind the outage was known {:?} after the API's start began",
        since.elapsed()
    );
    eventually("/readyz is well again", || controller.page("/readyz").0 == 200).await;
    assert_eq!(before.bindings().len(), had.len() + 1, "nothing else changed");
    let (_, metrics) = controller.page("/metrics");
    assert!(metrics.contains("dpumesh_controller_ready 1\n"), "{metrics}");
    assert!(since.elapsed() < Duration::from_secs(120));
}
