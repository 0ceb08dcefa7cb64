//! What must hold of any text that comes as configuration, and of any request for its routes. Run by the fuzzer's targets `config` and
//! `route`, and here over their corpora.
//!
//! A configuration that names files is only held against the table of what is implemented: nothing here touches the disk.

use std::collections::HashMap;
use std::path::Path;

use prost_reflect::{DynamicMessage, ReflectMessage as _, Value};

use super::ConfigError;
use super::files::Files;
use super::schema::{At, unpack_any, value_to_message};
use super::text::text_to_value;
use super::{support, translate_route};
use crate::access_log::Sinks;
use crate::route::{RequestView, RouteTable};
use crate::stats::Registry;

/// Reads `octets` as a bootstrap: no panic, a refusal has a reason, and what is accepted is accepted again.
///
/// # Panics
/// One of these does not hold.
pub fn bootstrap(octets: &[u8]) {
    let Ok(text) = std::str::from_utf8(octets) else {
        return;
    };
    let load = || {
        let message = checked("envoy.config.bootstrap.v3.Bootstrap", text)?;
        if names_files(&message) {
            return Ok(None);
        }
        let registry = Registry::new(1);
        let sinks = Sinks::new(&registry).expect("a thread");
        let config = Files::parse(Path::new("fuzz.yaml"), text)?.load(&registry, &sinks)?;
        let listeners = config.listeners.iter().map(|l| (l.name.clone(), l.fingerprint));
        let clusters = config
            .clusters
            .iter()
            .map(|c| (c.name.clone(), c.endpoints.len()));
        Ok::<_, ConfigError>(Some((
            listeners.collect::<Vec<_>>(),
            clusters.collect::<Vec<_>>(),
        )))
    };
    match load() {
        Ok(first) => assert_eq!(load().expect("what was accepted before"), first),
        Err(refusal) => assert!(!refusal.to_string().is_empty()),
    }
}

/// Reads what stands before the first NUL as a route configuration, and what follows as a request (method, host, path, then header lines):
/// no panic, the first route that takes the request has it, and the letter case of the host does not matter.
///
/// # Panics
/// One of these does not hold.
pub fn route(octets: &[u8]) {
    let Some(at) = octets.iter().position(|b| *b == 0) else {
        return;
    };
    let Ok(text) = std::str::from_utf8(&octets[..at]) else {
        return;
    };
    let Ok(table) = table(text) else {
        return;
    };
    let lines: Vec<&[u8]> = octets[at + 1..].split(|b| *b == b'\n').collect();
    let line = |index: usize| lines.get(index).copied().unwrap_or_default();
    let request = Request {
        method: line(0),
        host: line(1).to_vec(),
        path: line(2),
        headers: lines.get(3..).unwrap_or_default(),
    };
    let found = table.find(&request);
    let place = found.map(|(host, route)| (std::ptr::from_ref(host), std::ptr::from_ref(route)));
    let shouted = Request {
        host: request.host.to_ascii_uppercase(),
        ..request
    };
    if !text.contains("authority") && !text.contains("host") {
        let again = table.find(&shouted);
        let again = again.map(|(host, route)| (std::ptr::from_ref(host), std::ptr::from_ref(route)));
        assert_eq!(place, again);
    }
    let Some((host, route)) = found else {
        return;
    };
    let first = host
        .routes
        .iter()
        .find(|r| r.matcher.takes(&shouted) || std::ptr::eq(*r, route));
    assert!(
        first.is_some_and(|first| std::ptr::eq(first, route))
            || text.contains("host")
            || text.contains("authority")
    );
    let bare = request.path.split(|b| *b == b'?').next().unwrap_or_default();
    assert!(route.matcher.path.matched_len(bare) <= bare.len());
}

fn table(text: &str) -> Result<RouteTable, ConfigError> {
    let message = checked("envoy.config.route.v3.RouteConfiguration", text)?;
    if names_files(&message) {
        return Err(ConfigError::new("", "names a file"));
    }
    translate_route::table(&At::new(message, ""), &HashMap::new(), &Registry::new(1), false)
}

/// The message that `text` is, with nothing in it that is not implemented.
fn checked(kind: &str, text: &str) -> Result<DynamicMessage, ConfigError> {
    let value = text_to_value(Path::new("fuzz.yaml"), text)?;
    let message = value_to_message(kind, &value, "")?;
    support::check(&message, "")?;
    Ok(message)
}

/// Whether something in it would read or write a file.
fn names_files(message: &DynamicMessage) -> bool {
    let descriptor = message.descriptor();
    if descriptor.full_name() == "google.protobuf.Any" {
        return unpack_any(message, "").is_ok_and(|inner| names_files(&inner));
    }
    let of_files = match descriptor.full_name() {
        "envoy.config.core.v3.DataSource" => message.has_field_by_name("filename"),
        "envoy.config.core.v3.ConfigSource" => {
            message.has_field_by_name("path") || message.has_field_by_name("path_config_source")
        }
        name => name.starts_with("envoy.extensions.access_loggers."),
    };
    of_files || message.fields().any(|(_, value)| holds_files(value))
}

fn holds_files(value: &Value) -> bool {
    match value {
        Value::Message(message) => names_files(message),
        Value::List(items) => items.iter().any(holds_files),
        Value::Map(items) => items.values().any(holds_files),
        _ => false,
    }
}

struct Request<'a> {
    method: &'a [u8],
    host: Vec<u8>,
    path: &'a [u8],
    headers: &'a [&'a [u8]],
}

impl RequestView for Request<'_> {
    fn host(&self) -> &[u8] {
        &self.host
    }
    fn path(&self) -> &[u8] {
        self.path
    }
    fn method(&self) -> &[u8] {
        self.method
    }
    fn each_header<'a>(&'a self, name: &[u8], see: &mut dyn FnMut(&'a [u8])) {
        for line in self.headers {
            if let Some(at) = line.iter().position(|b| *b == b':')
                && line[..at].eq_ignore_ascii_case(name)
            {
                see(line[at + 1..].trim_ascii());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    fn corpus(name: &str, least: usize, step: usize, check: fn(&[u8])) {
        let folder = format!("{}/../fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
        assert!(files.len() >= least, "{} files", files.len());
        for file in files {
            let octets = std::fs::read(file.path()).unwrap();
            check(&octets);
            (0..octets.len())
                .step_by(step)
                .for_each(|length| check(&octets[..length]));
        }
    }

    #[test]
    fn the_corpus_of_bootstraps_holds() {
        corpus("config", 8, 17, super::bootstrap);
    }

    #[test]
    fn the_corpus_of_routes_holds() {
        corpus("route", 8, 13, super::route);
    }

    /// Targets that take nothing would find nothing.
    #[test]
    fn most_of_the_corpora_is_accepted() {
        let accepted = |name: &str, good: fn(&str) -> bool| {
            let folder = format!("{}/../fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
            let files = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
            let texts = files.map(|file| String::from_utf8(std::fs::read(file.path()).unwrap()).unwrap());
            texts.filter(|text| good(text)).count()
        };
        let bootstrap = |text: &str| super::checked("envoy.config.bootstrap.v3.Bootstrap", text).is_ok();
        let route = |text: &str| {
            text.split_once('\0')
                .is_some_and(|(text, _)| super::table(text).is_ok())
        };
        assert!(accepted("config", bootstrap) >= 5);
        assert!(accepted("route", route) >= 6);
    }
}
