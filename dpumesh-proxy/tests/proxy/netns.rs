//! Workers in a network namespace of their own, the admin server outside; connections with the client's address.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use dpumesh_hw::netlink::sysctl;
use dpumesh_hw::netns::Namespace;

use crate::harness::{Client, Running, await_true, bootstrap, cluster, read_message};

/// A fresh namespace; `None` (said aloud) where none can be made.
fn fresh_namespace() -> Option<Namespace> {
    let made = Namespace::create();
    if let Err(error) = &made {
        println!("SKIP: {error}");
    }
    made.ok()
}

/// A connection from `source` whose packets bear `mark`: over loopback that is how they arrive.
fn connect_from(source: IpAddr, mark: u32, to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).unwrap();
    socket.set_mark(mark).unwrap();
    socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// An endpoint that answers with the address its client comes from.
fn whoami() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::spawn(move || {
                let peer = stream.peer_addr().unwrap();
                let mut writer = stream.try_clone().unwrap();
                let mut reader = std::io::BufReader::new(stream);
                while let Ok(Some(_)) = read_message(&mut reader, false, false) {
                    use std::io::Write;
                    let text = peer.to_string();
                    write!(
                        writer,
                        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
                        text.len()
                    )
                    .unwrap();
                }
            });
        }
    });
    address
}

/// A listener as interception needs it. The access log says who came by which port.
fn intercepting(endpoint: SocketAddr, log: &std::path::Path) -> String {
    let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
    let loggers = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog";
    let access_log = format!(
        "access_log: [{{name: f, typed_config: {{\"@type\": {loggers}, path: \"{}\", log_format: {{text_format_source: \
         {{inline_string: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% ingress=%FILTER_STATE(dpumesh.ingress:PLAIN)%\\n\"}}}}}}}}]",
        log.display()
    );
    let text = bootstrap(
        routes,
        &format!("[{}]", cluster("app", &[endpoint], "")),
        &access_log,
    );
    let kind = "type.googleapis.com/envoy.extensions.filters.listener";
    let listener = format!(
        "- name: web\n    transparent: true\n    listener_filters:\n    \
         - {{name: a, typed_config: {{\"@type\": {kind}.original_dst.v3.OriginalDst}}}}\n    \
         - {{name: b, typed_config: {{\"@type\": {kind}.original_src.v3.OriginalSrc, mark: 3}}}}"
    );
    text.replace("- name: web", &listener)
}

#[test]
fn connections_keep_the_clients_address_and_tell_the_port_they_came_in_by() {
    let Some(namespace) = fresh_namespace() else {
        return;
    };
    // As in a stack: an accepted socket has the mark of the packet that opened it.
    sysctl::set(&namespace, "ipv4/tcp_fwmark_accept", "1").unwrap();
    let endpoint = namespace.run(whoami).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    let running = Running::start_in_netns(&intercepting(endpoint, &log), namespace.path());
    // The third client claims the first one's address: the port tells.
    for (last, port) in [(77, 7), (78, 0), (77, 8)] {
        let source = IpAddr::from([127, 0, 0, last]);
        let stream = namespace
            .run(|| connect_from(source, port, running.web()))
            .unwrap();
        let mut client = Client {
            reader: std::io::BufReader::new(stream),
        };
        let first = client.get("/").text();
        assert!(first.starts_with(&format!("{source}:")), "{first}");
        assert_eq!(
            client.get("/").text(),
            first,
            "the pooled connection of this client serves again"
        );
    }
    // One for each client, or one more if two workers served the address that came twice.
    assert!((2..=3).contains(&running.stat("cluster.app.upstream_cx_total")));
    for port in [7, 8] {
        assert_eq!(running.stat(&format!("ingress.{port}.downstream_cx_total")), 1);
        let active = format!("ingress.{port}.downstream_cx_active");
        await_true("its connection is gone", || running.stat(&active) == 0);
    }
    let listed = running.admin("GET", "/ingress").text();
    assert!(listed.contains("ingress=7::downstream_cx_total::1\n"), "{listed}");
    assert!(!listed.contains("ingress=0"), "{listed}");
    let admin = running.proxy.admin_address().unwrap();
    let inside = namespace.run(|| TcpStream::connect(admin)).unwrap();
    assert!(inside.is_err(), "the admin server is not in the namespace");
    drop(running);
    let lines = std::fs::read_to_string(log).unwrap();
    for line in [
        "127.0.0.77 ingress=7",
        "127.0.0.78 ingress=-",
        "127.0.0.77 ingress=8",
    ] {
        assert_eq!(
            lines.lines().filter(|l| *l == line).count(),
            2,
            "{line} in {lines}"
        );
    }
}

#[test]
fn outside_a_stack_a_mark_says_nothing() {
    let Some(namespace) = fresh_namespace() else {
        return;
    };
    sysctl::set(&namespace, "ipv4/tcp_fwmark_accept", "1").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    namespace
        .run(|| {
            let running = Running::start(&intercepting(whoami(), &log));
            let stream = connect_from(IpAddr::from([127, 0, 0, 77]), 7, running.web());
            let mut client = Client {
                reader: std::io::BufReader::new(stream),
            };
            assert_eq!(client.get("/").status(), 200);
        })
        .unwrap();
    assert_eq!(std::fs::read_to_string(log).unwrap(), "127.0.0.77 ingress=-\n");
}
