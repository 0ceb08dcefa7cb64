//! The corpus: `requests.txt`, `responses.txt`, and what Envoy makes of them where that is something else, `envoy.txt`.

use std::collections::HashMap;

/// One case.
pub(super) struct Case {
    pub(super) name: String,
    /// What becomes of it, in the file's words.
    pub(super) fate: String,
    pub(super) octets: Vec<u8>,
    /// The endpoint closes behind it.
    pub(super) ends: bool,
}

pub(super) fn requests() -> Vec<Case> {
    cases(include_str!("requests.txt"))
}

pub(super) fn responses() -> Vec<Case> {
    cases(include_str!("responses.txt"))
}

/// Envoy's fates that differ, by the case's name; those of responses behind `response: `.
pub(super) fn envoy() -> HashMap<&'static str, &'static str> {
    let lines = include_str!("envoy.txt").lines();
    let lines = lines.filter(|l| !l.starts_with('#') && !l.is_empty());
    lines
        .map(|line| line.split_once(" | ").expect("FATE | NAME"))
        .map(|(fate, name)| (name, fate))
        .collect()
}

fn cases(text: &str) -> Vec<Case> {
    let lines = text.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
    let case = |line: &str| {
        let mut parts = line.splitn(3, " | ");
        let mut part = || parts.next().expect("FATE | NAME | OCTETS");
        let (fate, name, text) = (part(), part(), part());
        let ends = text.ends_with('$');
        Case {
            name: name.to_owned(),
            fate: spelled(fate).to_owned(),
            octets: octets(text.strip_suffix('$').unwrap_or(text)),
            ends,
        }
    };
    lines.map(case).collect()
}

pub(super) fn spelled(fate: &str) -> &str {
    match fate {
        "pass" => "200+200",
        "refuse" => "400!",
        "wait" => "",
        other => other,
    }
}

fn octets(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some((count, what, behind)) = repeated(rest) {
            out.extend(octets(what).repeat(count));
            rest = behind;
            continue;
        }
        rest = &rest[first.len_utf8()..];
        match first {
            '⏎' => out.extend_from_slice(b"\r\n"),
            '\\' => {
                let (kind, behind) = rest.split_at(1);
                rest = behind;
                out.push(match kind {
                    "r" => b'\r',
                    "n" => b'\n',
                    "t" => b'\t',
                    "\\" => b'\\',
                    "x" => {
                        let (digits, behind) = rest.split_at(2);
                        rest = behind;
                        u8::from_str_radix(digits, 16).expect("two hexadecimal digits")
                    }
                    other => panic!("\\{other} in {text}"),
                });
            }
            other => out.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    out
}

/// `{N*x}`: N, x, and what follows.
fn repeated(text: &str) -> Option<(usize, &str, &str)> {
    let (count, rest) = text.strip_prefix('{')?.split_once('*')?;
    let count = count.parse().ok()?;
    let (what, behind) = rest.split_once('}')?;
    Some((count, what, behind))
}
