//! Envoy's message descriptors, and JSON turned into messages by them.
//!
//! `envoy.binpb` is a `FileDescriptorSet` compiled by protox from the `.proto` files that the `envoy-types` package
//! ships and the few of `proto/`; [`ROOTS`] names the files it starts from. The test below compiles it anew and compares;
//! run it with `UPDATE_DESCRIPTORS=1` to write the file. A field or an extension type the set does not know is an error
//! that names its path, before any value is looked at. What a known field means is the reader's matter: the translation
//! of what a control plane sends ([`crate::translate`]), or a proxy's own table of what it implements.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};
use serde_json::Value;

mod at;
mod error;

pub use at::At;
pub use error::ConfigError;

/// The `.proto` files whose messages (and all they import) a configuration may use.
pub const ROOTS: &[&str] = &[
    // First: protox takes their `common.` for the package `envoy.extensions.filters.common` once that is known.
    "envoy/extensions/filters/http/local_ratelimit/v3/local_rate_limit.proto",
    "envoy/extensions/filters/network/local_ratelimit/v3/local_rate_limit.proto",
    "envoy/extensions/filters/network/ratelimit/v3/rate_limit.proto",
    "envoy/config/bootstrap/v3/bootstrap.proto",
    "envoy/config/trace/v3/datadog.proto",
    "envoy/config/trace/v3/opentelemetry.proto",
    "envoy/config/trace/v3/skywalking.proto",
    "envoy/config/trace/v3/zipkin.proto",
    "envoy/extensions/access_loggers/file/v3/file.proto",
    "envoy/extensions/access_loggers/filters/cel/v3/cel.proto",
    "envoy/extensions/access_loggers/grpc/v3/als.proto",
    "envoy/extensions/access_loggers/open_telemetry/v3/logs_service.proto",
    "envoy/extensions/access_loggers/stream/v3/stream.proto",
    "envoy/extensions/filters/http/adaptive_concurrency/v3/adaptive_concurrency.proto",
    "envoy/extensions/filters/http/admission_control/v3/admission_control.proto",
    "envoy/extensions/filters/http/bandwidth_limit/v3/bandwidth_limit.proto",
    "envoy/extensions/filters/http/buffer/v3/buffer.proto",
    "envoy/extensions/filters/http/compressor/v3/compressor.proto",
    "envoy/extensions/filters/http/cors/v3/cors.proto",
    "envoy/extensions/filters/http/csrf/v3/csrf.proto",
    "envoy/extensions/filters/http/decompressor/v3/decompressor.proto",
    "envoy/extensions/filters/http/ext_authz/v3/ext_authz.proto",
    "envoy/extensions/filters/http/ext_proc/v3/ext_proc.proto",
    "envoy/extensions/filters/http/fault/v3/fault.proto",
    "envoy/extensions/filters/http/grpc_stats/v3/config.proto",
    "envoy/extensions/filters/http/grpc_web/v3/grpc_web.proto",
    "envoy/extensions/filters/http/header_mutation/v3/header_mutation.proto",
    "envoy/extensions/filters/http/health_check/v3/health_check.proto",
    "envoy/extensions/filters/http/jwt_authn/v3/config.proto",
    "envoy/extensions/filters/http/lua/v3/lua.proto",
    "envoy/extensions/filters/http/ratelimit/v3/rate_limit.proto",
    "envoy/extensions/filters/http/rbac/v3/rbac.proto",
    "envoy/extensions/filters/http/router/v3/router.proto",
    "envoy/extensions/filters/http/set_filter_state/v3/set_filter_state.proto",
    "envoy/extensions/filters/http/stateful_session/v3/stateful_session.proto",
    "envoy/extensions/filters/http/wasm/v3/wasm.proto",
    "envoy/extensions/filters/listener/http_inspector/v3/http_inspector.proto",
    "envoy/extensions/filters/listener/original_dst/v3/original_dst.proto",
    "envoy/extensions/filters/listener/original_src/v3/original_src.proto",
    "envoy/extensions/filters/listener/proxy_protocol/v3/proxy_protocol.proto",
    "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
    "envoy/extensions/filters/network/connection_limit/v3/connection_limit.proto",
    "envoy/extensions/filters/network/ext_authz/v3/ext_authz.proto",
    "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
    "envoy/extensions/filters/network/mongo_proxy/v3/mongo_proxy.proto",
    "envoy/extensions/filters/network/rbac/v3/rbac.proto",
    "envoy/extensions/filters/network/set_filter_state/v3/set_filter_state.proto",
    "envoy/extensions/filters/network/sni_cluster/v3/sni_cluster.proto",
    "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
    "envoy/extensions/filters/network/wasm/v3/wasm.proto",
    "envoy/extensions/formatter/metadata/v3/metadata.proto",
    "envoy/extensions/formatter/req_without_query/v3/req_without_query.proto",
    "envoy/extensions/http/header_formatters/preserve_case/v3/preserve_case.proto",
    "envoy/extensions/http/original_ip_detection/xff/v3/xff.proto",
    "envoy/extensions/http/stateful_session/cookie/v3/cookie.proto",
    "envoy/extensions/http/stateful_session/header/v3/header.proto",
    "envoy/extensions/internal_redirect/allow_listed_routes/v3/allow_listed_routes_config.proto",
    "envoy/extensions/internal_redirect/previous_routes/v3/previous_routes_config.proto",
    "envoy/extensions/internal_redirect/safe_cross_scheme/v3/safe_cross_scheme_config.proto",
    "envoy/extensions/load_balancing_policies/client_side_weighted_round_robin/v3/client_side_weighted_round_robin.proto",
    "envoy/extensions/load_balancing_policies/cluster_provided/v3/cluster_provided.proto",
    "envoy/extensions/load_balancing_policies/least_request/v3/least_request.proto",
    "envoy/extensions/load_balancing_policies/maglev/v3/maglev.proto",
    "envoy/extensions/load_balancing_policies/override_host/v3/override_host.proto",
    "envoy/extensions/load_balancing_policies/random/v3/random.proto",
    "envoy/extensions/load_balancing_policies/ring_hash/v3/ring_hash.proto",
    "envoy/extensions/load_balancing_policies/round_robin/v3/round_robin.proto",
    "envoy/extensions/load_balancing_policies/subset/v3/subset.proto",
    "envoy/extensions/load_balancing_policies/wrr_locality/v3/wrr_locality.proto",
    "envoy/extensions/matching/common_inputs/network/v3/network_inputs.proto",
    "envoy/extensions/network/dns_resolver/cares/v3/cares_dns_resolver.proto",
    "envoy/extensions/path/match/uri_template/v3/uri_template_match.proto",
    "envoy/extensions/path/rewrite/uri_template/v3/uri_template_rewrite.proto",
    "envoy/extensions/request_id/uuid/v3/uuid.proto",
    "envoy/extensions/resource_monitors/downstream_connections/v3/downstream_connections.proto",
    "envoy/extensions/resource_monitors/fixed_heap/v3/fixed_heap.proto",
    "envoy/extensions/retry/host/omit_canary_hosts/v3/omit_canary_hosts.proto",
    "envoy/extensions/retry/host/omit_host_metadata/v3/omit_host_metadata_config.proto",
    "envoy/extensions/retry/host/previous_hosts/v3/previous_hosts.proto",
    "envoy/extensions/retry/priority/previous_priorities/v3/previous_priorities_config.proto",
    "envoy/extensions/transport_sockets/internal_upstream/v3/internal_upstream.proto",
    "envoy/extensions/transport_sockets/proxy_protocol/v3/upstream_proxy_protocol.proto",
    "envoy/extensions/transport_sockets/raw_buffer/v3/raw_buffer.proto",
    "envoy/extensions/transport_sockets/starttls/v3/starttls.proto",
    "envoy/extensions/transport_sockets/tls/cert_mappers/filter_state_override/v3/config.proto",
    "envoy/extensions/transport_sockets/tls/cert_selectors/on_demand_secret/v3/config.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls.proto",
    "envoy/extensions/upstreams/http/v3/http_protocol_options.proto",
    "envoy/service/discovery/v3/discovery.proto",
    "udpa/type/v1/typed_struct.proto",
    "xds/type/matcher/v3/ip.proto",
    "xds/type/v3/typed_struct.proto",
];

static DESCRIPTORS: &[u8] = include_bytes!("envoy.binpb");

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(DESCRIPTORS).expect("the checked-in descriptor set is compared by a test")
});

/// The descriptor of a message by its full protobuf name, if the set has it.
pub fn message(full_name: &str) -> Option<MessageDescriptor> {
    POOL.get_message_by_name(full_name)
}

/// Turns a JSON value into the message `full_name`. `path` is where the value stands in its file.
///
/// # Errors
/// Unknown fields and extension types, and values of the wrong type, each with the field path.
pub fn value_to_message(full_name: &str, value: &Value, path: &str) -> Result<DynamicMessage, ConfigError> {
    let descriptor = message(full_name).ok_or_else(|| unknown_type(path, full_name))?;
    let mut at = path.to_owned();
    check_known(&descriptor, value, &mut at)?;
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
    DynamicMessage::deserialize(descriptor, deserializer).map_err(|e| {
        let inner = track.path().to_string();
        let dot = if path.is_empty() || inner.is_empty() || inner.starts_with('[') {
            ""
        } else {
            "."
        };
        ConfigError::new(format!("{path}{dot}{inner}"), e.to_string())
    })
}

/// Decodes the message inside a `google.protobuf.Any`.
///
/// # Errors
/// The type is not one this build knows, or its bytes are not of that type.
pub fn unpack_any(any: &DynamicMessage, path: &str) -> Result<DynamicMessage, ConfigError> {
    let text = |name| {
        any.get_field_by_name(name)
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default()
    };
    let type_url = text("type_url");
    let name = type_name(&type_url);
    let descriptor = message(name).ok_or_else(|| unknown_type(path, name))?;
    let bytes = any
        .get_field_by_name("value")
        .and_then(|v| v.as_bytes().cloned())
        .unwrap_or_default();
    DynamicMessage::decode(descriptor, bytes)
        .map_err(|e| ConfigError::new(path, format!("not a valid {name}: {e}")))
}

fn type_name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or(type_url)
}

fn unknown_type(path: &str, name: &str) -> ConfigError {
    ConfigError::new(path, format!("type {name} is not supported yet"))
}

/// Walks JSON beside the descriptors and stops at the first field or type nobody knows.
fn check_known(descriptor: &MessageDescriptor, value: &Value, path: &mut String) -> Result<(), ConfigError> {
    match descriptor.full_name() {
        "google.protobuf.Any" => return check_known_any(value, path),
        name if name.starts_with("google.protobuf.") => return Ok(()),
        _ => {}
    }
    let Value::Object(fields) = value else {
        return if value.is_null() {
            Ok(())
        } else {
            Err(ConfigError::new(
                path.as_str(),
                format!("expected a mapping of {}", descriptor.full_name()),
            ))
        };
    };
    for (key, inner) in fields {
        let mark = path.len();
        push_field(path, key);
        let field = descriptor
            .get_field_by_name(key)
            .or_else(|| descriptor.get_field_by_json_name(key));
        let Some(field) = field else {
            return Err(ConfigError::new(
                path.as_str(),
                format!("unknown field of {}", descriptor.full_name()),
            ));
        };
        path.truncate(mark);
        push_field(path, field.name());
        check_known_field(&field, inner, path)?;
        path.truncate(mark);
    }
    Ok(())
}

fn check_known_field(field: &FieldDescriptor, value: &Value, path: &mut String) -> Result<(), ConfigError> {
    let mark = path.len();
    if field.is_map() {
        let Kind::Message(entry) = field.kind() else {
            return Ok(());
        };
        let (Kind::Message(inner), Value::Object(map)) = (entry.map_entry_value_field().kind(), value) else {
            return Ok(());
        };
        for (key, value) in map {
            path.push_str(&format!("[{key}]"));
            check_known(&inner, value, path)?;
            path.truncate(mark);
        }
        return Ok(());
    }
    let Kind::Message(inner) = field.kind() else {
        return Ok(());
    };
    if !field.is_list() {
        return check_known(&inner, value, path);
    }
    let Value::Array(items) = value else {
        return if value.is_null() {
            Ok(())
        } else {
            Err(ConfigError::new(path.as_str(), "expected a list"))
        };
    };
    for (index, item) in items.iter().enumerate() {
        path.push_str(&format!("[{index}]"));
        check_known(&inner, item, path)?;
        path.truncate(mark);
    }
    Ok(())
}

fn check_known_any(value: &Value, path: &mut String) -> Result<(), ConfigError> {
    let Some(map) = value.as_object() else {
        return Err(ConfigError::new(path.as_str(), "expected a mapping"));
    };
    let Some(type_url) = map.get("@type").and_then(Value::as_str) else {
        return Err(ConfigError::new(path.as_str(), "\"@type\" is missing"));
    };
    let name = type_name(type_url);
    let descriptor = message(name).ok_or_else(|| unknown_type(path, name))?;
    let mut rest = map.clone();
    rest.remove("@type");
    check_known(&descriptor, &Value::Object(rest), path)
}

/// Appends `.field` (or `field` at the root) to a path.
pub fn push_field(path: &mut String, field: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(field);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::Command;

    const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";

    /// Where cargo unpacked the package that carries Envoy's `.proto` files.
    fn envoy_types_folder() -> std::path::PathBuf {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let out = Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .output()
            .expect("cargo runs");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
        let package = metadata["packages"]
            .as_array()
            .unwrap()
            .iter()
            .find(|p| p["name"] == "envoy-types")
            .unwrap();
        Path::new(package["manifest_path"].as_str().unwrap())
            .parent()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn the_checked_in_descriptors_are_what_envoy_types_ships() {
        let protos = envoy_types_folder().join("proto");
        let folders = [
            "data-plane-api",
            "xds",
            "googleapis",
            "protoc-gen-validate",
            "cel-spec",
            "opentelemetry-proto",
            "client_model",
        ];
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
        let fresh = protox::Compiler::new(folders.map(|f| protos.join(f)).into_iter().chain([own]))
            .unwrap()
            .include_imports(true)
            .include_source_info(false)
            .open_files(ROOTS)
            .unwrap()
            .encode_file_descriptor_set();
        if std::env::var_os("UPDATE_DESCRIPTORS").is_some() {
            std::fs::write(
                concat!(env!("CARGO_MANIFEST_DIR"), "/src/schema/envoy.binpb"),
                &fresh,
            )
            .unwrap();
        }
        assert!(
            fresh == DESCRIPTORS,
            "run this test with UPDATE_DESCRIPTORS=1 and commit src/schema/envoy.binpb"
        );
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        let value = serde_json::json!({"static_resources": {"listeners": [{}, {"adress": {}}]}});
        let error = value_to_message(BOOTSTRAP, &value, "").unwrap_err();
        assert_eq!(error.path, "static_resources.listeners[1].adress");
        assert_eq!(error.reason, "unknown field of envoy.config.listener.v3.Listener");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_path() {
        let value = serde_json::json!({"static_resources": {"clusters": [{"connect_timeout": "soon"}]}});
        let error = value_to_message(BOOTSTRAP, &value, "").unwrap_err();
        assert_eq!(error.path, "static_resources.clusters[0].connect_timeout");
    }

    #[test]
    fn an_unknown_extension_type_is_named_with_its_path() {
        let value = serde_json::json!({"static_resources": {"listeners": [{"filter_chains": [{"filters": [
            {"name": "x", "typed_config": {"@type": "type.googleapis.com/stats.PluginConfig"}}]}]}]}});
        let error = value_to_message(BOOTSTRAP, &value, "").unwrap_err();
        assert_eq!(
            error.path,
            "static_resources.listeners[0].filter_chains[0].filters[0].typed_config"
        );
        assert_eq!(error.reason, "type stats.PluginConfig is not supported yet");
    }
}
