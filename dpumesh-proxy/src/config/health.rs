//! `outlier_detection` and `health_checks` of clusters into [`crate::health`]'s forms, with Envoy's defaults.

use std::ops::Range;
use std::time::Duration;

use super::ConfigError;
use super::schema::At;
use crate::health::check::{Check, Http, Pauses, Question};
use crate::health::outlier::{Detection, FailurePercentage, InRow, SuccessRate};

type Result<T> = std::result::Result<T, ConfigError>;

const LONGEST: Duration = Duration::from_secs(300);

/// `envoy.config.cluster.v3.OutlierDetection`.
pub(super) fn detection(at: &At) -> Result<Detection> {
    let base = positive(at, "base_ejection_time")?.unwrap_or(Duration::from_secs(30));
    let longest = positive(at, "max_ejection_time")?.unwrap_or_else(|| LONGEST.max(base));
    if longest < base {
        return Err(at.refuse("max_ejection_time", "must not be less than base_ejection_time"));
    }
    let number = |field: &str, otherwise: u32| at.number_or(field, otherwise);
    let percent = |field: &str, otherwise: u32| match at.number_or(field, otherwise) {
        percent @ 0..=100 => Ok(percent),
        _ => Err(at.refuse(field, "must be at most 100")),
    };
    let in_row = |limit: &str, enforcing: &str, otherwise: u32| -> Result<InRow> {
        Ok(InRow {
            limit: number(limit, 5),
            enforcing: percent(enforcing, otherwise)?,
        })
    };
    Ok(Detection {
        interval: positive(at, "interval")?.unwrap_or(Duration::from_secs(10)),
        base,
        longest,
        jitter: at.duration("max_ejection_time_jitter")?.unwrap_or_default(),
        most: percent("max_ejection_percent", 10)?,
        one_at_least: at.flag("always_eject_one_host").unwrap_or(false),
        server_errors: in_row("consecutive_5xx", "enforcing_consecutive_5xx", 100)?,
        gateway_failures: in_row(
            "consecutive_gateway_failure",
            "enforcing_consecutive_gateway_failure",
            0,
        )?,
        local_failures: in_row(
            "consecutive_local_origin_failure",
            "enforcing_consecutive_local_origin_failure",
            100,
        )?,
        split: at.flag("split_external_local_origin_errors").unwrap_or(false),
        check_returns: at
            .flag("successful_active_health_check_uneject_host")
            .unwrap_or(true),
        success_rate: SuccessRate {
            hosts: number("success_rate_minimum_hosts", 5),
            volume: number("success_rate_request_volume", 100),
            factor: number("success_rate_stdev_factor", 1900),
            enforcing: [
                percent("enforcing_success_rate", 100)?,
                percent("enforcing_local_origin_success_rate", 100)?,
            ],
        },
        failure_percentage: FailurePercentage {
            hosts: number("failure_percentage_minimum_hosts", 5),
            volume: number("failure_percentage_request_volume", 50),
            threshold: percent("failure_percentage_threshold", 85)?,
            enforcing: [
                percent("enforcing_failure_percentage", 0)?,
                percent("enforcing_failure_percentage_local_origin", 0)?,
            ],
        },
    })
}

fn positive(at: &At, field: &str) -> Result<Option<Duration>> {
    let duration = at.duration(field)?;
    if duration.is_some_and(|d| d.is_zero()) {
        return Err(at.refuse(field, "must be greater than 0s"));
    }
    Ok(duration)
}

/// The health check of a cluster.
pub(super) fn check(at: &At) -> Result<Option<Check>> {
    let checks = at.messages("health_checks");
    let [at] = checks.as_slice() else {
        return match checks.get(1) {
            Some(second) => Err(second.refuse("", "a cluster has at most one health check")),
            None => Ok(None),
        };
    };
    let required = |field: &str| -> Result<Duration> {
        positive(at, field)?.ok_or_else(|| at.refuse(field, "must be given"))
    };
    let threshold = |field: &str| match at.number(field) {
        Some(number) => Ok(u32::try_from(number).unwrap_or(u32::MAX).max(1)),
        None => Err(at.refuse(field, "must be given")),
    };
    let port = match at.number("alt_port") {
        None => None,
        Some(port) => Some(u16::try_from(port).map_err(|_| at.refuse("alt_port", "must be at most 65535"))?),
    };
    let interval = required("interval")?;
    let unhealthy = positive(at, "unhealthy_interval")?.unwrap_or(interval);
    let no_traffic = positive(at, "no_traffic_interval")?.unwrap_or(Duration::from_secs(60));
    Ok(Some(Check {
        timeout: required("timeout")?,
        pauses: Pauses {
            healthy: interval,
            healthy_edge: positive(at, "healthy_edge_interval")?.unwrap_or(interval),
            unhealthy,
            unhealthy_edge: positive(at, "unhealthy_edge_interval")?.unwrap_or(unhealthy),
            no_traffic,
            no_traffic_healthy: positive(at, "no_traffic_healthy_interval")?.unwrap_or(no_traffic),
            first_jitter: at.duration("initial_jitter")?.unwrap_or_default(),
            jitter: at.duration("interval_jitter")?.unwrap_or_default(),
            jitter_percent: at.number_or("interval_jitter_percent", 0),
        },
        unhealthy_threshold: threshold("unhealthy_threshold")?,
        healthy_threshold: threshold("healthy_threshold")?,
        port,
        question: question(at)?,
    }))
}

fn question(at: &At) -> Result<Question> {
    if let Some(http) = at.message("http_health_check") {
        return Ok(Question::Http(self::http(&http)?));
    }
    if let Some(tcp) = at.message("tcp_health_check") {
        let receive = tcp.messages("receive");
        return Ok(Question::Tcp {
            send: tcp
                .message("send")
                .map(|p| payload(&p))
                .transpose()?
                .unwrap_or_default(),
            receive: receive.iter().map(payload).collect::<Result<_>>()?,
        });
    }
    let Some(grpc) = at.message("grpc_health_check") else {
        return Err(at.refuse(
            "",
            "http_health_check, tcp_health_check or grpc_health_check must be given; others are not supported yet",
        ));
    };
    Ok(Question::Grpc {
        service: grpc.text("service_name"),
        authority: host(&grpc, "authority")?,
    })
}

fn http(at: &At) -> Result<Http> {
    let path = at.required_text("path")?;
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(at.refuse("path", "must begin with a slash and be visible ASCII"));
    }
    let method = match at.choice("method").as_str() {
        "" | "METHOD_UNSPECIFIED" => "GET".to_owned(),
        "CONNECT" => return Err(at.refuse("method", "CONNECT is no check")),
        method => method.to_owned(),
    };
    let http2 = match at.choice("codec_client_type").as_str() {
        "HTTP1" => false,
        "HTTP2" => true,
        other => return Err(at.refuse("codec_client_type", format!("{other} is not supported yet"))),
    };
    let mut expected = statuses(at, "expected_statuses")?;
    if expected.is_empty() {
        expected.push(200..201);
    }
    Ok(Http {
        method,
        path,
        host: host(at, "host")?,
        http2,
        expected,
        retriable: statuses(at, "retriable_statuses")?,
    })
}

fn host(at: &At, field: &str) -> Result<String> {
    let host = at.text(field);
    if host.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(host)
    } else {
        Err(at.refuse(field, "must be visible ASCII"))
    }
}

fn statuses(at: &At, field: &str) -> Result<Vec<Range<u16>>> {
    let range = |range: &At| {
        let (start, end) = (range.signed("start"), range.signed("end"));
        if start < 100 || end > 600 || start >= end {
            return Err(range.refuse("", "must be a part of 100 to 600"));
        }
        Ok(start as u16..end as u16)
    };
    at.messages(field).iter().map(range).collect()
}

/// Octets, in hexadecimal or as they are.
fn payload(at: &At) -> Result<Vec<u8>> {
    if !at.has("text") {
        let binary = at.bytes("binary");
        return if binary.is_empty() {
            Err(at.refuse("text", "text or binary must be given"))
        } else {
            Ok(binary)
        };
    }
    let text = at.text("text");
    let octet = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair)
            .ok()
            .filter(|p| p.len() == 2 && !p.starts_with('+'))?;
        u8::from_str_radix(pair, 16).ok()
    };
    let octets: Option<Vec<u8>> = text.as_bytes().chunks(2).map(octet).collect();
    octets
        .filter(|o| !o.is_empty())
        .ok_or_else(|| at.refuse("text", "must be hexadecimal"))
}
