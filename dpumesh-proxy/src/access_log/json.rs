//! JSON lines, as Envoy makes them of `json_format`: keys in order, numbers for operators that stand alone and have one. Where empty values
//! are omitted, a key without a value is.

use serde_json::Value;

use super::Record;
use super::format::{Part, Said, compile};

/// A compiled `json_format`.
#[derive(Debug)]
pub(super) enum Json {
    /// By key, in order.
    Object(Vec<(String, Self)>),
    List(Vec<Self>),
    /// Anything that is always the same.
    Fixed(String),
    /// One operator.
    Operator(Part),
    /// Text with operators in it.
    Mixed(Vec<Part>),
}

impl Json {
    /// # Errors
    /// The operator that is unknown or malformed, in words.
    pub(super) fn new(format: &Value) -> Result<Self, String> {
        Ok(match format {
            Value::Object(fields) => {
                let mut object = Vec::new();
                for (key, value) in fields {
                    object.push((quoted(key), Self::new(value)?));
                }
                object.sort_by(|a, b| a.0.cmp(&b.0));
                Self::Object(object)
            }
            Value::Array(items) => Self::List(items.iter().map(Self::new).collect::<Result<_, _>>()?),
            Value::String(text) => {
                let mut parts = compile(text)?;
                match parts.as_slice() {
                    [] => Self::Fixed("\"\"".to_owned()),
                    [Part::Text(text)] => Self::Fixed(quoted(&String::from_utf8_lossy(text))),
                    [_] => Self::Operator(parts.remove(0)),
                    _ => Self::Mixed(parts),
                }
            }
            // A protobuf number is a double; whole ones are written as such, others as text.
            Value::Number(number) => match number.as_f64() {
                Some(n) if n.fract() == 0.0 && n.abs() < 1e15 => Self::Fixed(format!("{n:.0}")),
                _ => Self::Fixed(quoted(&number.to_string())),
            },
            other => Self::Fixed(other.to_string()),
        })
    }

    pub(super) fn parts(&self) -> Vec<&Part> {
        match self {
            Self::Object(fields) => fields.iter().flat_map(|(_, json)| json.parts()).collect(),
            Self::List(items) => items.iter().flat_map(Self::parts).collect(),
            Self::Fixed(_) => Vec::new(),
            Self::Operator(part) => vec![part],
            Self::Mixed(parts) => parts.iter().collect(),
        }
    }

    pub(super) fn render(&self, record: &Record<'_>, omit_empty: bool, out: &mut Vec<u8>) {
        match self {
            Self::Object(fields) => {
                out.push(b'{');
                let begin = out.len();
                for (key, json) in fields {
                    let mark = out.len();
                    if mark > begin {
                        out.push(b',');
                    }
                    out.extend_from_slice(key.as_bytes());
                    out.push(b':');
                    let value = out.len();
                    json.render(record, omit_empty, out);
                    if omit_empty && out[value..] == *b"null" {
                        out.truncate(mark);
                    }
                }
                out.push(b'}');
            }
            Self::List(items) => {
                out.push(b'[');
                for (index, json) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(b',');
                    }
                    json.render(record, omit_empty, out);
                }
                out.push(b']');
            }
            Self::Fixed(text) => out.extend_from_slice(text.as_bytes()),
            Self::Operator(part) => {
                let begin = out.len();
                match part.put(record, out) {
                    Said::Number => {}
                    Said::Nothing => out.extend_from_slice(b"null"),
                    Said::Text => quote_from(begin, out),
                }
            }
            Self::Mixed(parts) => {
                let begin = out.len();
                parts.iter().for_each(|part| part.render(record, omit_empty, out));
                quote_from(begin, out);
            }
        }
    }
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Makes what `out` has from `begin` on a JSON string; what is no UTF-8 is replaced.
fn quote_from(begin: usize, out: &mut Vec<u8>) {
    let plain = |b: &u8| (0x20..0x7f).contains(b) && !matches!(b, b'"' | b'\\');
    if out[begin..].iter().all(plain) {
        out.insert(begin, b'"');
        out.push(b'"');
        return;
    }
    let text = quoted(&String::from_utf8_lossy(&out[begin..]));
    out.truncate(begin);
    out.extend_from_slice(text.as_bytes());
}
