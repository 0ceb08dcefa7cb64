//! The request as routes and rules look at it.

use std::net::IpAddr;

use crate::config::model::HttpManager;
use crate::http1::client_cert;
use crate::http1::head::FieldKind;
use crate::http1::rewrite;
use crate::route::RequestView;
use crate::tls::Connection;
use crate::worker::Buffers;

/// A request whose head stands in the buffers.
pub(super) struct View<'a> {
    buffers: &'a Buffers,
    /// The host of an HTTP/1.0 request that names none.
    host: Option<&'a [u8]>,
    tls: bool,
    /// The client's own `x-forwarded-client-cert` is not believed: it is as if it were not there.
    hides_client_cert: bool,
}

impl<'a> View<'a> {
    pub(super) fn new(
        buffers: &'a Buffers,
        host: Option<&'a [u8]>,
        manager: &HttpManager,
        connection: &Connection,
    ) -> Self {
        Self {
            buffers,
            host,
            tls: connection.tls,
            hides_client_cert: !client_cert::passes(manager.policy.client_cert, connection),
        }
    }
}

impl RequestView for View<'_> {
    fn host(&self) -> &[u8] {
        let head = self.buffers.request_in.head();
        self.host
            .unwrap_or_else(|| self.buffers.request.authority.of_head(head))
    }

    fn path(&self) -> &[u8] {
        rewrite::path(self.buffers)
    }

    fn method(&self) -> &[u8] {
        self.buffers
            .request
            .method
            .of_head(self.buffers.request_in.head())
    }

    fn scheme(&self) -> &[u8] {
        let mut forwarded = None;
        self.each_header(b"x-forwarded-proto", &mut |value| {
            let known = value.eq_ignore_ascii_case(b"http") || value.eq_ignore_ascii_case(b"https");
            forwarded = forwarded.or_else(|| known.then_some(value));
        });
        forwarded.unwrap_or(if self.tls { b"https" } else { b"http" })
    }

    fn each_header<'a>(&'a self, name: &[u8], see: &mut dyn FnMut(&'a [u8])) {
        let head = self.buffers.request_in.head();
        for field in &self.buffers.request.fields.fields {
            let hidden = self.hides_client_cert && field.kind == FieldKind::ClientCert;
            if !hidden && field.name.of_head(head) == name {
                see(field.value.of_head(head));
            }
        }
    }
}

/// Who the request says it comes from: the last address of `x-forwarded-for`, as hops inside a mesh are believed.
pub(super) fn forwarded_for(buffers: &Buffers) -> Option<IpAddr> {
    let head = buffers.request_in.head();
    let fields = buffers.request.fields.fields.iter();
    let last = fields.rev().find(|f| f.kind == FieldKind::ForwardedFor)?;
    let text = last.value.of_head(head);
    let text = text.rsplit(|b| *b == b',').next()?.trim_ascii();
    std::str::from_utf8(text).ok()?.parse().ok()
}
