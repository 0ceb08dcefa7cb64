//! The question as an HTTP request with the request's own method and path, and what its answer means.

use super::{Changes, Decision, Denial, Filter, Http, Path, Question, header, replace};
use crate::callout::Answer;
use crate::route::{AddHow, Text};

/// Header lines that belong to a connection or a body, not to what an answer says.
const OWN: [&[u8]; 6] = [
    b"content-length",
    b"transfer-encoding",
    b"connection",
    b"date",
    b"server",
    b"host",
];

/// The request that asks, in text.
pub(crate) fn request(filter: &Filter, http: &Http, question: &Question<'_>) -> Vec<u8> {
    let path = match &http.path {
        Path::Before(prefix) => [prefix.as_bytes(), question.path].concat(),
        Path::Instead(path) => path.clone().into_bytes(),
    };
    let mut out = [
        question.method,
        b" ",
        &path,
        b" HTTP/1.1\r\nhost: ",
        question.host,
        b"\r\n",
    ]
    .concat();
    let mut line = |name: &[u8], value: &[u8]| {
        out.extend_from_slice(&[name, b": ", value, b"\r\n"].concat());
    };
    for (name, value) in question.told(filter) {
        let replaced = http.add.iter().any(|(known, _)| known == name);
        if !name.starts_with(b":") && name != b"content-length" && !replaced {
            line(name, value);
        }
    }
    for (name, value) in &http.add {
        line(name, value);
    }
    let body = question.body.map_or(&[][..], |(body, cut)| {
        line(b"x-envoy-auth-partial-body", cut.to_string().as_bytes());
        body
    });
    line(b"content-length", body.len().to_string().as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(body);
    out
}

/// What an answer means: 200 lets the request pass, 5xx is a failure, anything else is for the client.
pub(crate) fn decision(http: &Http, answer: Answer) -> Decision {
    let among = |rules: &[Text], name: &[u8]| rules.iter().any(|rule| rule.holds(name));
    match answer.status {
        500..=599 => Decision::Failed(None),
        200 => {
            let mut changes = Changes::default();
            for (name, value) in &answer.fields {
                if among(&http.upstream, name) {
                    replace(&mut changes.request, header(name, value, AddHow::Overwrite));
                }
                if among(&http.upstream_append, name) {
                    changes.request.extend(header(name, value, AddHow::Append));
                }
                if among(&http.client_on_success, name) {
                    changes.response.extend(header(name, value, AddHow::Append));
                }
                if name == b"x-envoy-auth-headers-to-remove" {
                    let names = value.split(|b| *b == b',').map(<[u8]>::trim_ascii);
                    let names = names.map(<[u8]>::to_ascii_lowercase);
                    changes
                        .remove
                        .extend(names.filter(|n| crate::route::may_change(n)));
                }
            }
            Decision::Passed(changes)
        }
        status => {
            let told = |name: &[u8]| http.client.as_deref().is_none_or(|rules| among(rules, name));
            let fields = answer.fields.iter();
            let fields = fields.filter(|(name, _)| !OWN.contains(&name.as_slice()) && told(name));
            let mut headers = Vec::new();
            for (name, value) in fields {
                replace(&mut headers, header(name, value, AddHow::Overwrite));
            }
            Decision::Denied(Denial {
                status,
                headers,
                body: answer.body,
            })
        }
    }
}
