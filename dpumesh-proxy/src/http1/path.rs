//! Brings a request's path into one form, so that a rule about `/admin` is not passed by `/x/../admin` or `/%61dmin`.
//!
//! Follows Envoy: first escaped slashes, then dot segments and encoding (as the URL library of Chromium does it), then
//! adjacent slashes. The query is not touched. A path that is in that form already costs one look at each octet.

use super::policy::{EscapedSlashes, PathPolicy};

/// Why a path is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

const PASS: u8 = 0;
/// Written in clear, even where it came encoded.
const CLEAR: u8 = 1;
/// Always encoded.
const ENCODE: u8 = 2;

const KIND: [u8; 256] = {
    let mut kind = [PASS; 256];
    let mut octet = 0;
    while octet < 256 {
        let c = octet as u8;
        kind[octet] = match c {
            b'-' | b'.' | b'_' | b'~' => CLEAR,
            c if c.is_ascii_alphanumeric() => CLEAR,
            b' ' | b'"' | b'#' | b'<' | b'>' | b'?' | b'^' | b'`' | b'{' | b'|' | b'}' => ENCODE,
            0..=0x1f | 0x7f..=0xff => ENCODE,
            _ => PASS,
        };
        octet += 1;
    }
    kind
};

/// The path in its one form; `None` when it is already.
///
/// # Errors
/// It cannot be brought into that form, or the policy refuses it.
pub fn normalized(path: &[u8], policy: PathPolicy) -> Result<Option<Vec<u8>>, Refused> {
    if policy == PathPolicy::default() || path.first() != Some(&b'/') {
        return Ok(None);
    }
    let end = path.iter().position(|b| *b == b'?').unwrap_or(path.len());
    let (bare, query) = path.split_at(end);
    if !is_suspect(bare) {
        return Ok(None);
    }
    let mut fresh = bare.to_vec();
    if policy.escaped_slashes != EscapedSlashes::Keep {
        let unescaped = unescape_slashes(&fresh);
        if unescaped != fresh && policy.escaped_slashes == EscapedSlashes::Reject {
            return Err(Refused);
        }
        fresh = unescaped;
    }
    if policy.normalize {
        fresh = canonical(&fresh)?;
    }
    if policy.merge_slashes {
        fresh.dedup_by(|b, a| *a == b'/' && *b == b'/');
    }
    if fresh == bare {
        return Ok(None);
    }
    fresh.extend_from_slice(query);
    Ok(Some(fresh))
}

/// Whether the path might not be in its form: the quick look.
fn is_suspect(bare: &[u8]) -> bool {
    let mut before = 0;
    bare.iter().any(|octet| {
        let here = before == b'/' && matches!(octet, b'.' | b'/');
        before = *octet;
        here || matches!(octet, b'%' | b'\\') || KIND[usize::from(*octet)] == ENCODE
    })
}

fn unescape_slashes(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        let (octet, after) = match rest {
            [b'%', b'2', b'f' | b'F', after @ ..] => (b'/', after),
            [b'%', b'5', b'c' | b'C', after @ ..] => (b'\\', after),
            _ => (*first, after),
        };
        out.push(octet);
        rest = after;
    }
    out
}

fn canonical(path: &[u8]) -> Result<Vec<u8>, Refused> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out: Vec<u8> = Vec::with_capacity(path.len() + 8);
    let mut rest = path;
    // Where the last `%` went that begins no escape.
    let mut stray = None;
    while let Some((first, after)) = rest.split_first() {
        if out.last() == Some(&b'/')
            && let Some((dots, length)) = dot_segment(rest)
        {
            if dots == 2 {
                out.pop();
                let parent = out.iter().rposition(|b| *b == b'/').unwrap_or(0);
                out.truncate(parent);
                stray = stray.filter(|at| *at < parent);
                out.push(b'/');
            }
            rest = &rest[length..];
            continue;
        }
        rest = after;
        match first {
            b'\\' => out.push(b'/'),
            b'%' => match decoded(after) {
                Some(0) => return Err(Refused),
                Some(octet) => {
                    if KIND[usize::from(octet)] == CLEAR {
                        // `%2%65` would become an escape that nobody has looked at: `%2e`.
                        let behind = stray.map(|at| &out[at + 1..]);
                        let begun =
                            behind.is_some_and(|b| b.len() < 2 && b.iter().all(u8::is_ascii_hexdigit));
                        if begun && octet.is_ascii_hexdigit() {
                            return Err(Refused);
                        }
                        out.push(octet);
                    } else {
                        out.extend_from_slice(&[b'%', after[0], after[1]]);
                    }
                    rest = &after[2..];
                }
                None => {
                    stray = Some(out.len());
                    out.push(b'%');
                }
            },
            octet if KIND[usize::from(*octet)] == ENCODE => {
                let (high, low) = (usize::from(octet >> 4), usize::from(octet & 15));
                out.extend_from_slice(&[b'%', HEX[high], HEX[low]]);
            }
            octet => out.push(*octet),
        }
    }
    Ok(out)
}

/// `.` or `..` as a whole segment at the beginning of `rest`, dots encoded or not: how many dots, and how many octets
/// up to and with the slash behind.
fn dot_segment(rest: &[u8]) -> Option<(usize, usize)> {
    let (mut dots, mut at) = (0, 0);
    while dots < 2 {
        match &rest[at..] {
            [b'.', ..] => at += 1,
            [b'%', b'2', b'e' | b'E', ..] => at += 3,
            _ => break,
        }
        dots += 1;
    }
    match (dots, rest.get(at)) {
        (0, _) => None,
        (_, None) => Some((dots, at)),
        (_, Some(b'/' | b'\\')) => Some((dots, at + 1)),
        _ => None,
    }
}

fn decoded(after: &[u8]) -> Option<u8> {
    let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
    u8::try_from(digit(0)? * 16 + digit(1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: PathPolicy = PathPolicy {
        normalize: true,
        merge_slashes: false,
        escaped_slashes: EscapedSlashes::Keep,
    };

    fn form(path: &str, policy: PathPolicy) -> Option<String> {
        let form = normalized(path.as_bytes(), policy).ok()?;
        Some(form.map_or_else(|| path.to_owned(), |f| String::from_utf8(f).unwrap()))
    }

    #[test]
    fn paths_get_one_form() {
        for (path, wanted) in [
            ("/", "/"),
            ("/a/b.c/.d/..e?x=/../", "/a/b.c/.d/..e?x=/../"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/../../b", "/b"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/a/b/%2e%2E/c", "/a/c"),
            ("/a/.%2e/c", "/c"),
            ("/%61dmin", "/admin"),
            ("/%2F%3f%zz%", "/%2F%3f%zz%"),
            ("/a\\..\\b", "/b"),
            ("/a|b{c}", "/a%7Cb%7Bc%7D"),
            ("/a//b", "/a//b"),
            ("/a//../b", "/a/b"),
            ("/a/...", "/a/..."),
            ("/a.?%61", "/a.?%61"),
        ] {
            assert_eq!(form(path, BASE).as_deref(), Some(wanted), "{path}");
        }
        for refused in [
            "/a%00",
            "/%2%65",
            "/%%65a",
            "/%5%41",
            "/%%32%65",
            "/x/%2%65%2%65/admin",
            "/%2%66",
        ] {
            assert_eq!(form(refused, BASE), None, "{refused}");
        }
        for (path, wanted) in [
            ("/%2%70", "/%2p"),
            ("/%%/%41", "/%%/A"),
            ("/%z%41", "/%zA"),
            ("/%2/../%41", "/A"),
        ] {
            assert_eq!(form(path, BASE).as_deref(), Some(wanted), "{path}");
        }
    }

    #[test]
    fn slashes_are_merged_and_unescaped_where_asked() {
        let merge = PathPolicy {
            merge_slashes: true,
            ..BASE
        };
        assert_eq!(form("//a///b/?//", merge).as_deref(), Some("/a/b/?//"));
        let unescape = PathPolicy {
            escaped_slashes: EscapedSlashes::Unescape,
            ..merge
        };
        assert_eq!(form("/a%2f%2Fb%5cc", unescape).as_deref(), Some("/a/b/c"));
        let reject = PathPolicy {
            escaped_slashes: EscapedSlashes::Reject,
            ..BASE
        };
        assert_eq!(form("/a%2fb", reject), None);
        assert_eq!(form("/a?%2fb", reject).as_deref(), Some("/a?%2fb"));
        assert_eq!(form("/a/../b", PathPolicy::default()).as_deref(), Some("/a/../b"));
        assert_eq!(form("*", BASE).as_deref(), Some("*"));
    }

    proptest::proptest! {
        #[test]
        fn the_form_of_a_form_is_itself(path in "/[a-c./%2456eE\\\\|]{0,24}") {
            let all = PathPolicy { merge_slashes: true, ..BASE };
            if let Some(once) = form(&path, all) {
                proptest::prop_assert!(!once.split('/').any(|s| s == "." || s == ".."));
                // Decoding may uncover an encoded octet (%2561 stays %2561), never a dot segment.
                let again = form(&once, all).expect("a form has a form");
                proptest::prop_assert_eq!(again, once);
            }
        }
    }
}
