//! The walk over everything inside a resource: notice the unknown, take out what is Istio's own, name the keys, list the
//! references.

use prost_reflect::{DynamicMessage, MessageDescriptor, ReflectMessage as _, Value};
use serde_json::json;

use super::istio::{self, Fate};
use super::{pack, reference, sealed, text, written};
use crate::ir::{Content, Identity, References};
use crate::schema::{self, ConfigError, push_field};

/// Messages in which an unknown field may mean that something is let through that should not be.
const GUARDED: &[&str] = &[
    "envoy.config.core.v3.TransportSocket",
    "envoy.config.cluster.v3.Cluster.TransportSocketMatch",
    "envoy.config.listener.v3.FilterChainMatch",
    "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
    "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
    "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
    "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig",
    "envoy.extensions.filters.http.rbac.v3.RBAC",
    "envoy.extensions.filters.http.rbac.v3.RBACPerRoute",
    "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz",
    "envoy.extensions.filters.network.rbac.v3.RBAC",
];

/// Filters that count or limit what one proxy sees.
const STATEFUL: &[&str] = &[
    "envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency",
    "envoy.extensions.filters.http.admission_control.v3.AdmissionControl",
    "envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit",
    "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
    "envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
    "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit",
];

/// Entries of filter lists: name and `typed_config`.
const FILTERS: &[&str] = &[
    "envoy.config.cluster.v3.Filter",
    "envoy.config.listener.v3.Filter",
    "envoy.config.listener.v3.ListenerFilter",
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
];

/// Fields by which a request would choose among all clusters of the node, other pods' included.
const CHOSEN_BY_REQUEST: &[&str] = &[
    "cluster_header",
    "cluster_specifier_plugin",
    "inline_cluster_specifier_plugin",
];

/// Secrets that stand for the workload's own certificate and for the roots it trusts.
const OWN_CERTIFICATE: &str = "default";
const OWN_ROOTS: &str = "ROOTCA";

/// The certificate asked for when a connection carries no identity: no key store has it.
pub(crate) const NO_IDENTITY: &str = "dpumesh-no-identity";

/// How deep `Any` may nest in `Any`.
const MAX_ANY: usize = 16;

/// One walk.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    identity: &'a Identity,
    /// Path and what was noticed.
    pub(super) notes: Vec<(String, String)>,
    pub(super) stateful: bool,
    references: References,
    path: String,
    guarded: bool,
    nested: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(identity: &'a Identity) -> Self {
        Self {
            identity,
            notes: Vec::new(),
            stateful: false,
            references: References::default(),
            path: String::new(),
            guarded: false,
            nested: 0,
        }
    }

    pub(super) fn note(&mut self, path: impl Into<String>, what: impl Into<String>) {
        self.notes.push((path.into(), what.into()));
    }

    /// Walks `message`, which stands at `path`, and seals what is left of it. References and state are counted anew.
    pub(super) fn content(
        &mut self,
        message: &mut DynamicMessage,
        type_name: &'static str,
        path: &str,
    ) -> Result<Content, ConfigError> {
        path.clone_into(&mut self.path);
        self.references = References::default();
        self.stateful = false;
        self.message(message)?;
        Ok(sealed(message, type_name, std::mem::take(&mut self.references)))
    }

    fn refuse(&self, reason: impl Into<String>) -> ConfigError {
        ConfigError::new(self.path.as_str(), reason)
    }

    fn message(&mut self, message: &mut DynamicMessage) -> Result<(), ConfigError> {
        let descriptor = message.descriptor();
        let name = descriptor.full_name();
        if name == "google.protobuf.Any" {
            return self.any(message);
        }
        if name.starts_with("google.protobuf.") {
            return Ok(());
        }
        let was_guarded = self.guarded;
        self.guarded |= GUARDED.contains(&name);
        self.stateful |= STATEFUL.contains(&name);
        self.unknown_fields(message, &descriptor)?;
        self.normalise(message, name)?;
        reference::collect(message, &mut self.references);
        for (field, value) in message.fields_mut() {
            let mark = self.path.len();
            push_field(&mut self.path, field.name());
            if CHOSEN_BY_REQUEST.contains(&field.name()) {
                return Err(self.refuse("would let a request choose among the clusters of every pod"));
            }
            self.value(&field, value)?;
            self.path.truncate(mark);
        }
        self.guarded = was_guarded;
        Ok(())
    }

    fn unknown_fields(
        &mut self,
        message: &DynamicMessage,
        of: &MessageDescriptor,
    ) -> Result<(), ConfigError> {
        let numbers: Vec<u32> = message
            .unknown_fields()
            .map(prost_reflect::UnknownField::number)
            .collect();
        for number in numbers {
            let what = format!("unknown field number {number} of {}", of.full_name());
            if self.guarded {
                return Err(self.refuse(what));
            }
            let path = self.path.clone();
            self.note(path, what);
        }
        Ok(())
    }

    fn value(
        &mut self,
        field: &prost_reflect::FieldDescriptor,
        value: &mut Value,
    ) -> Result<(), ConfigError> {
        match value {
            Value::Message(message) => self.message(message),
            Value::List(items) => self.list(field, items),
            Value::Map(items) => {
                let mut keys: Vec<_> = items.keys().cloned().collect();
                keys.sort();
                for key in keys {
                    let mark = self.path.len();
                    let shown = key.as_str().map_or_else(|| format!("{key:?}"), str::to_owned);
                    self.path.push_str(&format!("[{shown}]"));
                    if let Some(item) = items.get_mut(&key) {
                        self.value(field, item)?;
                    }
                    self.path.truncate(mark);
                }
                Ok(())
            }
            Value::EnumNumber(number) if self.guarded => self.known_choice(field, *number),
            _ => Ok(()),
        }
    }

    fn known_choice(&self, field: &prost_reflect::FieldDescriptor, number: i32) -> Result<(), ConfigError> {
        let kind = field.kind();
        match kind.as_enum() {
            Some(choices) if choices.get_value(number).is_none() => {
                Err(self.refuse(format!("unknown value {number} of {}", choices.full_name())))
            }
            _ => Ok(()),
        }
    }

    fn list(
        &mut self,
        field: &prost_reflect::FieldDescriptor,
        items: &mut Vec<Value>,
    ) -> Result<(), ConfigError> {
        let mut kept = Vec::with_capacity(items.len());
        for (index, mut item) in std::mem::take(items).into_iter().enumerate() {
            let mark = self.path.len();
            self.path.push_str(&format!("[{index}]"));
            let keep = match &mut item {
                Value::Message(message) if FILTERS.contains(&message.descriptor().full_name()) => {
                    self.filter(message)?
                }
                _ => true,
            };
            if keep {
                self.value(field, &mut item)?;
                kept.push(item);
            }
            self.path.truncate(mark);
        }
        *items = kept;
        Ok(())
    }

    /// Decides about an entry of a filter list; `false`: it goes.
    fn filter(&mut self, filter: &mut DynamicMessage) -> Result<bool, ConfigError> {
        let name = text(filter, "name");
        let path = self.path.clone();
        if filter.has_field_by_name("config_discovery") {
            return Err(self.refuse(format!(
                "filter {name} asks for its configuration by ECDS, which is not supported yet"
            )));
        }
        let Some(config) = filter
            .get_field_by_name("typed_config")
            .and_then(|v| v.as_message().cloned())
        else {
            return Err(self.refuse(format!("filter {name} has no typed_config")));
        };
        let type_name = effective_type(&config);
        let Some(row) = istio::row(&type_name) else {
            let optional = filter
                .get_field_by_name("is_optional")
                .and_then(|v| v.as_bool())
                .unwrap_or(false);
            if optional && schema::message(&type_name).is_none() {
                self.note(
                    path,
                    format!("optional filter {name} of unknown type {type_name} taken out"),
                );
                return Ok(false);
            }
            return Ok(true);
        };
        self.note(path, format!("{name}: {}", row.reason));
        match row.fate {
            Fate::Strip => Ok(false),
            Fate::AlpnFilterState => {
                *filter = written(filter.descriptor().full_name(), &istio::alpn_filter());
                Ok(true)
            }
        }
    }

    fn any(&mut self, message: &mut DynamicMessage) -> Result<(), ConfigError> {
        if self.nested == MAX_ANY {
            return Err(self.refuse(format!("more than {MAX_ANY} levels of Any")));
        }
        let type_name = effective_type(message);
        let mut inner = schema::unpack_any(message, &self.path)?;
        if matches!(
            inner.descriptor().full_name(),
            "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct"
        ) {
            return Err(self.refuse(format!("type {type_name} is not supported yet")));
        }
        self.nested += 1;
        self.message(&mut inner)?;
        self.nested -= 1;
        if let Value::Message(fresh) = pack(&inner) {
            *message = fresh;
        }
        Ok(())
    }

    /// Rewrites what means "the one workload of this proxy" into what is true in a proxy of many.
    fn normalise(&mut self, message: &mut DynamicMessage, name: &str) -> Result<(), ConfigError> {
        match name {
            "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext" => {
                drop_peer_exchange(message);
                Ok(())
            }
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
                choose_certificate_by_connection(message);
                Ok(())
            }
            "envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig" => self.secret(message),
            _ => Ok(()),
        }
    }

    fn secret(&self, message: &mut DynamicMessage) -> Result<(), ConfigError> {
        let name = text(message, "name");
        let new = match name.as_str() {
            OWN_CERTIFICATE => self.identity.spiffe(),
            OWN_ROOTS => self.identity.roots(),
            NO_IDENTITY => return Ok(()),
            _ => return Err(self.refuse(format!("secret {name:?} is neither the workload's certificate nor its roots; others are not supported yet"))),
        };
        message.set_field_by_name("name", Value::String(new));
        Ok(())
    }
}

/// The type inside an `Any`, looking through `TypedStruct`.
fn effective_type(any: &DynamicMessage) -> String {
    let url = text(any, "type_url");
    let name = url.rsplit('/').next().unwrap_or_default().to_owned();
    if !matches!(
        name.as_str(),
        "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct"
    ) {
        return name;
    }
    schema::unpack_any(any, "").map_or(name, |inner| {
        text(&inner, "type_url")
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned()
    })
}

fn drop_peer_exchange(tls: &mut DynamicMessage) {
    if let Some(Value::List(protocols)) = tls.get_field_by_name_mut("alpn_protocols") {
        protocols.retain(|protocol| protocol.as_str() != Some(istio::PEER_EXCHANGE));
    }
}

/// Replaces "my certificate" of an upstream TLS context by "the certificate that the downstream connection's chain named": one cluster
/// then serves every identity of the node, and connections of different identities are never pooled together.
fn choose_certificate_by_connection(tls: &mut DynamicMessage) {
    let Some(Value::Message(common)) = tls.get_field_by_name_mut("common_tls_context") else {
        return;
    };
    let own = match common
        .get_field_by_name("tls_certificate_sds_secret_configs")
        .as_deref()
    {
        Some(Value::List(configs)) => match configs.as_slice() {
            [Value::Message(only)] if text(only, "name") == OWN_CERTIFICATE => only.clone(),
            _ => return,
        },
        _ => return,
    };
    common.clear_field_by_name("tls_certificate_sds_secret_configs");
    let mapper = json!({
        "name": "envoy.tls.certificate_mappers.filter_state_override",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.cert_mappers.filter_state_override.v3.Config",
            "default_value": NO_IDENTITY,
        },
    });
    let mut selector = written(
        "envoy.extensions.transport_sockets.tls.cert_selectors.on_demand_secret.v3.Config",
        &json!({"certificate_mapper": mapper}),
    );
    if let Some(source) = own.get_field_by_name("sds_config") {
        selector.set_field_by_name("config_source", source.into_owned());
    }
    let mut extension = written(
        "envoy.config.core.v3.TypedExtensionConfig",
        &json!({"name": "envoy.tls.certificate_selectors.on_demand_secret"}),
    );
    extension.set_field_by_name("typed_config", pack(&selector));
    common.set_field_by_name("custom_tls_certificate_selector", Value::Message(extension));
}
