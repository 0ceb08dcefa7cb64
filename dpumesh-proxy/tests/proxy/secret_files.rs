//! Secrets from files (`sds_config.path_config_source`) that change while connections are open.

use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::envoy::{Subject, at_both};
use crate::harness::{Endpoint, Message, await_true, read_message, replace, simple};
use crate::mesh::Authority;

const SERVER: &str = "spiffe://td/ns/shop/sa/web";
const CLIENT: &str = "spiffe://td/ns/shop/sa/client";
const TYPES: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";

fn certificate(authority: &Authority) -> String {
    let (chain, key) = authority.leaf_named(SERVER, Some("test"));
    format!(
        "resources:\n- {{\"@type\": {TYPES}.Secret, name: web, tls_certificate: {{certificate_chain: {{inline_string: {chain:?}}}, \
         private_key: {{inline_string: {key:?}}}}}}}\n"
    )
}

fn roots(authority: &Authority) -> String {
    format!(
        "resources:\n- {{\"@type\": {TYPES}.Secret, name: ROOTCA@td, validation_context: {{trusted_ca: {{inline_string: {:?}}}}}}}\n",
        authority.root
    )
}

/// A listener with mutual TLS whose certificate and roots are files of this folder.
fn bootstrap(endpoint: &Endpoint, folder: &str) -> String {
    let sds = |name: &str, file: &str| {
        format!("{{name: {name}, sds_config: {{path_config_source: {{path: {folder}/{file}}}}}}}")
    };
    simple(endpoint.address, "").replace(
        "    filter_chains:\n    - filters:",
        &format!(
            "    filter_chains:\n    - transport_socket: {{name: tls, typed_config: {{\"@type\": {TYPES}.DownstreamTlsContext, \
             require_client_certificate: true, common_tls_context: {{tls_certificate_sds_secret_configs: [{}], \
             validation_context_sds_secret_config: {}}}}}}}\n      filters:",
            sds("web", "web.yaml"),
            sds("ROOTCA@td", "roots.yaml"),
        ),
    )
}

type Connection = StreamOwned<ClientConnection, TcpStream>;

/// A connection as a client of `authority`, which trusts these roots; the first request is answered.
fn connect(subject: &Subject, authority: &Authority, trusted: &str) -> Result<Connection, String> {
    let mut store = RootCertStore::empty();
    store
        .add(CertificateDer::from_pem_slice(trusted.as_bytes()).unwrap())
        .unwrap();
    let (chain, key) = authority.leaf(CLIENT);
    let chain = vec![CertificateDer::from_pem_slice(chain.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(store)
        .with_client_auth_cert(chain, key)
        .unwrap();
    let session = ClientConnection::new(Arc::new(config), "test".try_into().unwrap()).unwrap();
    let mut connection = StreamOwned::new(session, TcpStream::connect(subject.web()).unwrap());
    get(&mut connection)?;
    Ok(connection)
}

fn get(connection: &mut Connection) -> Result<(), String> {
    let mut ask = || -> std::io::Result<Option<Message>> {
        connection.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")?;
        read_message(&mut BufReader::new(&mut *connection), false, false)
    };
    match ask() {
        Ok(Some(answer)) if answer.status() == 200 && answer.header("connection").is_none() => Ok(()),
        Ok(answer) => Err(answer.map_or_else(|| "closed".to_owned(), |answer| answer.text())),
        Err(error) => Err(error.to_string()),
    }
}

fn shown(connection: &Connection) -> Vec<u8> {
    connection.conn.peer_certificates().unwrap()[0].to_vec()
}

#[test]
fn a_secret_file_that_changes_serves_the_next_handshake_and_drains_nothing() {
    let (old, new) = (Authority::new(), Authority::new());
    at_both(
        |endpoint, folder| {
            std::fs::write(format!("{folder}/web.yaml"), certificate(&old)).unwrap();
            std::fs::write(format!("{folder}/roots.yaml"), roots(&old)).unwrap();
            bootstrap(endpoint, folder)
        },
        |subject, _| {
            let folder = subject.folder().to_owned();
            let put = |file: &str, text: &str| replace(&folder.join(file), text);
            let mut first = None;
            await_true("the first secrets", || {
                first = connect(subject, &old, &old.root).ok();
                first.is_some()
            });
            let mut first = first.unwrap();
            assert!(connect(subject, &new, &old.root).is_err(), "a foreign client");

            put("web.yaml", &certificate(&old));
            let mut second = None;
            await_true("another certificate", || {
                second = connect(subject, &old, &old.root).ok();
                second.as_ref().is_some_and(|c| shown(c) != shown(&first))
            });
            get(&mut first).unwrap();

            // The roots: clients of the old authority are strangers from then on; who is connected stays.
            put("roots.yaml", &roots(&new));
            await_true("other roots", || connect(subject, &new, &old.root).is_ok());
            assert!(connect(subject, &old, &old.root).is_err(), "a client of before");
            get(&mut first).unwrap();
            get(&mut second.unwrap()).unwrap();
            refused_files_change_nothing(subject, &folder, &new, &old);
        },
    );
}

fn refused_files_change_nothing(subject: &Subject, folder: &Path, client: &Authority, server: &Authority) {
    let good = std::fs::read_to_string(folder.join("web.yaml")).unwrap();
    let cut = &good[..good.len() / 2];
    let other = good.replace("name: web", "name: other");
    let before = shown(&connect(subject, client, &server.root).unwrap());
    for (text, reason) in [
        (cut, "web.yaml"),
        (other.as_str(), "no secret \"web\" with a tls_certificate"),
    ] {
        replace(&folder.join("web.yaml"), text);
        if matches!(subject, Subject::Ours(_)) {
            await_true("it is said", || {
                subject
                    .admin("/config_dump")
                    .contains(&reason.replace('"', "\\\""))
            });
        }
        let now = connect(subject, client, &server.root).unwrap();
        assert_eq!(shown(&now), before, "{reason}");
    }
    replace(&folder.join("web.yaml"), &good);
    if matches!(subject, Subject::Ours(_)) {
        await_true("nothing is refused", || {
            !subject.admin("/config_dump").contains("no secret")
        });
    }
}
