//! Local rate limits into [`crate::ratelimit`]'s forms.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ConfigError;
use super::route_policy::percentage;
use super::schema::At;
use super::translate_route::add_header;
use crate::ratelimit::{Bucket, ConnectionRate, LocalRate};
use crate::route::fault::Percentage;
use crate::stats::{self, Registry};

type Result<T> = std::result::Result<T, ConfigError>;

/// The shortest interval in which tokens may come, as in Envoy.
const SHORTEST_FILL: Duration = Duration::from_millis(50);

/// `envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit`.
pub(super) fn http(at: &At, registry: &Registry) -> Result<Arc<LocalRate>> {
    let prefix = at.required_text("stat_prefix")?;
    let share = |field: &str| match at.message(field) {
        Some(fraction) => percentage(&fraction, "default_value"),
        None => Ok(Percentage::NONE),
    };
    let status = at.message("status").and_then(|s| {
        let code = s.message.get_field_by_name("code")?;
        code.as_enum_number()
    });
    let mut response = Vec::new();
    for header in at.messages("response_headers_to_add") {
        let header_value = add_header(&header)?;
        if header_value.template.is_some() {
            return Err(header.refuse("header", "operators are not supported here yet"));
        }
        response.push(header_value);
    }
    Ok(Arc::new(LocalRate {
        bucket: at.message("token_bucket").map(|b| bucket(&b)).transpose()?,
        enabled: share("filter_enabled")?,
        enforced: share("filter_enforced")?,
        // As in Envoy, what is no error is not said.
        status: status
            .and_then(|s| u16::try_from(s).ok())
            .filter(|s| (400..600).contains(s))
            .unwrap_or(429),
        response,
        stats: registry.scope(
            &format!("{prefix}.http_local_rate_limit"),
            stats::LocalRate::TABLE,
        ),
    }))
}

/// `envoy.extensions.filters.network.local_ratelimit.v3.LocalRateLimit`; `None` where it is switched off.
pub(super) fn network(at: &At, registry: &Registry) -> Result<Option<ConnectionRate>> {
    let prefix = at.required_text("stat_prefix")?;
    let Some(tokens) = at.message("token_bucket") else {
        return Err(at.refuse("token_bucket", "must be given"));
    };
    let rate = ConnectionRate {
        bucket: bucket(&tokens)?,
        stats: registry.scope(
            &format!("local_rate_limit.{prefix}"),
            stats::ConnectionRate::TABLE,
        ),
    };
    let enabled = at
        .message("runtime_enabled")
        .and_then(|e| e.flag("default_value"));
    Ok((enabled != Some(false)).then_some(rate))
}

fn bucket(at: &At) -> Result<Bucket> {
    let most = at.number_or("max_tokens", 0);
    if most == 0 {
        return Err(at.refuse("max_tokens", "must be greater than 0"));
    }
    let per_fill = at.number_or("tokens_per_fill", 1);
    if per_fill == 0 {
        return Err(at.refuse("tokens_per_fill", "must be greater than 0"));
    }
    let interval = at.duration("fill_interval")?.unwrap_or_default();
    if interval < SHORTEST_FILL {
        return Err(at.refuse("fill_interval", "must be at least 50ms"));
    }
    Bucket::new(most, per_fill, interval, Instant::now())
        .ok_or_else(|| at.refuse("max_tokens", "must be there within seventy years"))
}
