//! B3 propagation, as Zipkin's tracers do it: `x-b3-*` headers, or all in one `b3` (openzipkin/b3-propagation).

use super::{Context, hex, octets};

/// All in one: `TRACE-SPAN[-SAMPLED[-PARENT]]`, or only the third.
pub const SINGLE: &[u8] = b"b3";
/// The trace: 16 or 32 digits.
pub const TRACE: &[u8] = b"x-b3-traceid";
/// The span.
pub const SPAN: &[u8] = b"x-b3-spanid";
/// The span that asked for it.
pub const PARENT: &[u8] = b"x-b3-parentspanid";
/// `1` or `0`.
pub const SAMPLED: &[u8] = b"x-b3-sampled";
/// `1` is sampled, whatever else is said.
pub const FLAGS: &[u8] = b"x-b3-flags";

/// What a request says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Said {
    /// Its place in a trace, sampled or not, and the span before it.
    pub place: Option<(Context, Option<[u8; 8]>)>,
    /// Whether it is to be recorded.
    pub sampled: Option<bool>,
    /// Said in one header.
    pub single: bool,
}

/// Trace, span, and the span before it.
type Ids = ([u8; 16], [u8; 8], Option<[u8; 8]>);

impl Said {
    /// Reads the headers; what is malformed is as if it were not there.
    pub fn parse<'a>(get: impl Fn(&[u8]) -> Option<&'a [u8]>) -> Self {
        if let Some(said) = get(SINGLE).and_then(single) {
            return Self { single: true, ..said };
        }
        let forced = get(FLAGS) == Some(b"1");
        let sampled = match get(SAMPLED) {
            _ if forced => Some(true),
            Some(b"1" | b"true") => Some(true),
            Some(b"0" | b"false") => Some(false),
            _ => None,
        };
        let place = || {
            let (trace, span) = (trace(get(TRACE)?)?, octets::<8>(get(SPAN)?.get(..16)?)?);
            let parent = get(PARENT).filter(|text| text.len() == 16).and_then(octets::<8>);
            (get(SPAN)?.len() == 16 && span != [0; 8]).then_some((trace, span, parent))
        };
        Self::new(place(), sampled)
    }

    fn new(place: Option<Ids>, sampled: Option<bool>) -> Self {
        let place = place.map(|(trace, span, parent)| {
            let context = Context {
                trace,
                span,
                sampled: sampled.unwrap_or(false),
            };
            (context, parent)
        });
        Self {
            place,
            sampled,
            single: false,
        }
    }
}

fn single(text: &[u8]) -> Option<Said> {
    let verdict = |text: &[u8]| match text {
        b"0" => Some(false),
        b"1" | b"d" => Some(true),
        _ => None,
    };
    if let Some(sampled) = verdict(text) {
        return Some(Said::new(None, Some(sampled)));
    }
    let mut parts = text.split(|b| *b == b'-');
    let trace = trace(parts.next()?)?;
    let id = |text: &[u8]| if text.len() == 16 { octets::<8>(text) } else { None };
    let span = id(parts.next()?).filter(|span| *span != [0; 8])?;
    let sampled = match parts.next() {
        Some(text) => Some(verdict(text)?),
        None => None,
    };
    let parent = match parts.next() {
        Some(text) => Some(id(text)?),
        None => None,
    };
    parts
        .next()
        .is_none()
        .then(|| Said::new(Some((trace, span, parent)), sampled))
}

/// 16 or 32 digits that are not all zero.
fn trace(text: &[u8]) -> Option<[u8; 16]> {
    let id = match text.len() {
        32 => octets::<16>(text)?,
        16 => {
            let mut id = [0; 16];
            id[8..].copy_from_slice(&octets::<8>(text)?);
            id
        }
        _ => return None,
    };
    (id != [0; 16]).then_some(id)
}

/// A trace id in digits: 16 where the upper half is zero.
pub fn trace_text(trace: &[u8; 16]) -> String {
    let mut text = [0; 32];
    hex(trace, &mut text);
    let short = trace[..8] == [0; 8];
    let digits = if short { &text[16..] } else { &text[..] };
    String::from_utf8_lossy(digits).into_owned()
}

/// All in one header.
pub fn single_text(context: &Context, parent: Option<[u8; 8]>) -> String {
    let (trace, span) = (trace_text(&context.trace), span_text(&context.span));
    let parent = parent
        .map(|id| format!("-{}", span_text(&id)))
        .unwrap_or_default();
    format!("{trace}-{span}-{}{parent}", u8::from(context.sampled))
}

/// A span id in digits.
pub fn span_text(span: &[u8]) -> String {
    let mut text = vec![0; span.len() * 2];
    hex(span, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: &str = "463ac35c9f6413ad";
    const SPAN_ID: &str = "a2fb4a1d1a96d312";

    fn said(headers: &[(&str, &str)]) -> Said {
        Said::parse(|name| {
            let found = headers.iter().find(|(known, _)| known.as_bytes() == name);
            found.map(|(_, value)| value.as_bytes())
        })
    }

    #[test]
    fn both_forms_say_the_same() {
        let trace = format!("48485a3953bb6124{HALF}");
        let several = [
            ("x-b3-traceid", trace.as_str()),
            ("x-b3-spanid", SPAN_ID),
            ("x-b3-parentspanid", "0020000000000001"),
            ("x-b3-sampled", "1"),
        ];
        let one = format!("{trace}-{SPAN_ID}-1-0020000000000001");
        let in_one = said(&[("b3", &one)]);
        assert!(in_one.single);
        assert_eq!(
            (said(&several).place, said(&several).sampled),
            (in_one.place, in_one.sampled)
        );
        let (context, parent) = said(&several).place.unwrap();
        assert_eq!(trace_text(&context.trace), trace);
        assert_eq!(span_text(&context.span), SPAN_ID);
        assert_eq!(
            parent.map(|id| span_text(&id)).as_deref(),
            Some("0020000000000001")
        );
        assert_eq!(said(&several).sampled, Some(true));
        let short = said(&[("x-b3-traceid", HALF), ("x-b3-spanid", SPAN_ID)]);
        assert_eq!(trace_text(&short.place.unwrap().0.trace), HALF);
        assert_eq!(short.sampled, None);
    }

    #[test]
    fn what_is_malformed_is_not_there() {
        for single in [
            "",
            "2",
            "x",
            HALF,
            &format!("{HALF}-{SPAN_ID}-2"),
            &format!("{HALF}-{SPAN_ID}-1-2"),
            &format!("{HALF}-{}", "0".repeat(16)),
        ] {
            assert_eq!(said(&[("b3", single)]), Said::default(), "{single:?}");
        }
        for (sampled, wanted) in [
            ("0", Some(false)),
            ("1", Some(true)),
            ("true", Some(true)),
            ("yes", None),
        ] {
            assert_eq!(said(&[("x-b3-sampled", sampled)]).sampled, wanted);
        }
        assert_eq!(
            said(&[("x-b3-flags", "1"), ("x-b3-sampled", "0")]).sampled,
            Some(true)
        );
        assert_eq!(said(&[("b3", "d")]).sampled, Some(true));
        for (trace, span) in [(HALF, "1"), ("1", SPAN_ID), (HALF, "A2FB4A1D1A96D312")] {
            assert_eq!(
                said(&[("x-b3-traceid", trace), ("x-b3-spanid", span)]).place,
                None
            );
        }
    }
}
