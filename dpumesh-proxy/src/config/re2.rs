//! RE2's regular expressions, as Envoy reads them, by the `regex` crate.
//!
//! Both are automata over the same ideas; this file covers where their syntax differs: in RE2 `\d \w \s \b` mean ASCII
//! only, `[` and `&&` inside a class are themselves, `\<` is a `<`, `\Q…\E` quotes. What RE2 has and this has not (`\C`) and
//! what it has not (the flags `x`, `u`, `R`, class arithmetic, bounds above 1000) is refused.

use regex::bytes::Regex;

/// Compiles a pattern that must match all of its input.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn whole(pattern: &str) -> Result<Regex, String> {
    let pattern = rewritten(pattern)?;
    // On its own first: a stray parenthesis must not close the group around it.
    compile(&pattern)?;
    compile(&format!(r"\A(?:{pattern})\z"))
}

/// Compiles a pattern that may match any part of its input.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn part(pattern: &str) -> Result<Regex, String> {
    compile(&rewritten(pattern)?)
}

/// RE2's replacement text (`\0` to `\9` are groups) as the `regex` crate's.
///
/// # Errors
/// A backslash before anything else, or a group the pattern does not have.
pub(super) fn replacement(text: &str, pattern: &Regex) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'$' => out.extend_from_slice(b"$$"),
            b'\\' => match rest.next() {
                Some(b'\\') => out.push(b'\\'),
                Some(digit @ b'0'..=b'9') => {
                    if usize::from(digit - b'0') >= pattern.captures_len() {
                        return Err(format!("\\{} names a group that is not there", char::from(digit)));
                    }
                    out.extend_from_slice(&[b'$', b'{', digit, b'}']);
                }
                _ => return Err("a backslash must stand before a digit or a backslash".to_owned()),
            },
            other => out.push(other),
        }
    }
    Ok(out)
}

fn compile(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|e| e.to_string())
}

fn rewritten(pattern: &str) -> Result<String, String> {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern.chars().peekable();
    let mut class: Option<usize> = None;
    while let Some(c) = rest.next() {
        match (c, class) {
            ('\\', _) => {
                let escaped = rest.next().ok_or("a backslash at the end")?;
                if escaped == 'Q' {
                    quoted(&mut rest, &mut out);
                } else {
                    escape(escaped, class.is_some(), &mut rest, &mut out)?;
                    class = class.map(|n| n + 1);
                }
            }
            ('[', None) => {
                out.push('[');
                if rest.next_if_eq(&'^').is_some() {
                    out.push('^');
                }
                class = Some(0);
            }
            ('[', Some(n)) => {
                // `[[:alpha:]]` is the same in both.
                let named = rest.peek() == Some(&':');
                out.push_str(if named { "[" } else { r"\[" });
                if named {
                    for c in rest.by_ref() {
                        out.push(c);
                        if c == ']' {
                            break;
                        }
                    }
                }
                class = Some(n + 1);
            }
            // The first `]` of a class is itself.
            (']', Some(0)) => {
                out.push_str(r"\]");
                class = Some(1);
            }
            (']', Some(_)) => {
                out.push(']');
                class = None;
            }
            ('&' | '~', Some(n)) => {
                out.push('\\');
                out.push(c);
                class = Some(n + 1);
            }
            ('-', Some(_)) if rest.peek() == Some(&'-') => {
                return Err("-- in a class is not supported".to_owned());
            }
            ('(', None) => {
                out.push('(');
                if rest.next_if_eq(&'?').is_some() {
                    out.push('?');
                    flags(&mut rest, &mut out)?;
                }
            }
            ('{', None) => bounds(&mut rest, &mut out)?,
            (c, n) => {
                out.push(c);
                class = n.map(|n| n + 1);
            }
        }
    }
    Ok(out)
}

type Rest<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// Copies what stands after `\Q`, up to `\E` or the end.
fn quoted(rest: &mut Rest<'_>, out: &mut String) {
    while let Some(c) = rest.next() {
        if c == '\\' && rest.next_if_eq(&'E').is_some() {
            return;
        }
        out.push_str(&regex::escape(c.encode_utf8(&mut [0; 4])));
    }
}

fn escape(c: char, in_class: bool, rest: &mut Rest<'_>, out: &mut String) -> Result<(), String> {
    match c {
        'd' => out.push_str("[0-9]"),
        'D' => out.push_str("[^0-9]"),
        'w' => out.push_str("[0-9A-Za-z_]"),
        'W' => out.push_str("[^0-9A-Za-z_]"),
        's' => out.push_str(r"[\t\n\f\r ]"),
        'S' => out.push_str(r"[^\t\n\f\r ]"),
        'b' if !in_class => out.push_str(r"(?-u:\b)"),
        'B' if !in_class => out.push_str(r"(?-u:\B)"),
        'A' | 'z' if !in_class => {
            out.push('\\');
            out.push(c);
        }
        'a' | 'f' | 't' | 'n' | 'r' | 'v' => {
            out.push('\\');
            out.push(c);
        }
        'p' | 'P' | 'x' => {
            out.push('\\');
            out.push(c);
            if rest.next_if_eq(&'{').is_some() {
                out.push('{');
                for c in rest.by_ref() {
                    out.push(c);
                    if c == '}' {
                        break;
                    }
                }
            }
        }
        c if c.is_ascii_punctuation() => out.push_str(&escaped_punctuation(c)),
        c => return Err(format!("\\{c} is not supported")),
    }
    Ok(())
}

fn escaped_punctuation(c: char) -> String {
    if matches!(c, '<' | '>') {
        c.to_string()
    } else {
        format!("\\{c}")
    }
}

/// What stands after `(?`: flags of RE2 or a group's name.
fn flags(rest: &mut Rest<'_>, out: &mut String) -> Result<(), String> {
    while let Some(c) = rest.next_if(|c| !matches!(c, ':' | ')')) {
        match c {
            'i' | 'm' | 's' | 'U' | '-' => out.push(c),
            'P' | '<' => {
                out.push(c);
                return Ok(());
            }
            other => return Err(format!("(?{other} is not supported")),
        }
    }
    Ok(())
}

/// What stands after `{`: a repetition of at most 1000, else the brace itself.
fn bounds(rest: &mut Rest<'_>, out: &mut String) -> Result<(), String> {
    let text: String = rest.clone().take_while(|c| *c != '}').collect();
    let closed = rest.clone().nth(text.chars().count()) == Some('}');
    let numbers: Vec<&str> = text.split(',').collect();
    let digits = |n: &str| n.bytes().all(|b| b.is_ascii_digit());
    let is_repetition =
        closed && numbers.len() <= 2 && !numbers[0].is_empty() && numbers.iter().all(|n| digits(n));
    if !is_repetition {
        out.push_str(r"\{");
        return Ok(());
    }
    let too_many = |n: &&str| n.parse::<u32>().map_or(!n.is_empty(), |n| n > 1000);
    if numbers.iter().any(too_many) {
        return Err(format!("{{{text}}} repeats more than 1000 times"));
    }
    out.push('{');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(pattern: &str, text: &str) -> bool {
        whole(pattern)
            .unwrap_or_else(|e| panic!("{pattern}: {e}"))
            .is_match(text.as_bytes())
    }

    #[test]
    fn patterns_mean_what_they_mean_in_re2() {
        for (pattern, yes, no) in [
            (r"a+", "aa", "aab"),
            (r"a|b", "b", "ab"),
            (r"\d+", "12", "\u{0661}"),
            (r"\w+", "a_1", "\u{e9}"),
            (r"[\w-]+", "a-b", "a b"),
            (r"[^\d]", "x", "5"),
            (r"a\b.*", "a b", "ab"),
            (r".", "\u{e9}", "ab"),
            (r"[[]", "[", "]"),
            (r"[]a]+", "]a", "b"),
            (r"[a&&b]+", "&a", "c"),
            (r"[a~~-]+", "a~-", "b"),
            (r"[[:alpha:]]+", "ab", "a1"),
            (r"\Qa.b\E", "a.b", "axb"),
            (r"\<a\>", "<a>", "a"),
            (r"a{2,3}", "aaa", "a"),
            (r"a{x}", "a{x}", "a"),
            (r"(?i)AB", "ab", "abc"),
            (r"(?P<n>a)", "a", "n"),
            (r"/re[0-9]+/.*", "/re7/x", "/re/x"),
            (r"a\nb", "a\nb", "a"),
            (
                r"spiffe://.+/ns/shop/(.+/|)sa/front(/.+)?",
                "spiffe://td/ns/shop/sa/front",
                "spiffe://td/ns/shop/sa/fronty",
            ),
        ] {
            assert!(holds(pattern, yes), "{pattern} {yes}");
            assert!(!holds(pattern, no), "{pattern} {no}");
        }
        assert!(!holds("a", "a\n"), "no newline behind the end");
    }

    #[test]
    fn what_re2_refuses_or_this_lacks_is_refused() {
        for pattern in [
            "a)(?:b", "a(", r"\C", "(?x)a", "(?u)a", "[+--]", "a{1001}", "[", r"a\", r"\E1",
        ] {
            assert!(whole(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn replacements_name_groups() {
        let pattern = part("/rr/([^/]+)/(.*)").unwrap();
        let with = replacement(r"/new/\2/\1$1\\", &pattern).unwrap();
        let out = pattern.replace_all(b"/rr/a/b/c", with.as_slice());
        assert_eq!(out.as_ref(), br"/new/b/c/a$1\".as_slice());
        assert!(replacement(r"\3", &pattern).is_err());
        assert!(replacement(r"\x", &pattern).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_pattern_compiles_or_is_refused(pattern in "\\PC{0,30}", text in "\\PC{0,30}") {
            if let Ok(regex) = whole(&pattern) {
                regex.is_match(text.as_bytes());
            }
        }

        #[test]
        fn a_quoted_text_matches_itself(text in "[^\\\\]{0,20}") {
            let quoted = format!(r"\Q{text}\E");
            proptest::prop_assert!(holds(&quoted, &text));
        }
    }
}
