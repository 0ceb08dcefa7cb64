//! Connections through the TCP proxy.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crate::harness::{Running, cluster, pattern};

fn start(endpoint: SocketAddr, extra: &str) -> Running {
    Running::start(&format!(
        r#"
static_resources:
  listeners:
  - name: web
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: t
          cluster: app
          {extra}
  clusters: [{}]
"#,
        cluster("app", &[endpoint], "")
    ))
}

fn pair(running: &Running, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(running.web()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    (client, server)
}

#[test]
fn octets_pass_both_ways_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = start(listener.local_addr().unwrap(), "");
    let (client, server) = pair(&running, &listener);
    let data = pattern(20 << 20);
    let send = |mut stream: TcpStream, data: Vec<u8>| {
        std::thread::spawn(move || {
            stream.write_all(&data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let senders = [
        send(client.try_clone().unwrap(), data.clone()),
        send(server.try_clone().unwrap(), data.clone()),
    ];
    let receive = |mut stream: TcpStream| {
        std::thread::spawn(move || {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all
        })
    };
    let receivers = [receive(client), receive(server)];
    for receiver in receivers {
        assert!(receiver.join().unwrap() == data);
    }
    senders.into_iter().for_each(|s| s.join().unwrap());
    running.await_stat("tcp.t.downstream_cx_rx_bytes_total", 20 << 20);
    assert_eq!(running.stat("tcp.t.downstream_cx_tx_bytes_total"), 20 << 20);
}

#[test]
fn a_half_closed_connection_goes_on_in_the_other_direction() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = start(listener.local_addr().unwrap(), "");
    let (mut client, mut server) = pair(&running, &listener);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    server.write_all(b"late ").unwrap();
    server.write_all(b"answer").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "late answer");
}

#[test]
fn a_reset_is_passed_on_in_both_directions() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = start(listener.local_addr().unwrap(), "");
    for from_client in [true, false] {
        let (mut client, mut server) = pair(&running, &listener);
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
        let (broken, mut other) = if from_client {
            (client, server)
        } else {
            (server, client)
        };
        socket2::SockRef::from(&broken)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(broken);
        let error = other.read(&mut [0]).unwrap_err();
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionReset,
            "from client: {from_client}"
        );
    }
}

#[test]
fn a_dead_endpoint_resets_the_client() {
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let running = start(dead, "");
    let mut client = TcpStream::connect(running.web()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(
        client.read(&mut [0]).unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    assert_eq!(running.stat("cluster.app.upstream_cx_connect_fail"), 1);
}

#[test]
fn an_idle_connection_is_closed_after_its_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = start(listener.local_addr().unwrap(), "idle_timeout: 0.1s");
    let (mut client, mut server) = pair(&running, &listener);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    running.await_stat("tcp.t.idle_timeout", 1);
}
