//! The `location` of a redirect.

use crate::http1::rewrite::{self, Rewrite};
use crate::route::{Redirect, RedirectPath, Route};
use crate::worker::Buffers;

/// Where `redirect` sends the request.
pub(super) fn location(
    redirect: &Redirect,
    route: &Route,
    buffers: &Buffers,
    rewrite: &Rewrite<'_>,
) -> Vec<u8> {
    let head = buffers.request_in.head();
    let forwarded = buffers
        .request
        .fields
        .get(head, b"x-forwarded-proto")
        .filter(|p| *p == b"https" || *p == b"http");
    let scheme = redirect
        .scheme
        .as_ref()
        .map(String::as_bytes)
        .or(forwarded)
        .unwrap_or(b"http");
    let authority = rewrite
        .default_host
        .unwrap_or_else(|| buffers.request.authority.of_head(head));
    let path = rewrite::path(buffers);
    let bare = path.split(|b| *b == b'?').next().unwrap_or(path);
    let query = if redirect.strip_query {
        b"".as_slice()
    } else {
        &path[bare.len()..]
    };
    let mut out = Vec::with_capacity(64);
    out.extend_from_slice(scheme);
    out.extend_from_slice(b"://");
    match (&redirect.host, redirect.port) {
        (Some(host), None) => out.extend_from_slice(host.as_bytes()),
        (host, port) => {
            let host = host.as_ref().map_or(authority, |h| h.as_bytes());
            let colon = host
                .iter()
                .rposition(|b| *b == b':')
                .filter(|c| !host[*c..].contains(&b']'));
            let default: Option<&[u8]> = if scheme == b"https" { Some(b":80") } else { None };
            match port {
                Some(port) => {
                    out.extend_from_slice(&host[..colon.unwrap_or(host.len())]);
                    out.extend_from_slice(format!(":{port}").as_bytes());
                }
                None => {
                    let cut = colon.filter(|c| default == Some(&host[*c..]));
                    out.extend_from_slice(&host[..cut.unwrap_or(host.len())]);
                }
            }
        }
    }
    match &redirect.path {
        RedirectPath::Keep => out.extend_from_slice(bare),
        RedirectPath::Replace(path) => {
            out.extend_from_slice(path);
            if path.contains(&b'?') {
                return out;
            }
        }
        RedirectPath::Prefix(prefix) => {
            out.extend_from_slice(prefix);
            out.extend_from_slice(&bare[route.matcher.path.matched_len(bare).min(bare.len())..]);
        }
    }
    out.extend_from_slice(query);
    out
}
