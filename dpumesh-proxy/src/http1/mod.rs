//! HTTP/1.1 (RFC 9112), strictly: what can be read in two ways is refused, never repaired.
//!
//! [`head`] parses a message head in place, [`body`] moves a body from one connection to the other, [`reply`] is what the
//! proxy says by itself, [`path`] brings paths into one form, [`policy`] is what is done to requests besides routing
//! them, [`serve`] is the loop over one client connection.

pub mod body;
pub mod buffer;
mod client_cert;
mod copy;
pub mod fuzz;
pub mod head;
pub mod path;
pub mod policy;
pub mod reply;
mod rewrite;
pub mod serve;

pub(crate) use rewrite::uuid;

/// Whether a `content-type` is gRPC's.
pub fn is_grpc(content_type: &[u8]) -> bool {
    let rest = content_type.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// `tchar` of RFC 9110 §5.6.2.
pub fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
