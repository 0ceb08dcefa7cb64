//! Workers in a network namespace of their own, the admin server outside; connections with the client's address.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use crate::harness::{Client, Running, bootstrap, cluster, read_message};

/// Moves this thread into a fresh namespace with `lo` up; false (said aloud) where that is not allowed.
fn enter_fresh_namespace() -> bool {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        println!("SKIP: no network namespace can be made here: {error}");
        return false;
    }
    let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
    let netlink = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute).unwrap();
    // nlmsghdr: length 32, RTM_NEWLINK, request with acknowledgement; ifinfomsg: index 1, IFF_UP set, IFF_UP changed.
    let words: [u32; 8] = [32, 16 | (5 << 16), 1, 0, 0, 1, 1, 1];
    let message: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    use std::os::fd::AsRawFd;
    let fd = netlink.as_raw_fd();
    sendto(fd, &message, &NetlinkAddr::new(0, 0), MsgFlags::empty()).unwrap();
    let mut answer = [0; 256];
    let length = recv(fd, &mut answer, MsgFlags::empty()).unwrap();
    assert!(length >= 20 && answer[16..20] == [0; 4], "lo did not come up");
    true
}

/// A connection from `source`.
fn connect_from(source: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).unwrap();
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

#[test]
fn workers_live_in_the_namespace_and_connections_keep_the_clients_address() {
    std::thread::spawn(|| {
        let outside = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
        if !enter_fresh_namespace() {
            return;
        }
        let endpoint = whoami();
        let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
        let text = bootstrap(routes, &format!("[{}]", cluster("app", &[endpoint], "")), "");
        let kind = "type.googleapis.com/envoy.extensions.filters.listener";
        let listener = format!(
            "- name: web\n    transparent: true\n    listener_filters:\n    \
             - {{name: a, typed_config: {{\"@type\": {kind}.original_dst.v3.OriginalDst}}}}\n    \
             - {{name: b, typed_config: {{\"@type\": {kind}.original_src.v3.OriginalSrc, mark: 3}}}}"
        );
        let text = text.replace("- name: web", &listener);
        let namespace = format!("/proc/self/task/{}/ns/net", nix::unistd::gettid());
        let text = &text;
        let running = std::thread::scope(|scope| {
            // Started from outside the namespace, as a program would be.
            let start = move || {
                nix::sched::setns(outside, CloneFlags::CLONE_NEWNET).unwrap();
                Running::start_in_netns(text, namespace.into())
            };
            scope.spawn(start).join().unwrap()
        });
        for last in [77, 78] {
            let source = IpAddr::from([127, 0, 0, last]);
            let mut client = Client {
                reader: std::io::BufReader::new(connect_from(source, running.web())),
            };
            let first = client.get("/").text();
            assert!(first.starts_with(&format!("{source}:")), "{first}");
            assert_eq!(
                client.get("/").text(),
                first,
                "the pooled connection of this client serves again"
            );
        }
        assert_eq!(running.stat("cluster.app.upstream_cx_total"), 2);
        let admin = running.proxy.admin_address().unwrap();
        assert!(
            TcpStream::connect(admin).is_err(),
            "the admin server is not in the namespace"
        );
    })
    .join()
    .unwrap();
}
