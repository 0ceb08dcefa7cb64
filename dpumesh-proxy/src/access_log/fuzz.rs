//! What must hold of any text that comes as a format with operators. Run by the fuzzer's target `format`, and here over its corpus.

use std::time::{Duration, UNIX_EPOCH};

use super::{Extra, Format, Headers, Record, Template, Times};

/// Compiles `octets` as a log's format, as a header's value and inside JSON, and renders them: no panic, text without operators is
/// itself, JSON stays JSON, and what is said does not depend on when it is asked.
///
/// # Panics
/// One of these does not hold.
pub fn format(octets: &[u8]) {
    let Ok(text) = std::str::from_utf8(octets) else {
        return;
    };
    let compiled = Format::text(Some(text), false);
    let record = record();
    if let Ok(template) = Template::new(text) {
        assert!(compiled.is_ok(), "a header's value may say less than a log");
        assert_eq!(template.render(&record), template.render(&record));
    }
    let json = Format::json(&serde_json::json!({ "key": text, "list": [text, "more"] }), false);
    assert_eq!(json.is_ok(), compiled.is_ok());
    let (Ok(compiled), Ok(json)) = (compiled, json) else {
        return;
    };
    let line = render(&compiled, &record);
    if !text.contains('%') {
        assert_eq!(line, octets);
    }
    if !text.contains("EMIT_TIME") && !text.contains("UNIQUE_ID") {
        assert_eq!(line, render(&compiled, &record));
    }
    let line = render(&json, &record);
    serde_json::from_slice::<serde_json::Value>(&line).expect("JSON");
}

fn render(format: &Format, record: &Record<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    format.render(record, &mut out);
    out
}

struct Named;

impl Headers for Named {
    fn header(&self, name: &[u8]) -> Option<&[u8]> {
        match name {
            b":method" => Some(b"GET"),
            b":path" => Some(b"/a/b?c=d&c=e"),
            b":authority" => Some(b"example"),
            b"x-odd" => Some(b"a \"quoted\" \\ \x80 value"),
            _ => None,
        }
    }
}

fn record() -> Record<'static> {
    let address = ([192, 0, 2, 1], 1000).into();
    Record {
        start: UNIX_EPOCH + Duration::new(1_795_361_808, 833_000_456),
        duration: Duration::from_micros(7_654),
        request: Some(&Named),
        response: Some(&Named),
        protocol: Some("HTTP/1.1"),
        status: 200,
        flags: "UH",
        received: 1,
        sent: 2,
        upstream: Some(address),
        cluster: Some("cluster"),
        route: None,
        remote: address,
        direct_remote: address,
        local: address,
        direct_local: address,
        ingress: None,
        extra: Extra {
            trailers: Some(b"grpc-status: 5\r\n"),
            times: Times {
                request_complete: Some(Duration::from_millis(1)),
                ..Times::default()
            },
            ..Extra::default()
        },
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_holds() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/format");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
        assert!(files.len() >= 12, "{} files", files.len());
        for file in files {
            let octets = std::fs::read(file.path()).unwrap();
            super::format(&octets);
            (0..octets.len()).for_each(|length| super::format(&octets[..length]));
        }
    }
}
