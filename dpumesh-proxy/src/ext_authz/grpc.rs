//! The question and its answer in `envoy.service.auth.v3`'s messages.

use std::net::SocketAddr;
use std::time::SystemTime;

use prost::Message;

use super::message::{
    Address, AttributeContext, CheckRequest, CheckResponse, Denied, HeaderOption, HttpRequest, HttpResponse,
    Passed, Peer, Request, SocketAddress, TlsSession,
};
use super::{Changes, Decision, Denial, Filter, Question, header, status};
use crate::route::{AddHeader, AddHow};
use crate::tls::{LocalIdentity, PeerIdentity};

fn text(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

/// The encoded `CheckRequest`.
pub(crate) fn check_request(filter: &Filter, question: &Question<'_>) -> Vec<u8> {
    let mut http = HttpRequest {
        id: question.id.clone(),
        method: text(question.method),
        path: text(question.path),
        host: text(question.host),
        scheme: text(question.scheme),
        size: question.size,
        protocol: question.protocol.to_owned(),
        ..HttpRequest::default()
    };
    for (name, value) in question.told(filter) {
        let value = text(value);
        http.headers
            .entry(text(name))
            .and_modify(|known| *known = format!("{known},{value}"))
            .or_insert(value);
    }
    if let Some((body, cut)) = question.body {
        http.headers
            .insert("x-envoy-auth-partial-body".to_owned(), cut.to_string());
        if question.as_bytes {
            http.raw_body = body.to_vec();
        } else {
            http.body = text(body);
        }
    }
    let tls = &question.connection;
    let peer = |address: SocketAddr, principal: String| Peer {
        address: Some(Address {
            socket_address: Some(SocketAddress {
                address: address.ip().to_canonical().to_string(),
                port_value: address.port().into(),
            }),
        }),
        principal,
        ..Peer::default()
    };
    let request = CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(Peer {
                service: text(question.service),
                ..peer(
                    question.client,
                    tls.peer.as_deref().map(client_name).unwrap_or_default(),
                )
            }),
            destination: Some(peer(
                question.local,
                tls.local.as_deref().map(local_name).unwrap_or_default(),
            )),
            request: Some(Request {
                time: Some(SystemTime::now().into()),
                http: Some(http),
            }),
            context_extensions: question.context.iter().cloned().collect(),
            tls_session: tls
                .server_name
                .as_ref()
                .filter(|_| filter.tls_session)
                .map(|name| TlsSession {
                    sni: name.to_string(),
                }),
        }),
    };
    request.encode_to_vec()
}

/// URI name, DNS name, subject: the first there is.
fn client_name(peer: &PeerIdentity) -> String {
    first(&peer.uri_sans, &peer.dns_sans, &peer.subject)
}

fn local_name(local: &LocalIdentity) -> String {
    first(&local.uri_sans, &local.dns_sans, &local.subject)
}

fn first(uris: &[String], names: &[String], subject: &String) -> String {
    uris.first().or_else(|| names.first()).unwrap_or(subject).clone()
}

/// What an encoded `CheckResponse` means.
pub(crate) fn decision(message: &[u8]) -> Decision {
    let Ok(response) = CheckResponse::decode(message) else {
        return Decision::Failed(None);
    };
    let passes = response.status.is_none_or(|status| status.code == 0);
    match response.http_response {
        Some(HttpResponse::Error(error)) => Decision::Failed(error.status.map(|s| status(s.code))),
        Some(HttpResponse::Ok(ok)) if passes => Decision::Passed(changes(ok)),
        _ if passes => Decision::Passed(Changes::default()),
        Some(HttpResponse::Denied(denied)) => Decision::Denied(denial(&denied)),
        _ => Decision::Denied(denial(&Denied::default())),
    }
}

fn denial(denied: &Denied) -> Denial {
    Denial {
        status: status(denied.status.as_ref().map_or(0, |s| s.code)),
        headers: headers(&denied.headers, AddHow::Overwrite),
        body: denied.body.as_bytes().to_vec(),
    }
}

fn changes(ok: Passed) -> Changes {
    let pairs = ok.query_parameters_to_set.into_iter();
    let (joined, request) = headers(&ok.headers, AddHow::Overwrite)
        .into_iter()
        .partition(|header| header.how == AddHow::Append);
    Changes {
        remove: ok
            .headers_to_remove
            .iter()
            .map(|name| name.to_ascii_lowercase().into_bytes())
            .filter(|name| crate::route::may_change(name))
            .collect(),
        request,
        joined,
        response: headers(&ok.response_headers_to_add, AddHow::Append),
        query_set: pairs.map(|p| (p.key, p.value)).collect(),
        query_remove: ok.query_parameters_to_remove,
    }
}

/// Headers of an answer; what says nothing of how it is added is added as `otherwise`.
fn headers(options: &[HeaderOption], otherwise: AddHow) -> Vec<AddHeader> {
    let one = |option: &HeaderOption| {
        let how = match (option.append, option.append_action) {
            (Some(true), _) => AddHow::Append,
            (Some(false), _) => AddHow::Overwrite,
            (None, 1) => AddHow::IfAbsent,
            (None, 2) => AddHow::Overwrite,
            (None, 3) => AddHow::OverwriteIfExists,
            (None, _) => otherwise,
        };
        let pair = option.header.as_ref()?;
        let value = if pair.raw_value.is_empty() {
            pair.value.as_bytes()
        } else {
            &pair.raw_value
        };
        header(pair.key.as_bytes(), value, how)
    };
    options.iter().filter_map(one).collect()
}
