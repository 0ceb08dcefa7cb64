//! What is done where there is too much of something. Each case is checked at Envoy too.

use crate::envoy::{Subject, at_both};
use crate::harness::{Client, await_true, simple};

fn managed(text: &str, monitors: &str, actions: &str) -> String {
    text.replace(
        "static_resources:",
        &format!("overload_manager: {{refresh_interval: 0.1s, resource_monitors: [{monitors}], actions: [{actions}]}}\nstatic_resources:"),
    )
}

/// A limit that is passed from the start, or never.
fn heap(octets: u64) -> String {
    format!(
        "{{name: envoy.resource_monitors.fixed_heap, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig, max_heap_size_bytes: {octets}}}}}"
    )
}

fn action(name: &str, trigger: &str) -> String {
    format!(
        "{{name: envoy.overload_actions.{name}, triggers: [{{name: envoy.resource_monitors.fixed_heap, {trigger}}}]}}"
    )
}

fn is_active(subject: &Subject, name: &str) {
    subject.await_value(&format!("overload.envoy.overload_actions.{name}.active"), 1);
}

#[test]
fn requests_are_refused_while_there_is_too_little_memory() {
    at_both(
        |endpoint, _| {
            let stop = action("stop_accepting_requests", "threshold: {value: 0.95}");
            managed(&simple(endpoint.address, ""), &heap(1), &stop)
        },
        |subject, endpoint| {
            is_active(subject, "stop_accepting_requests");
            let mut client = subject.client();
            let answer = client.get("/");
            assert_eq!(
                (answer.status(), answer.text().as_str()),
                (503, "envoy overloaded")
            );
            assert_eq!(answer.header("connection"), None, "{}", subject.name());
            assert_eq!(client.get("/").status(), 503);
            assert_eq!(endpoint.requests(), 0);
            assert_eq!(subject.await_stat("http.web.downstream_rq_overload_close", 2), 2);
        },
    );
    at_both(
        |endpoint, _| {
            let stop = action(
                "stop_accepting_requests",
                "scaled: {scaling_threshold: 0.5, saturation_threshold: 0.9}",
            );
            managed(&simple(endpoint.address, ""), &heap(1 << 40), &stop)
        },
        |subject, _| assert_eq!(subject.client().get("/").status(), 200),
    );
}

#[test]
fn connections_end_with_their_next_response() {
    at_both(
        |endpoint, _| {
            let last = action("disable_http_keepalive", "threshold: {value: 0.9}");
            managed(&simple(endpoint.address, ""), &heap(1), &last)
        },
        |subject, _| {
            is_active(subject, "disable_http_keepalive");
            let answer = subject.client().get("/");
            let told = (answer.status(), answer.header("connection"));
            assert_eq!(told, (200, Some("close")), "{}", subject.name());
            subject.await_stat("http.web.downstream_cx_overload_disable_keepalive", 1);
        },
    );
}

#[test]
fn connections_wait_where_none_is_accepted() {
    at_both(
        |endpoint, _| {
            let stop = action("stop_accepting_connections", "threshold: {value: 0.9}");
            managed(&simple(endpoint.address, ""), &heap(1), &stop)
        },
        |subject, endpoint| {
            is_active(subject, "stop_accepting_connections");
            std::thread::sleep(std::time::Duration::from_millis(100));
            // One that was being waited for may still be taken.
            let mut clients: Vec<Client> = (0..3).map(|_| subject.client()).collect();
            for client in &mut clients {
                client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
            }
            std::thread::sleep(std::time::Duration::from_millis(300));
            assert!(endpoint.requests() <= 1, "{}", subject.name());
        },
    );
}

#[test]
fn more_connections_than_there_may_be_are_closed() {
    let monitor = "{name: envoy.resource_monitors.global_downstream_max_connections, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig, max_active_downstream_connections: 2}}";
    at_both(
        |endpoint, _| managed(&simple(endpoint.address, ""), monitor, ""),
        |subject, _| {
            let (mut one, mut two) = (subject.client(), subject.client());
            assert_eq!((one.get("/").status(), two.get("/").status()), (200, 200));
            assert!(subject.client().is_closed(), "{}", subject.name());
            let overflow = "listener.127.0.0.1_0.downstream_global_cx_overflow";
            let counted = || {
                subject
                    .admin("/stats")
                    .contains("downstream_global_cx_overflow: 1")
            };
            await_true(overflow, counted);
            drop(one);
            await_true("room again", || {
                let mut client = subject.client();
                client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
                matches!(client.try_receive(), Ok(Some(_)))
            });
        },
    );
}
