//! Retries, faults, CORS and what else filters are told by routes, into [`crate::route`]'s forms.

use std::sync::Arc;
use std::time::Duration;

use super::ConfigError;
use super::schema::At;
use super::translate_route::{header_match, string_match};
use super::{ext_authz, ratelimit};
use crate::ext_authz::PerRoute;
use crate::ratelimit::LocalRate;
use crate::route::cors::Cors;
use crate::route::fault::{Fault, Percentage};
use crate::route::is_value;
use crate::route::retry::{RetryOn, RetryPolicy};
use crate::stats::Registry;

type Result<T> = std::result::Result<T, ConfigError>;

/// What a route, or the virtual host or table around it, says to filters.
#[derive(Debug, Default, Clone)]
pub(super) struct PerFilter {
    pub(super) fault: Option<Arc<Fault>>,
    pub(super) cors: Option<Arc<Cors>>,
    pub(super) local_rate: Option<Arc<LocalRate>>,
    pub(super) ext_authz: Option<Arc<PerRoute>>,
}

/// Reads `typed_per_filter_config`; what it does not say is `outer`'s.
pub(super) fn per_filter(at: &At, outer: &PerFilter, registry: &Registry) -> Result<PerFilter> {
    let mut all = outer.clone();
    for (name, config) in at.any_map("typed_per_filter_config")? {
        match (name.as_str(), config.type_name().as_str()) {
            ("envoy.filters.http.fault", "envoy.extensions.filters.http.fault.v3.HTTPFault") => {
                all.fault = Some(Arc::new(fault(&config)?));
            }
            ("envoy.filters.http.cors", "envoy.extensions.filters.http.cors.v3.CorsPolicy") => {
                all.cors = Some(Arc::new(cors(&config)?));
            }
            (
                "envoy.filters.http.local_ratelimit",
                "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
            ) => {
                all.local_rate = Some(ratelimit::http(&config, registry)?);
            }
            (
                "envoy.filters.http.ext_authz",
                "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
            ) => {
                let per_route = ext_authz::per_route(&config, all.ext_authz.as_deref())?;
                all.ext_authz = Some(Arc::new(per_route));
            }
            (name, kind) => {
                return Err(config.refuse("", format!("{kind} for filter {name:?} is not supported yet")));
            }
        }
    }
    Ok(all)
}

/// `envoy.config.route.v3.RetryPolicy`; `None` where it retries nothing.
pub(super) fn retry(at: &At) -> Result<Option<Arc<RetryPolicy>>> {
    let list = at.text("retry_on");
    let on = RetryOn::parse(&list)
        .map_err(|word| at.refuse("retry_on", format!("{word:?} is not a condition this proxy has")))?;
    let retries = at.number_or("num_retries", 1);
    let (base_interval, max_interval) = back_off(at)?;
    let mut reselections = 0;
    for predicate in at.messages("retry_host_predicate") {
        match predicate.any("typed_config")?.map(|c| c.type_name()).as_deref() {
            Some("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate") => {
                let most = at.signed("host_selection_retry_max_attempts").max(1);
                reselections = u32::try_from(most).unwrap_or(u32::MAX);
            }
            _ => return Err(predicate.refuse("", "only previous_hosts is supported yet")),
        }
    }
    let policy = RetryPolicy {
        priorities_after: priorities_after(at)?,
        on,
        retries,
        per_try_timeout: at.duration("per_try_timeout")?.filter(|d| !d.is_zero()),
        status_codes: at
            .numbers("retriable_status_codes")
            .into_iter()
            .filter_map(|c| u16::try_from(c).ok())
            .collect(),
        base_interval,
        max_interval,
        reselections,
    };
    let nothing = retries == 0 && policy.per_try_timeout.is_none();
    Ok((!nothing).then(|| Arc::new(policy)))
}

/// `previous_priorities`.
fn priorities_after(at: &At) -> Result<u32> {
    let Some(priority) = at.message("retry_priority") else {
        return Ok(0);
    };
    match priority.any("typed_config")? {
        Some(config) if config.type_name() == PREVIOUS_PRIORITIES => {
            match config.number_or("update_frequency", 0) {
                0 => Err(config.refuse("update_frequency", "must be greater than 0")),
                frequency => Ok(frequency),
            }
        }
        _ => Err(priority.refuse("", "only previous_priorities is supported yet")),
    }
}

const PREVIOUS_PRIORITIES: &str =
    "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig";

fn back_off(at: &At) -> Result<(Duration, Duration)> {
    let Some(back_off) = at.message("retry_back_off") else {
        return Ok((Duration::from_millis(25), Duration::from_millis(250)));
    };
    // Envoy counts in whole milliseconds and never in less than one.
    let least = Duration::from_millis(1);
    let Some(base) = back_off.duration("base_interval")?.filter(|d| !d.is_zero()) else {
        return Err(back_off.refuse("base_interval", "must be greater than 0s"));
    };
    let base = base.max(least);
    let most = back_off.duration("max_interval")?.unwrap_or(base * 10);
    if most < base {
        return Err(back_off.refuse("max_interval", "must be at least base_interval"));
    }
    Ok((base, most))
}

/// `envoy.extensions.filters.http.fault.v3.HTTPFault`.
pub(super) fn fault(at: &At) -> Result<Fault> {
    let mut fault = Fault {
        headers: at
            .messages("headers")
            .iter()
            .map(header_match)
            .collect::<Result<_>>()?,
        ..Fault::default()
    };
    if let Some(delay) = at.message("delay") {
        let Some(pause) = delay.duration("fixed_delay")? else {
            return Err(delay.refuse("fixed_delay", "must be given"));
        };
        fault.delay = Some((percentage(&delay, "percentage")?, pause));
    }
    if let Some(abort) = at.message("abort") {
        let status = if abort.has("grpc_status") {
            fault.grpc_status = Some(abort.number_or("grpc_status", 0));
            // What Envoy answers to a request that is not gRPC.
            200
        } else {
            let status = abort.number_or("http_status", 0);
            u16::try_from(status)
                .ok()
                .filter(|s| (200..600).contains(s))
                .ok_or_else(|| abort.refuse("http_status", "must be between 200 and 599"))?
        };
        fault.abort = Some((percentage(&abort, "percentage")?, status));
    }
    Ok(fault)
}

/// `FractionalPercent`; unset is 0 of 100.
pub(super) fn percentage(at: &At, field: &str) -> Result<Percentage> {
    let Some(percent) = at.message(field) else {
        return Ok(Percentage {
            numerator: 0,
            denominator: 100,
        });
    };
    let denominator = match percent.choice("denominator").as_str() {
        "TEN_THOUSAND" => 10_000,
        "MILLION" => 1_000_000,
        _ => 100,
    };
    Ok(Percentage {
        numerator: u64::from(percent.number_or("numerator", 0)),
        denominator,
    })
}

/// `envoy.extensions.filters.http.cors.v3.CorsPolicy`.
fn cors(at: &At) -> Result<Cors> {
    let value = |field: &str| -> Result<Vec<u8>> {
        let value = at.text(field).into_bytes();
        if is_value(&value) {
            Ok(value)
        } else {
            Err(at.refuse(field, "is not a valid header value"))
        }
    };
    let enabled = match at.message("filter_enabled") {
        Some(enabled) => percentage(&enabled, "default_value")?,
        None => Percentage::ALL,
    };
    Ok(Cors {
        enabled,
        origins: at
            .messages("allow_origin_string_match")
            .iter()
            .map(string_match)
            .collect::<Result<_>>()?,
        methods: value("allow_methods")?,
        headers: value("allow_headers")?,
        expose: value("expose_headers")?,
        max_age: value("max_age")?,
        credentials: at.flag("allow_credentials").unwrap_or(false),
        forward_unmatched: at.flag("forward_not_matching_preflights").unwrap_or(true),
    })
}
