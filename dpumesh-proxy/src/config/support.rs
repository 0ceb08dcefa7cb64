//! What this proxy implements of Envoy's configuration, as one table, and the walk that holds a message against it.
//!
//! A field that is set and in neither list is refused with its full path: nothing is ignored silently. [`IMPLEMENTED`]
//! lists, by full message name, the fields that have their effect here; a field that is implemented for some of its
//! values is in the list too and its other values are refused where it is translated. [`NO_EFFECT`] is the short list of
//! fields that are accepted although they change nothing here, each with the reason.

use prost_reflect::{DynamicMessage, ReflectMessage, Value};

use super::ConfigError;
use super::schema::{push_field, unpack_any};

/// Fields that have their effect, by full message name. A message that is not here is refused as a whole.
pub const IMPLEMENTED: &[(&str, &[&str])] = &[
    (
        "envoy.config.bootstrap.v3.Bootstrap",
        &[
            "node",
            "static_resources",
            "dynamic_resources",
            "admin",
            "overload_manager",
        ],
    ),
    (
        "envoy.config.overload.v3.OverloadManager",
        &["refresh_interval", "resource_monitors", "actions"],
    ),
    (
        "envoy.config.overload.v3.ResourceMonitor",
        &["name", "typed_config"],
    ),
    ("envoy.config.overload.v3.OverloadAction", &["name", "triggers"]),
    (
        "envoy.config.overload.v3.Trigger",
        &["name", "threshold", "scaled"],
    ),
    ("envoy.config.overload.v3.ThresholdTrigger", &["value"]),
    (
        "envoy.config.overload.v3.ScaledTrigger",
        &["scaling_threshold", "saturation_threshold"],
    ),
    (
        "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
        &["max_heap_size_bytes"],
    ),
    (
        "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        &["max_active_downstream_connections"],
    ),
    (
        "envoy.config.bootstrap.v3.Bootstrap.StaticResources",
        &["listeners", "clusters", "secrets"],
    ),
    (
        "envoy.config.bootstrap.v3.Bootstrap.DynamicResources",
        &["lds_config", "cds_config", "ads_config"],
    ),
    ("envoy.config.bootstrap.v3.Admin", &["address"]),
    ("envoy.config.core.v3.Node", &["id", "cluster"]),
    (
        "envoy.config.core.v3.ConfigSource",
        &[
            "path",
            "path_config_source",
            "resource_api_version",
            "ads",
            "api_config_source",
        ],
    ),
    (
        "envoy.config.core.v3.PathConfigSource",
        &["path", "watched_directory"],
    ),
    ("envoy.config.core.v3.WatchedDirectory", &["path"]),
    (
        "envoy.service.discovery.v3.DiscoveryResponse",
        &["version_info", "resources", "type_url"],
    ),
    (
        "envoy.service.discovery.v3.Resource",
        &["name", "version", "resource"],
    ),
    ("envoy.config.core.v3.Address", &["socket_address"]),
    (
        "envoy.config.core.v3.SocketAddress",
        &["protocol", "address", "port_value"],
    ),
    (
        "envoy.config.listener.v3.Listener",
        &[
            "name",
            "address",
            "additional_addresses",
            "stat_prefix",
            "filter_chains",
            "default_filter_chain",
            "listener_filters",
            "transparent",
            "freebind",
            "reuse_port",
            "enable_reuse_port",
            "tcp_backlog_size",
            "access_log",
            "filter_chain_matcher",
            "listener_filters_timeout",
            "continue_on_listener_filters_timeout",
            "traffic_direction",
        ],
    ),
    ("envoy.config.listener.v3.AdditionalAddress", &["address"]),
    (
        "envoy.config.listener.v3.ListenerFilter",
        &["name", "typed_config", "filter_disabled"],
    ),
    (
        "envoy.config.listener.v3.FilterChain",
        &[
            "name",
            "filter_chain_match",
            "filters",
            "transport_socket",
            "transport_socket_connect_timeout",
        ],
    ),
    (
        "envoy.config.listener.v3.FilterChainMatch",
        &[
            "destination_port",
            "prefix_ranges",
            "source_prefix_ranges",
            "source_ports",
            "server_names",
            "transport_protocol",
            "application_protocols",
        ],
    ),
    (
        "envoy.config.core.v3.CidrRange",
        &["address_prefix", "prefix_len"],
    ),
    ("envoy.config.listener.v3.Filter", &["name", "typed_config"]),
    (
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
        &[],
    ),
    (
        "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
        &[
            "allow_requests_without_proxy_protocol",
            "pass_through_tlvs",
            "disallowed_versions",
            "stat_prefix",
        ],
    ),
    (
        "envoy.config.core.v3.ProxyProtocolPassThroughTLVs",
        &["match_type", "tlv_type"],
    ),
    (
        "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport",
        &["config", "transport_socket"],
    ),
    (
        "envoy.config.core.v3.ProxyProtocolConfig",
        &["version", "pass_through_tlvs", "added_tlvs"],
    ),
    ("envoy.config.core.v3.TlvEntry", &["type", "value"]),
    (
        "envoy.extensions.filters.listener.original_src.v3.OriginalSrc",
        &["mark"],
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        &[
            "stat_prefix",
            "cluster",
            "weighted_clusters",
            "idle_timeout",
            "access_log",
            "max_connect_attempts",
            "hash_policy",
            "tunneling_config",
        ],
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.TunnelingConfig",
        &["hostname", "use_post", "headers_to_add"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.OriginalDstLbConfig",
        &["use_http_header", "http_header_name"],
    ),
    ("envoy.type.v3.HashPolicy", &["source_ip"]),
    ("envoy.type.v3.HashPolicy.SourceIp", &[]),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster",
        &["clusters"],
    ),
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight",
        &["name", "weight"],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &[
            "codec_type",
            "stat_prefix",
            "route_config",
            "rds",
            "http_filters",
            "access_log",
            "server_name",
            "server_header_transformation",
            "common_http_protocol_options",
            "http_protocol_options",
            "http2_protocol_options",
            "request_headers_timeout",
            "stream_idle_timeout",
            "max_request_headers_kb",
            "generate_request_id",
            "preserve_external_request_id",
            "always_set_request_id_in_response",
            "use_remote_address",
            "normalize_path",
            "merge_slashes",
            "strip_any_host_port",
            "path_with_escaped_slashes_action",
            "forward_client_cert_details",
            "set_current_client_cert_details",
            "tracing",
            "request_id_extension",
            "upgrade_configs",
        ],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.UpgradeConfig",
        &["upgrade_type", "enabled"],
    ),
    (
        "envoy.config.route.v3.RouteAction.UpgradeConfig",
        &["upgrade_type", "enabled", "connect_config"],
    ),
    (
        "envoy.config.route.v3.RouteAction.UpgradeConfig.ConnectConfig",
        &[],
    ),
    ("envoy.config.route.v3.RouteMatch.ConnectMatcher", &[]),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.SetCurrentClientCertDetails",
        &["subject", "dns", "uri"],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing",
        &[
            "random_sampling",
            "overall_sampling",
            "max_path_tag_length",
            "custom_tags",
            "provider",
            "spawn_upstream_span",
            "no_context_propagation",
        ],
    ),
    ("envoy.config.trace.v3.Tracing.Http", &["name", "typed_config"]),
    (
        "envoy.config.trace.v3.OpenTelemetryConfig",
        &["grpc_service", "service_name", "max_cache_size"],
    ),
    (
        "envoy.config.trace.v3.ZipkinConfig",
        &[
            "collector_cluster",
            "collector_endpoint",
            "collector_endpoint_version",
            "collector_hostname",
            "trace_id_128bit",
            "shared_span_context",
            "trace_context_option",
        ],
    ),
    (
        "envoy.type.tracing.v3.CustomTag",
        &["tag", "literal", "environment", "request_header", "metadata"],
    ),
    ("envoy.type.tracing.v3.CustomTag.Literal", &["value"]),
    (
        "envoy.type.tracing.v3.CustomTag.Environment",
        &["name", "default_value"],
    ),
    (
        "envoy.type.tracing.v3.CustomTag.Header",
        &["name", "default_value"],
    ),
    (
        "envoy.type.tracing.v3.CustomTag.Metadata",
        &["kind", "metadata_key", "default_value"],
    ),
    (
        "envoy.type.metadata.v3.MetadataKind",
        &["request", "route", "cluster", "host"],
    ),
    ("envoy.type.metadata.v3.MetadataKind.Request", &[]),
    ("envoy.type.metadata.v3.MetadataKind.Route", &[]),
    ("envoy.type.metadata.v3.MetadataKind.Cluster", &[]),
    ("envoy.type.metadata.v3.MetadataKind.Host", &[]),
    ("envoy.type.metadata.v3.MetadataKey", &["key", "path"]),
    ("envoy.type.metadata.v3.MetadataKey.PathSegment", &["key"]),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.RequestIDExtension",
        &["typed_config"],
    ),
    ("envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig", &[]),
    (
        "envoy.extensions.filters.http.rbac.v3.RBAC",
        &["rules", "shadow_rules", "shadow_rules_stat_prefix"],
    ),
    (
        "envoy.extensions.filters.network.rbac.v3.RBAC",
        &[
            "rules",
            "shadow_rules",
            "shadow_rules_stat_prefix",
            "stat_prefix",
            "enforcement_type",
        ],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        &["providers", "rules", "bypass_cors_preflight"],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.JwtProvider",
        &[
            "issuer",
            "audiences",
            "local_jwks",
            "remote_jwks",
            "clock_skew_seconds",
            "from_headers",
            "from_params",
            "from_cookies",
            "forward",
            "forward_payload_header",
            "pad_forward_payload_header",
            "payload_in_metadata",
            "normalize_payload_in_metadata",
        ],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.RemoteJwks",
        &["http_uri", "cache_duration"],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.JwtProvider.NormalizePayload",
        &["space_delimited_claims"],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.JwtHeader",
        &["name", "value_prefix"],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.RequirementRule",
        &["match", "requires"],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.JwtRequirement",
        &[
            "provider_name",
            "provider_and_audiences",
            "requires_any",
            "requires_all",
            "allow_missing",
            "allow_missing_or_failed",
        ],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.ProviderWithAudiences",
        &["provider_name", "audiences"],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.JwtRequirementOrList",
        &["requirements"],
    ),
    (
        "envoy.extensions.filters.http.jwt_authn.v3.JwtRequirementAndList",
        &["requirements"],
    ),
    (
        "envoy.type.matcher.v3.MetadataMatcher",
        &["filter", "path", "value", "invert"],
    ),
    ("envoy.type.matcher.v3.MetadataMatcher.PathSegment", &["key"]),
    (
        "envoy.type.matcher.v3.ValueMatcher",
        &[
            "string_match",
            "bool_match",
            "present_match",
            "list_match",
            "or_match",
        ],
    ),
    ("envoy.type.matcher.v3.ListMatcher", &["one_of"]),
    ("envoy.type.matcher.v3.OrMatcher", &["value_matchers"]),
    ("envoy.type.matcher.v3.ListStringMatcher", &["patterns"]),
    (
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        &[
            "stat_prefix",
            "status",
            "token_bucket",
            "filter_enabled",
            "filter_enforced",
            "response_headers_to_add",
        ],
    ),
    (
        "envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit",
        &["stat_prefix", "token_bucket", "runtime_enabled"],
    ),
    (
        "envoy.type.v3.TokenBucket",
        &["max_tokens", "tokens_per_fill", "fill_interval"],
    ),
    ("envoy.type.v3.HttpStatus", &["code"]),
    ("envoy.config.core.v3.RuntimeFeatureFlag", &["default_value"]),
    ("envoy.config.rbac.v3.RBAC", &["action", "policies"]),
    ("envoy.config.rbac.v3.Policy", &["permissions", "principals"]),
    (
        "envoy.config.rbac.v3.Permission",
        &[
            "and_rules",
            "or_rules",
            "not_rule",
            "any",
            "header",
            "url_path",
            "uri_template",
            "destination_ip",
            "destination_port",
            "destination_port_range",
            "requested_server_name",
            "metadata",
        ],
    ),
    ("envoy.config.rbac.v3.Permission.Set", &["rules"]),
    (
        "envoy.config.rbac.v3.Principal",
        &[
            "and_ids",
            "or_ids",
            "not_id",
            "any",
            "authenticated",
            "source_ip",
            "direct_remote_ip",
            "remote_ip",
            "header",
            "url_path",
            "metadata",
        ],
    ),
    ("envoy.config.rbac.v3.Principal.Set", &["ids"]),
    (
        "envoy.config.rbac.v3.Principal.Authenticated",
        &["principal_name"],
    ),
    ("envoy.type.matcher.v3.PathMatcher", &["path"]),
    ("envoy.type.v3.Int32Range", &["start", "end"]),
    (
        "envoy.config.core.v3.TypedExtensionConfig",
        &["name", "typed_config"],
    ),
    (
        "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig",
        &["path_template"],
    ),
    (
        "envoy.extensions.filters.http.fault.v3.HTTPFault",
        &["delay", "abort", "headers"],
    ),
    (
        "envoy.extensions.filters.http.fault.v3.FaultAbort",
        &["http_status", "grpc_status", "percentage"],
    ),
    (
        "envoy.extensions.filters.common.fault.v3.FaultDelay",
        &["fixed_delay", "percentage"],
    ),
    ("envoy.type.v3.FractionalPercent", &["numerator", "denominator"]),
    ("envoy.extensions.filters.http.cors.v3.Cors", &[]),
    (
        "envoy.extensions.filters.http.cors.v3.CorsPolicy",
        &[
            "allow_origin_string_match",
            "allow_methods",
            "allow_headers",
            "expose_headers",
            "max_age",
            "allow_credentials",
            "filter_enabled",
            "forward_not_matching_preflights",
        ],
    ),
    (
        "envoy.config.core.v3.RuntimeFractionalPercent",
        &["default_value"],
    ),
    ("envoy.extensions.filters.http.grpc_stats.v3.FilterConfig", &[]),
    (
        "envoy.extensions.filters.http.set_filter_state.v3.Config",
        &["on_request_headers"],
    ),
    (
        "envoy.config.route.v3.RetryPolicy",
        &[
            "retry_on",
            "num_retries",
            "per_try_timeout",
            "retry_host_predicate",
            "host_selection_retry_max_attempts",
            "retriable_status_codes",
            "retry_back_off",
            "retry_priority",
        ],
    ),
    (
        "envoy.config.route.v3.RetryPolicy.RetryPriority",
        &["name", "typed_config"],
    ),
    (
        "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
        &["update_frequency"],
    ),
    (
        "envoy.config.route.v3.RetryPolicy.RetryBackOff",
        &["base_interval", "max_interval"],
    ),
    (
        "envoy.config.route.v3.RetryPolicy.RetryHostPredicate",
        &["name", "typed_config"],
    ),
    (
        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
        &[],
    ),
    (
        "envoy.config.route.v3.RouteAction.MaxStreamDuration",
        &["max_stream_duration", "grpc_timeout_header_max"],
    ),
    (
        "envoy.type.matcher.v3.RegexMatchAndSubstitute",
        &["pattern", "substitution"],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.Rds",
        &["config_source", "route_config_name"],
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
        &["name", "typed_config"],
    ),
    (
        "envoy.extensions.filters.http.router.v3.Router",
        &["suppress_envoy_headers"],
    ),
    (
        "envoy.config.core.v3.HttpProtocolOptions",
        &[
            "idle_timeout",
            "max_headers_count",
            "max_requests_per_connection",
            "max_stream_duration",
            "headers_with_underscores_action",
        ],
    ),
    (
        "envoy.config.core.v3.Http1ProtocolOptions",
        &["accept_http_10", "default_host_for_http_10"],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        &[
            "common_http_protocol_options",
            "explicit_http_config",
            "use_downstream_protocol_config",
            "auto_config",
        ],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig",
        &["http_protocol_options", "http2_protocol_options"],
    ),
    (
        "envoy.config.route.v3.RouteConfiguration",
        &[
            "name",
            "virtual_hosts",
            "request_headers_to_add",
            "request_headers_to_remove",
            "response_headers_to_add",
            "response_headers_to_remove",
            "validate_clusters",
            "ignore_port_in_host_matching",
            "max_direct_response_body_size_bytes",
            "typed_per_filter_config",
        ],
    ),
    (
        "envoy.config.route.v3.VirtualHost",
        &[
            "name",
            "domains",
            "routes",
            "typed_per_filter_config",
            "retry_policy",
            "include_request_attempt_count",
            "include_attempt_count_in_response",
            "request_headers_to_add",
            "request_headers_to_remove",
            "response_headers_to_add",
            "response_headers_to_remove",
        ],
    ),
    (
        "envoy.config.route.v3.Route",
        &[
            "name",
            "match",
            "route",
            "redirect",
            "direct_response",
            "typed_per_filter_config",
            "request_headers_to_add",
            "request_headers_to_remove",
            "response_headers_to_add",
            "response_headers_to_remove",
        ],
    ),
    (
        "envoy.config.route.v3.RouteMatch",
        &[
            "prefix",
            "path",
            "safe_regex",
            "path_separated_prefix",
            "case_sensitive",
            "headers",
            "query_parameters",
            "grpc",
            "connect_matcher",
        ],
    ),
    ("envoy.config.route.v3.RouteMatch.GrpcRouteMatchOptions", &[]),
    ("envoy.type.matcher.v3.RegexMatcher", &["regex"]),
    (
        "envoy.config.route.v3.HeaderMatcher",
        &[
            "name",
            "exact_match",
            "safe_regex_match",
            "range_match",
            "present_match",
            "prefix_match",
            "suffix_match",
            "contains_match",
            "string_match",
            "invert_match",
            "treat_missing_header_as_empty",
        ],
    ),
    (
        "envoy.config.route.v3.QueryParameterMatcher",
        &["name", "string_match", "present_match"],
    ),
    ("envoy.type.v3.Int64Range", &["start", "end"]),
    (
        "envoy.type.matcher.v3.StringMatcher",
        &[
            "exact",
            "prefix",
            "suffix",
            "contains",
            "safe_regex",
            "ignore_case",
        ],
    ),
    (
        "envoy.config.route.v3.RouteAction",
        &[
            "cluster",
            "cluster_header",
            "weighted_clusters",
            "cluster_not_found_response_code",
            "prefix_rewrite",
            "host_rewrite_literal",
            "timeout",
            "idle_timeout",
            "regex_rewrite",
            "retry_policy",
            "max_stream_duration",
            "max_grpc_timeout",
            "hash_policy",
            "metadata_match",
            "upgrade_configs",
            "request_mirror_policies",
        ],
    ),
    (
        "envoy.config.route.v3.RouteAction.HashPolicy",
        &[
            "header",
            "cookie",
            "connection_properties",
            "query_parameter",
            "terminal",
        ],
    ),
    (
        "envoy.config.route.v3.RouteAction.HashPolicy.Header",
        &["header_name", "regex_rewrite"],
    ),
    (
        "envoy.config.route.v3.RouteAction.HashPolicy.Cookie",
        &["name", "ttl", "path", "attributes"],
    ),
    (
        "envoy.config.route.v3.RouteAction.HashPolicy.CookieAttribute",
        &["name", "value"],
    ),
    (
        "envoy.config.route.v3.RouteAction.HashPolicy.ConnectionProperties",
        &["source_ip"],
    ),
    (
        "envoy.config.route.v3.RouteAction.HashPolicy.QueryParameter",
        &["name"],
    ),
    (
        "envoy.config.route.v3.RouteAction.RequestMirrorPolicy",
        &["cluster", "runtime_fraction", "disable_shadow_host_suffix_append"],
    ),
    ("envoy.config.route.v3.WeightedCluster", &["clusters"]),
    (
        "envoy.config.route.v3.WeightedCluster.ClusterWeight",
        &[
            "name",
            "weight",
            "metadata_match",
            "request_headers_to_add",
            "request_headers_to_remove",
            "response_headers_to_add",
            "response_headers_to_remove",
        ],
    ),
    (
        "envoy.config.route.v3.RedirectAction",
        &[
            "https_redirect",
            "scheme_redirect",
            "host_redirect",
            "port_redirect",
            "path_redirect",
            "prefix_rewrite",
            "response_code",
            "strip_query",
        ],
    ),
    ("envoy.config.route.v3.DirectResponseAction", &["status", "body"]),
    (
        "envoy.config.core.v3.DataSource",
        &["filename", "inline_bytes", "inline_string"],
    ),
    (
        "envoy.config.core.v3.HeaderValueOption",
        &["header", "append", "append_action", "keep_empty_value"],
    ),
    ("envoy.config.core.v3.HeaderValue", &["key", "value"]),
    (
        "envoy.config.cluster.v3.Cluster",
        &[
            "metadata",
            "name",
            "alt_stat_name",
            "type",
            "eds_cluster_config",
            "connect_timeout",
            "lb_policy",
            "load_assignment",
            "circuit_breakers",
            "common_http_protocol_options",
            "http_protocol_options",
            "http2_protocol_options",
            "max_requests_per_connection",
            "typed_extension_protocol_options",
            "transport_socket",
            "transport_socket_matches",
            "common_lb_config",
            "outlier_detection",
            "health_checks",
            "round_robin_lb_config",
            "least_request_lb_config",
            "ring_hash_lb_config",
            "maglev_lb_config",
            "lb_subset_config",
            "original_dst_lb_config",
            "dns_lookup_family",
            "dns_refresh_rate",
            "dns_failure_refresh_rate",
            "dns_jitter",
            "respect_dns_ttl",
            "typed_dns_resolver_config",
        ],
    ),
    ("envoy.config.cluster.v3.Cluster.RefreshRate", &["base_interval"]),
    (
        "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
        &["resolvers"],
    ),
    (
        "envoy.config.cluster.v3.OutlierDetection",
        &[
            "consecutive_5xx",
            "interval",
            "base_ejection_time",
            "max_ejection_percent",
            "enforcing_consecutive_5xx",
            "enforcing_success_rate",
            "success_rate_minimum_hosts",
            "success_rate_request_volume",
            "success_rate_stdev_factor",
            "consecutive_gateway_failure",
            "enforcing_consecutive_gateway_failure",
            "split_external_local_origin_errors",
            "consecutive_local_origin_failure",
            "enforcing_consecutive_local_origin_failure",
            "enforcing_local_origin_success_rate",
            "failure_percentage_threshold",
            "enforcing_failure_percentage",
            "enforcing_failure_percentage_local_origin",
            "failure_percentage_minimum_hosts",
            "failure_percentage_request_volume",
            "max_ejection_time",
            "max_ejection_time_jitter",
            "always_eject_one_host",
            "successful_active_health_check_uneject_host",
        ],
    ),
    (
        "envoy.config.core.v3.HealthCheck",
        &[
            "timeout",
            "interval",
            "initial_jitter",
            "interval_jitter",
            "interval_jitter_percent",
            "unhealthy_threshold",
            "healthy_threshold",
            "alt_port",
            "http_health_check",
            "tcp_health_check",
            "grpc_health_check",
            "no_traffic_interval",
            "no_traffic_healthy_interval",
            "unhealthy_interval",
            "unhealthy_edge_interval",
            "healthy_edge_interval",
        ],
    ),
    (
        "envoy.config.core.v3.HealthCheck.HttpHealthCheck",
        &[
            "host",
            "path",
            "expected_statuses",
            "retriable_statuses",
            "codec_client_type",
            "method",
        ],
    ),
    (
        "envoy.config.core.v3.HealthCheck.TcpHealthCheck",
        &["send", "receive"],
    ),
    (
        "envoy.config.core.v3.HealthCheck.GrpcHealthCheck",
        &["service_name", "authority"],
    ),
    ("envoy.config.core.v3.HealthCheck.Payload", &["text", "binary"]),
    (
        "envoy.config.endpoint.v3.Endpoint.HealthCheckConfig",
        &["port_value"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.RoundRobinLbConfig",
        &["slow_start_config"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.LeastRequestLbConfig",
        &["slow_start_config"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.SlowStartConfig",
        &["slow_start_window", "aggression", "min_weight_percent"],
    ),
    ("envoy.config.core.v3.RuntimeDouble", &["default_value"]),
    (
        "envoy.config.cluster.v3.Cluster.RingHashLbConfig",
        &["minimum_ring_size", "maximum_ring_size", "hash_function"],
    ),
    ("envoy.config.cluster.v3.Cluster.MaglevLbConfig", &["table_size"]),
    (
        "envoy.config.cluster.v3.Cluster.LbSubsetConfig",
        &["fallback_policy", "default_subset", "subset_selectors"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.LbSubsetConfig.LbSubsetSelector",
        &["keys", "fallback_policy", "fallback_keys_subset"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.EdsClusterConfig",
        &["eds_config", "service_name"],
    ),
    ("envoy.config.cluster.v3.CircuitBreakers", &["thresholds"]),
    (
        "envoy.config.cluster.v3.CircuitBreakers.Thresholds",
        &[
            "priority",
            "max_connections",
            "max_pending_requests",
            "max_requests",
            "max_retries",
            "retry_budget",
        ],
    ),
    (
        "envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget",
        &["budget_percent", "min_retry_concurrency"],
    ),
    (
        "envoy.config.endpoint.v3.ClusterLoadAssignment",
        &["cluster_name", "endpoints", "policy"],
    ),
    (
        "envoy.config.endpoint.v3.ClusterLoadAssignment.Policy",
        &["overprovisioning_factor", "weighted_priority_health"],
    ),
    (
        "envoy.config.endpoint.v3.LocalityLbEndpoints",
        &["lb_endpoints", "priority", "locality", "load_balancing_weight"],
    ),
    ("envoy.config.core.v3.Locality", &["region", "zone", "sub_zone"]),
    (
        "envoy.config.endpoint.v3.LbEndpoint",
        &["endpoint", "health_status", "load_balancing_weight", "metadata"],
    ),
    (
        "envoy.config.endpoint.v3.Endpoint",
        &["address", "hostname", "health_check_config"],
    ),
    (
        "envoy.config.accesslog.v3.AccessLog",
        &["name", "filter", "typed_config"],
    ),
    (
        "envoy.config.accesslog.v3.AccessLogFilter",
        &[
            "status_code_filter",
            "duration_filter",
            "not_health_check_filter",
            "runtime_filter",
            "and_filter",
            "or_filter",
            "header_filter",
            "response_flag_filter",
            "grpc_status_filter",
        ],
    ),
    ("envoy.config.accesslog.v3.StatusCodeFilter", &["comparison"]),
    ("envoy.config.accesslog.v3.DurationFilter", &["comparison"]),
    ("envoy.config.accesslog.v3.ComparisonFilter", &["op", "value"]),
    ("envoy.config.core.v3.RuntimeUInt32", &["default_value"]),
    ("envoy.config.accesslog.v3.NotHealthCheckFilter", &[]),
    ("envoy.config.accesslog.v3.RuntimeFilter", &["percent_sampled"]),
    ("envoy.config.accesslog.v3.AndFilter", &["filters"]),
    ("envoy.config.accesslog.v3.OrFilter", &["filters"]),
    ("envoy.config.accesslog.v3.HeaderFilter", &["header"]),
    ("envoy.config.accesslog.v3.ResponseFlagFilter", &["flags"]),
    (
        "envoy.config.accesslog.v3.GrpcStatusFilter",
        &["statuses", "exclude"],
    ),
    (
        "envoy.extensions.access_loggers.file.v3.FileAccessLog",
        &["path", "format", "json_format", "typed_json_format", "log_format"],
    ),
    (
        "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
        &["log_format"],
    ),
    (
        "envoy.extensions.access_loggers.stream.v3.StderrAccessLog",
        &["log_format"],
    ),
    (
        "envoy.config.core.v3.SubstitutionFormatString",
        &[
            "text_format",
            "text_format_source",
            "json_format",
            "omit_empty_values",
        ],
    ),
    (
        "envoy.config.listener.v3.ListenerFilterChainMatchPredicate",
        &["or_match", "any_match", "destination_port_range"],
    ),
    (
        "envoy.config.listener.v3.ListenerFilterChainMatchPredicate.MatchSet",
        &["rules"],
    ),
    (
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        &[],
    ),
    (
        "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector",
        &[],
    ),
    (
        "envoy.extensions.filters.network.set_filter_state.v3.Config",
        &["on_new_connection"],
    ),
    (
        "envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue",
        &[
            "object_key",
            "factory_key",
            "format_string",
            "shared_with_upstream",
        ],
    ),
    (
        "xds.type.matcher.v3.Matcher",
        &["matcher_list", "matcher_tree", "on_no_match"],
    ),
    ("xds.type.matcher.v3.Matcher.OnMatch", &["matcher", "action"]),
    ("xds.type.matcher.v3.Matcher.MatcherList", &["matchers"]),
    (
        "xds.type.matcher.v3.Matcher.MatcherList.FieldMatcher",
        &["predicate", "on_match"],
    ),
    (
        "xds.type.matcher.v3.Matcher.MatcherList.Predicate",
        &["single_predicate", "or_matcher", "and_matcher", "not_matcher"],
    ),
    (
        "xds.type.matcher.v3.Matcher.MatcherList.Predicate.SinglePredicate",
        &["input", "value_match"],
    ),
    (
        "xds.type.matcher.v3.Matcher.MatcherList.Predicate.PredicateList",
        &["predicate"],
    ),
    (
        "xds.type.matcher.v3.Matcher.MatcherTree",
        &["input", "exact_match_map", "prefix_match_map", "custom_match"],
    ),
    ("xds.type.matcher.v3.Matcher.MatcherTree.MatchMap", &["map"]),
    (
        "xds.type.matcher.v3.StringMatcher",
        &[
            "exact",
            "prefix",
            "suffix",
            "contains",
            "safe_regex",
            "ignore_case",
        ],
    ),
    ("xds.type.matcher.v3.RegexMatcher", &["regex"]),
    ("xds.type.matcher.v3.IPMatcher", &["range_matchers"]),
    (
        "xds.type.matcher.v3.IPMatcher.IPRangeMatcher",
        &["ranges", "on_match", "exclusive"],
    ),
    ("xds.core.v3.TypedExtensionConfig", &["name", "typed_config"]),
    ("xds.core.v3.CidrRange", &["address_prefix", "prefix_len"]),
    (
        "envoy.extensions.matching.common_inputs.network.v3.DestinationPortInput",
        &[],
    ),
    (
        "envoy.extensions.matching.common_inputs.network.v3.SourcePortInput",
        &[],
    ),
    (
        "envoy.extensions.matching.common_inputs.network.v3.DestinationIPInput",
        &[],
    ),
    (
        "envoy.extensions.matching.common_inputs.network.v3.SourceIPInput",
        &[],
    ),
    (
        "envoy.extensions.matching.common_inputs.network.v3.DirectSourceIPInput",
        &[],
    ),
    (
        "envoy.extensions.matching.common_inputs.network.v3.ServerNameInput",
        &[],
    ),
    (
        "envoy.extensions.matching.common_inputs.network.v3.TransportProtocolInput",
        &[],
    ),
    (
        "envoy.extensions.matching.common_inputs.network.v3.ApplicationProtocolInput",
        &[],
    ),
    ("envoy.config.core.v3.TransportSocket", &["name", "typed_config"]),
    (
        "envoy.config.cluster.v3.Cluster.TransportSocketMatch",
        &["name", "match", "transport_socket"],
    ),
    ("envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer", &[]),
    (
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        &[
            "common_tls_context",
            "require_client_certificate",
            "require_sni",
            "full_scan_certs_on_sni_mismatch",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        &[
            "common_tls_context",
            "sni",
            "auto_host_sni",
            "auto_sni_san_validation",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext",
        &[
            "tls_params",
            "tls_certificates",
            "tls_certificate_sds_secret_configs",
            "custom_tls_certificate_selector",
            "validation_context",
            "validation_context_sds_secret_config",
            "combined_validation_context",
            "alpn_protocols",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext.CombinedCertificateValidationContext",
        &[
            "default_validation_context",
            "validation_context_sds_secret_config",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsParameters",
        &[
            "tls_minimum_protocol_version",
            "tls_maximum_protocol_version",
            "cipher_suites",
            "ecdh_curves",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext",
        &[
            "trusted_ca",
            "match_typed_subject_alt_names",
            "match_subject_alt_names",
            "trust_chain_verification",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher",
        &["san_type", "matcher"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
        &["certificate_chain", "private_key"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig",
        &["name", "sds_config"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.Secret",
        &["name", "tls_certificate", "validation_context"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.cert_selectors.on_demand_secret.v3.Config",
        &["config_source", "certificate_mapper"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.cert_mappers.filter_state_override.v3.Config",
        &["default_value"],
    ),
    (
        "envoy.config.core.v3.ApiConfigSource",
        &["api_type", "transport_api_version", "grpc_services"],
    ),
    (
        "envoy.config.core.v3.GrpcService",
        &["envoy_grpc", "timeout", "initial_metadata"],
    ),
    (
        "envoy.config.core.v3.GrpcService.EnvoyGrpc",
        &["cluster_name", "authority"],
    ),
    ("envoy.config.core.v3.HttpUri", &["uri", "cluster", "timeout"]),
    (
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
        &[
            "grpc_service",
            "http_service",
            "transport_api_version",
            "failure_mode_allow",
            "failure_mode_allow_header_add",
            "with_request_body",
            "clear_route_cache",
            "status_on_error",
            "filter_enabled",
            "filter_enabled_metadata",
            "deny_at_disable",
            "include_peer_certificate",
            "stat_prefix",
            "allowed_headers",
            "disallowed_headers",
            "include_tls_session",
            "encode_raw_headers",
        ],
    ),
    (
        "envoy.extensions.filters.http.ext_authz.v3.BufferSettings",
        &["max_request_bytes", "allow_partial_message", "pack_as_bytes"],
    ),
    (
        "envoy.extensions.filters.http.ext_authz.v3.HttpService",
        &[
            "server_uri",
            "path_prefix",
            "path_override",
            "authorization_request",
            "authorization_response",
        ],
    ),
    (
        "envoy.extensions.filters.http.ext_authz.v3.AuthorizationRequest",
        &["allowed_headers", "headers_to_add"],
    ),
    (
        "envoy.extensions.filters.http.ext_authz.v3.AuthorizationResponse",
        &[
            "allowed_upstream_headers",
            "allowed_upstream_headers_to_append",
            "allowed_client_headers",
            "allowed_client_headers_on_success",
        ],
    ),
    (
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
        &["disabled", "check_settings"],
    ),
    (
        "envoy.extensions.filters.http.ext_authz.v3.CheckSettings",
        &[
            "context_extensions",
            "disable_request_body_buffering",
            "with_request_body",
        ],
    ),
    ("envoy.config.core.v3.AggregatedConfigSource", &[]),
    (
        "envoy.config.core.v3.Metadata",
        &["filter_metadata", "typed_filter_metadata"],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.UseDownstreamHttpConfig",
        &["http_protocol_options", "http2_protocol_options"],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.AutoHttpConfig",
        &["http_protocol_options", "http2_protocol_options"],
    ),
    (
        "envoy.config.core.v3.Http2ProtocolOptions",
        &[
            "max_concurrent_streams",
            "initial_stream_window_size",
            "initial_connection_window_size",
            "connection_keepalive",
            "allow_connect",
        ],
    ),
    (
        "envoy.config.core.v3.KeepaliveSettings",
        &["interval", "timeout", "interval_jitter"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.CommonLbConfig",
        &["healthy_panic_threshold", "locality_weighted_lb_config"],
    ),
    (
        "envoy.config.cluster.v3.Cluster.CommonLbConfig.LocalityWeightedLbConfig",
        &[],
    ),
    ("envoy.type.v3.Percent", &["value"]),
];

/// Fields that are accepted and change nothing here: message, field, why that is safe.
pub const NO_EFFECT: &[(&str, &str, &str)] = &[
    (
        "envoy.config.bootstrap.v3.Bootstrap",
        "stats_flush_interval",
        "there is no stats sink to flush to",
    ),
    (
        "envoy.config.bootstrap.v3.Admin",
        "profile_path",
        "there is no profiler; deprecated",
    ),
    (
        "envoy.config.core.v3.Node",
        "metadata",
        "read by management servers only",
    ),
    (
        "envoy.config.core.v3.Node",
        "locality",
        "read by management servers and zone-aware balancing only",
    ),
    (
        "envoy.config.core.v3.Node",
        "user_agent_name",
        "read by management servers only",
    ),
    (
        "envoy.config.core.v3.Node",
        "user_agent_version",
        "read by management servers only",
    ),
    (
        "envoy.config.core.v3.ConfigSource",
        "initial_fetch_timeout",
        "files are read at once",
    ),
    (
        "envoy.config.listener.v3.Listener",
        "per_connection_buffer_limit_bytes",
        "buffers here are fixed and smaller",
    ),
    (
        "envoy.config.listener.v3.Listener",
        "metadata",
        "no filter reads it",
    ),
    (
        "envoy.config.listener.v3.FilterChain",
        "metadata",
        "no filter reads it",
    ),
    (
        "envoy.config.route.v3.VirtualHost",
        "metadata",
        "no filter reads it",
    ),
    ("envoy.config.route.v3.Route", "metadata", "no filter reads it"),
    (
        "envoy.config.route.v3.Route",
        "decorator",
        "names a trace span; spans are named ingress and egress HOST",
    ),
    (
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
        "emit_filter_state",
        "accepted, counts nothing: no statistics by gRPC method are kept",
    ),
    (
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
        "stats_for_all_methods",
        "accepted, counts nothing: no statistics by gRPC method are kept",
    ),
    (
        "envoy.config.core.v3.RuntimeDouble",
        "runtime_key",
        "there is no runtime to override the default",
    ),
    (
        "envoy.config.core.v3.RuntimeUInt32",
        "runtime_key",
        "there is no runtime to override the default",
    ),
    (
        "envoy.config.route.v3.RouteAction.RequestMirrorPolicy",
        "trace_sampled",
        "nothing is traced: a provider is refused",
    ),
    (
        "envoy.config.core.v3.RuntimeFeatureFlag",
        "runtime_key",
        "there is no runtime to override the default",
    ),
    (
        "envoy.config.accesslog.v3.RuntimeFilter",
        "runtime_key",
        "there is no runtime to override the default",
    ),
    (
        "envoy.config.accesslog.v3.RuntimeFilter",
        "use_independent_randomness",
        "it is independent in any case",
    ),
    (
        "envoy.config.core.v3.RuntimeFractionalPercent",
        "runtime_key",
        "there is no runtime to override the default",
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "proxy_100_continue",
        "the proxy itself says 100 Continue, then sends the body",
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing",
        "client_sampling",
        "`x-client-trace-id` asks for nothing here",
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.Tracing",
        "verbose",
        "a span has no events here",
    ),
    (
        "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
        "use_request_id_for_trace_sampling",
        "lots are drawn; the id is told the outcome",
    ),
    (
        "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig",
        "pack_trace_reason",
        "an id that is made here is told the outcome, where something is traced; others stay",
    ),
    (
        "envoy.config.cluster.v3.Cluster",
        "per_connection_buffer_limit_bytes",
        "buffers here are fixed and smaller",
    ),
    (
        "envoy.config.cluster.v3.Cluster.RefreshRate",
        "max_interval",
        "names that were not answered are asked again at the same pace",
    ),
    (
        "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
        "udp_max_queries",
        "the system's resolver has no channel of its own to bound",
    ),
    (
        "envoy.config.cluster.v3.Cluster",
        "wait_for_warm_on_init",
        "a start waits for the first answers, at most five seconds",
    ),
    (
        "envoy.service.discovery.v3.DiscoveryResponse",
        "nonce",
        "no acknowledgement goes out for a file",
    ),
    (
        "envoy.config.cluster.v3.Cluster",
        "cleanup_interval",
        "unused original destinations are dropped when their last connection is",
    ),
    (
        "envoy.config.core.v3.HealthCheck",
        "reuse_connection",
        "each check makes a connection of its own",
    ),
    (
        "envoy.config.core.v3.ApiConfigSource",
        "set_node_on_first_message_only",
        "the node goes with the first message only",
    ),
];

/// Refuses every set field of `message` (and of all it contains) that is in neither list.
///
/// # Errors
/// The first such field, by its full path.
pub fn check(message: &DynamicMessage, path: &str) -> Result<(), ConfigError> {
    let mut at = path.to_owned();
    walk(message, &mut at)
}

fn walk(message: &DynamicMessage, path: &mut String) -> Result<(), ConfigError> {
    let descriptor = message.descriptor();
    let full_name = descriptor.full_name();
    if full_name == "google.protobuf.Any" {
        return walk(&unpack_any(message, path)?, path);
    }
    if full_name.starts_with("google.protobuf.") {
        return Ok(());
    }
    if let Some(unknown) = message.unknown_fields().next() {
        let number = unknown.number();
        return Err(ConfigError::new(
            path.as_str(),
            format!("unknown field number {number} of {full_name}"),
        ));
    }
    let fields = IMPLEMENTED
        .iter()
        .find(|(name, _)| *name == full_name)
        .map(|(_, fields)| *fields);
    let Some(fields) = fields else {
        return Err(ConfigError::new(
            path.as_str(),
            format!("{} is not supported yet", title(full_name)),
        ));
    };
    for (field, value) in message.fields() {
        let mark = path.len();
        push_field(path, field.name());
        if fields.contains(&field.name()) {
            walk_value(value, path)?;
        } else if !NO_EFFECT
            .iter()
            .any(|(m, f, _)| *m == full_name && *f == field.name())
        {
            let what = match field.name() {
                "transport_socket" | "transport_socket_matches" => "TLS is not supported yet".to_owned(),
                name => format!("{name} of {full_name} is not supported yet"),
            };
            return Err(ConfigError::new(path.as_str(), what));
        }
        path.truncate(mark);
    }
    Ok(())
}

fn walk_value(value: &Value, path: &mut String) -> Result<(), ConfigError> {
    let mark = path.len();
    match value {
        Value::Message(message) => walk(message, path)?,
        Value::List(items) => {
            for (index, item) in items.iter().enumerate() {
                path.push_str(&format!("[{index}]"));
                walk_value(item, path)?;
                path.truncate(mark);
            }
        }
        Value::Map(items) => {
            for (key, item) in items {
                path.push_str(&format!("[{}]", key.as_str().unwrap_or("?")));
                walk_value(item, path)?;
                path.truncate(mark);
            }
        }
        _ => {}
    }
    Ok(())
}

/// `envoy.config.core.v3.Pipe` reads better as it is; extensions are named by their full type.
fn title(full_name: &str) -> String {
    format!("type {full_name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::schema;

    #[test]
    fn no_message_is_listed_twice() {
        for (index, (name, _)) in IMPLEMENTED.iter().enumerate() {
            assert!(
                !IMPLEMENTED[..index].iter().any(|(n, _)| n == name),
                "{name} is listed twice"
            );
        }
    }

    #[test]
    fn every_listed_field_exists() {
        for (name, fields) in IMPLEMENTED {
            let message = schema::message(name).unwrap_or_else(|| panic!("no message {name}"));
            for field in *fields {
                assert!(
                    message.get_field_by_name(field).is_some(),
                    "no field {field} in {name}"
                );
            }
        }
        for (name, field, reason) in NO_EFFECT {
            assert!(
                IMPLEMENTED.iter().any(|(m, _)| m == name),
                "{name} is refused as a whole"
            );
            assert!(
                schema::message(name).unwrap().get_field_by_name(field).is_some(),
                "no field {field} in {name}"
            );
            assert!(!reason.is_empty());
        }
    }
}
