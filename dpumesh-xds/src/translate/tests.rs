use proptest::prelude::*;
use prost::Message as _;
use serde_json::json;

use super::*;
use crate::ir::Role;
use crate::recorded;

const RBAC_LISTENER: &str = "virtualInbound";

fn identity() -> Identity {
    recorded::pod(1).identity
}

fn listener(value: &serde_json::Value) -> Vec<u8> {
    let message = schema::value_to_message("envoy.config.listener.v3.Listener", value, "").unwrap();
    prost_reflect::prost::Message::encode_to_vec(&message)
}

fn read_listener(bytes: &[u8]) -> Result<Translated, ConfigError> {
    translate(
        ResourceType::Listener,
        "l",
        ResourceType::Listener.url(),
        bytes,
        &identity(),
    )
}

fn tcp(cluster: &str) -> serde_json::Value {
    json!({"name": "tcp", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "x", "cluster": cluster}})
}

fn with_chain(chain: serde_json::Value) -> serde_json::Value {
    json!({"name": "l", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 80}},
        "traffic_direction": "OUTBOUND", "bind_to_port": false, "filter_chains": [chain]})
}

#[test]
fn all_that_istiod_sent_is_understood() {
    for pod in 0..recorded::PODS.len() {
        let (view, notes) = recorded::view(pod);
        assert_eq!(view.missing(), Vec::<String>::new());
        for note in &notes {
            assert!(!note.what.contains("unknown"), "{note:?}");
        }
        let roles: Vec<Role> = view.listeners.values().map(|l| l.role).collect();
        assert_eq!(roles.iter().filter(|r| **r == Role::Inbound).count(), 1);
        assert_eq!(roles.iter().filter(|r| **r == Role::CatchAll).count(), 1);
        assert!(view.clusters["outbound|80|v1|reviews.shop.svc.cluster.local"].stateful);
        assert!(!view.clusters["outbound|80||front.shop.svc.cluster.local"].stateful);
        assert!(!view.clusters["BlackHoleCluster"].stateful);
    }
}

#[test]
fn nothing_of_istios_own_build_is_left() {
    let (view, _) = recorded::view(1);
    let mut contents: Vec<&Content> = view.clusters.values().map(|c| &c.content).collect();
    for listener in view.listeners.values() {
        contents.extend(listener.all_chains().map(|chain| &chain.content));
    }
    let mut all = String::new();
    for content in contents {
        all.push_str(&String::from_utf8_lossy(&content.body.bytes));
    }
    for gone in [
        "istio.stats",
        "istio.alpn",
        "metadata_exchange",
        "istio-peer-exchange",
        "127.0.0.6",
    ] {
        assert!(!all.contains(gone), "{gone} is left");
    }
    assert!(all.contains(istio::ALPN_OVERRIDE));
    assert!(all.contains("spiffe://cluster.local/ns/shop/sa/reviews"));
    assert!(all.contains("ROOTCA@cluster.local"));
}

#[test]
fn references_are_seen_through_every_layer() {
    let (view, _) = recorded::view(1);
    let inbound = view.listeners["virtualInbound"].references();
    assert!(inbound.clusters.contains("inbound|8080||"), "{inbound:?}");
    assert!(inbound.clusters.contains("BlackHoleCluster"));
    assert_eq!(view.wanted_routes(), ["80".to_owned()].into());
    let routes = &view.routes["80"].content.references.clusters;
    assert!(routes.contains("outbound|80|v2|reviews.shop.svc.cluster.local"));
}

#[test]
fn renaming_changes_references_and_nothing_else() {
    let (view, _) = recorded::view(0);
    let route = &view.routes["80"].content;
    let old = "outbound|80|v2|reviews.shop.svc.cluster.local";
    let there = Renames {
        clusters: [(old.to_owned(), "new".to_owned())].into(),
        ..Renames::default()
    };
    let back = Renames {
        clusters: [("new".to_owned(), old.to_owned())].into(),
        ..Renames::default()
    };
    let changed = renamed(route, &there);
    assert!(changed.references.clusters.contains("new") && !changed.references.clusters.contains(old));
    assert_ne!(changed.body, route.body);
    assert_eq!(renamed(&changed, &back), *route);
}

#[test]
fn unknown_fields_of_a_security_filter_refuse_the_resource_by_path() {
    let resource = recorded::resources(1, "lds")
        .into_iter()
        .find(|r| r.name == RBAC_LISTENER)
        .unwrap();
    let any = resource.resource.unwrap();
    let mut message = DynamicMessage::decode(
        schema::message("envoy.config.listener.v3.Listener").unwrap(),
        &*any.value,
    )
    .unwrap();
    poison(&mut message, "envoy.extensions.filters.network.rbac.v3.RBAC");
    let bytes = prost_reflect::prost::Message::encode_to_vec(&message);
    let error = translate(
        ResourceType::Listener,
        RBAC_LISTENER,
        &any.type_url,
        &bytes,
        &identity(),
    )
    .unwrap_err();
    assert_eq!(error.resource.as_deref(), Some("listener \"virtualInbound\""));
    assert_eq!(error.path, "filter_chains[2].filters[1].typed_config");
    assert!(error.reason.starts_with("unknown field number 7777"), "{error}");

    // The same field in a filter that guards nothing is a note.
    let mut message = DynamicMessage::decode(message.descriptor_of(), &*any.value).unwrap();
    poison(
        &mut message,
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
    );
    let bytes = prost_reflect::prost::Message::encode_to_vec(&message);
    let taken = translate(
        ResourceType::Listener,
        RBAC_LISTENER,
        &any.type_url,
        &bytes,
        &identity(),
    )
    .unwrap();
    assert!(
        taken
            .notes
            .iter()
            .any(|n| n.what.contains("unknown field number 7777"))
    );
}

trait DescriptorOf {
    fn descriptor_of(&self) -> prost_reflect::MessageDescriptor;
}

impl DescriptorOf for DynamicMessage {
    fn descriptor_of(&self) -> prost_reflect::MessageDescriptor {
        use prost_reflect::ReflectMessage as _;
        self.descriptor()
    }
}

/// Adds a field nobody knows to every `Any` of `type_name`.
fn poison(message: &mut DynamicMessage, type_name: &str) {
    if text(message, "type_url").ends_with(type_name) {
        let mut bytes = message
            .get_field_by_name("value")
            .and_then(|v| v.as_bytes().map(|b| b.to_vec()))
            .unwrap();
        prost_reflect::prost::encoding::uint32::encode(7777, &1, &mut bytes);
        message.set_field_by_name("value", Value::Bytes(bytes.into()));
        return;
    }
    for (_, value) in message.fields_mut() {
        match value {
            Value::Message(inner) => poison(inner, type_name),
            Value::List(items) => items
                .iter_mut()
                .filter_map(Value::as_message_mut)
                .for_each(|m| poison(m, type_name)),
            _ => {}
        }
    }
}

#[test]
fn refusals_name_the_field() {
    let cases = [
        (
            with_chain(json!({"filters": [{"name": "x", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"}}],
                "filter_chain_match": {"source_ports": [7]}})),
            "filter_chains[0].filter_chain_match.source_ports",
            "is not supported in a chain's match yet",
        ),
        (
            with_chain(json!({"filters": [tcp("c")], "filter_chain_match": {"server_names": ["a.*"]}})),
            "filter_chains[0].filter_chain_match.server_names[0]",
            "only a leading `*.` may be a wildcard",
        ),
        (
            with_chain(
                json!({"filters": [tcp("c")], "transport_socket": {"name": "t", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {"tls_certificate_sds_secret_configs": [{"name": "kubernetes://other"}]}}}}),
            ),
            "filter_chains[0].transport_socket.typed_config.common_tls_context.tls_certificate_sds_secret_configs[0]",
            "secret \"kubernetes://other\" is neither the workload's certificate nor its roots; others are not supported yet",
        ),
        (
            with_chain(json!({"filters": []})),
            "filter_chains[0].filters",
            "nothing is left of them",
        ),
    ];
    for (value, path, reason) in cases {
        let error = read_listener(&listener(&value)).unwrap_err();
        assert_eq!((error.path.as_str(), error.reason.as_str()), (path, reason));
    }
}

#[test]
fn a_resource_must_be_what_it_is_called() {
    let bytes = listener(&with_chain(json!({"filters": [tcp("c")]})));
    let wrong_type = translate(
        ResourceType::Listener,
        "l",
        ResourceType::Cluster.url(),
        &bytes,
        &identity(),
    );
    assert!(wrong_type.unwrap_err().reason.starts_with("is of type"));
    let wrong_name = translate(
        ResourceType::Listener,
        "m",
        ResourceType::Listener.url(),
        &bytes,
        &identity(),
    );
    assert_eq!(
        wrong_name.unwrap_err().to_string(),
        "listener \"m\": name: is \"l\" in a resource called \"m\""
    );
    let oversized = vec![0; MAX_RESOURCE + 1];
    assert!(
        read_listener(&oversized)
            .unwrap_err()
            .reason
            .contains("more than")
    );
}

#[test]
fn nothing_written_here_fails_to_follow_the_schema() {
    written(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
        &istio::alpn_filter(),
    );
    assert!(recorded::view(0).0.clusters.len() > 5);
}

#[test]
fn every_truncation_is_an_error_or_a_resource_and_never_a_panic() {
    for (file, kind) in recorded::TYPES {
        for resource in recorded::resources(1, file).into_iter().take(3) {
            let any = resource.resource.unwrap();
            for length in 0..any.value.len() {
                let cut = translate(
                    kind,
                    &resource.name,
                    &any.type_url,
                    &any.value[..length],
                    &identity(),
                );
                if let Err(error) = cut {
                    assert!(error.resource.is_some());
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0..ResourceType::ALL.len()) {
        let kind = ResourceType::ALL[kind];
        let _ = translate(kind, "x", kind.url(), &bytes, &identity());
    }

    #[test]
    fn no_change_of_a_real_resource_makes_it_panic(
        pick in any::<prop::sample::Index>(),
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let all: Vec<_> = recorded::TYPES.iter()
            .flat_map(|(file, kind)| recorded::resources(1, file).into_iter().map(|r| (*kind, r)))
            .collect();
        let (kind, resource) = &all[pick.index(all.len())];
        let any = resource.resource.clone().unwrap();
        let mut bytes = any.value.clone();
        for (at, octet) in edits {
            let at = at.index(bytes.len());
            bytes[at] = octet;
        }
        let _ = translate(*kind, &resource.name, &any.type_url, &bytes, &identity());
    }
}

#[test]
fn a_response_that_was_recorded_decodes_as_ours() {
    let response = recorded::response(0, "lds");
    assert_eq!(response.type_url, ResourceType::Listener.url());
    assert!(!response.nonce.is_empty() && response.encode_to_vec().len() > 1000);
}

/// Everything that is typed, and the carried bodies as Envoy's JSON.
fn golden(view: &crate::ir::PodView, notes: &[Note]) -> String {
    use std::fmt::Write as _;

    let body = |content: &Content| {
        let json = serde_json::to_value(open(&content.body)).unwrap();
        serde_json::to_string_pretty(&sorted(json)).unwrap()
    };
    let mut text = String::new();
    for listener in view.listeners.values() {
        let Listener {
            name,
            role,
            addresses,
            detection,
            ..
        } = &**listener;
        writeln!(text, "listener {name:?} {role:?} {addresses:?}\n  {detection:?}").unwrap();
        for chain in listener.all_chains() {
            let stateful = if chain.stateful { " stateful" } else { "" };
            writeln!(text, "chain {:?}{stateful} {:?}", chain.name, chain.matches).unwrap();
            writeln!(text, "  {:?}", chain.content.references).unwrap();
            writeln!(text, "{}", body(&chain.content)).unwrap();
        }
    }
    for route in view.routes.values() {
        writeln!(text, "route {:?} {:?}", route.name, route.content.references).unwrap();
        writeln!(text, "{}", body(&route.content)).unwrap();
    }
    for cluster in view.clusters.values() {
        let stateful = if cluster.stateful { " stateful" } else { "" };
        writeln!(
            text,
            "cluster {:?}{stateful} {:?}",
            cluster.name, cluster.endpoints
        )
        .unwrap();
        writeln!(text, "{}", body(&cluster.content)).unwrap();
    }
    for assignment in view.endpoints.values() {
        writeln!(text, "endpoints {:?}", assignment.name).unwrap();
        writeln!(text, "{}", body(&assignment.content)).unwrap();
    }
    for note in notes {
        writeln!(text, "note\t{}\t{}\t{}", note.resource, note.path, note.what).unwrap();
    }
    text
}

/// Maps of a message come in any order.
fn sorted(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Object(fields) => {
            let fields: std::collections::BTreeMap<_, _> = fields.into_iter().collect();
            fields
                .into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect()
        }
        serde_json::Value::Array(values) => values.into_iter().map(sorted).collect(),
        other => other,
    }
}

#[test]
fn golden_translation_of_what_istiod_sent() {
    // The third pod is another replica of the second.
    for (index, (pod, _, _)) in recorded::PODS.iter().take(2).enumerate() {
        let (view, notes) = recorded::view(index);
        let text = golden(&view, &notes);
        let path = format!(
            "{}/tests/recorded/{pod}.translated.txt",
            env!("CARGO_MANIFEST_DIR")
        );
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        if let Some((line, (got, was))) = text
            .lines()
            .zip(golden.lines())
            .enumerate()
            .find(|(_, (a, b))| a != b)
        {
            panic!(
                "{path}:{}: {was}\nis now: {got}\nrun with UPDATE_GOLDEN=1 and look at the difference",
                line + 1
            );
        }
        assert_eq!(
            text.len(),
            golden.len(),
            "{path}: run with UPDATE_GOLDEN=1 and look at the difference"
        );
    }
}
