//! A small endpoint, a small client, and a proxy between them.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dpumesh_proxy::program::{Options, Proxy};

/// A message as read from a socket.
#[derive(Debug, Default, Clone)]
pub(crate) struct Message {
    pub(crate) first: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Message {
    pub(crate) fn status(&self) -> u16 {
        self.first
            .split(' ')
            .nth(1)
            .and_then(|s| s.parse().ok())
            .unwrap_or_default()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Reads one message; `None` at the end of the stream. A body without length lasts until the stream ends.
pub(crate) fn read_message(
    from: &mut impl BufRead,
    no_body: bool,
    until_close: bool,
) -> io::Result<Option<Message>> {
    let mut message = Message::default();
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    message.first = line.trim_end().to_owned();
    loop {
        line.clear();
        if from.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let trimmed = line.trim_end();
        if trimmed.is_empty() {
            break;
        }
        let (name, value) = trimmed.split_once(": ").unwrap_or((trimmed, ""));
        message.headers.insert(name.to_owned(), value.to_owned());
    }
    if no_body {
        return Ok(Some(message));
    }
    if message.header("transfer-encoding") == Some("chunked") {
        loop {
            line.clear();
            from.read_line(&mut line)?;
            let size = usize::from_str_radix(line.trim_end(), 16).map_err(io::Error::other)?;
            let mut chunk = vec![0; size + 2];
            from.read_exact(&mut chunk)?;
            if size == 0 {
                break;
            }
            message.body.extend_from_slice(&chunk[..size]);
        }
    } else if let Some(length) = message.header("content-length") {
        message.body = vec![0; length.parse().map_err(io::Error::other)?];
        from.read_exact(&mut message.body)?;
    } else if until_close {
        from.read_to_end(&mut message.body)?;
    }
    Ok(Some(message))
}

/// An endpoint. What it answers is chosen by the path; every answer names the endpoint and repeats the request's head.
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    pub(crate) requests: Arc<AtomicUsize>,
    pub(crate) connections: Arc<AtomicUsize>,
}

impl Endpoint {
    pub(crate) fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, connections) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (seen, opened) = (Arc::clone(&requests), Arc::clone(&connections));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                opened.fetch_add(1, Ordering::SeqCst);
                let seen = Arc::clone(&seen);
                let serve = move || {
                    // A broken connection ends the thread; the test sees it from the other side.
                    let _ = answer_all(name, stream, &seen);
                };
                std::thread::Builder::new()
                    .stack_size(128 * 1024)
                    .spawn(serve)
                    .unwrap();
            }
        });
        Self {
            address,
            requests,
            connections,
        }
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn answer_all(name: &str, stream: TcpStream, seen: &AtomicUsize) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_message(&mut reader, false, false)? {
        seen.fetch_add(1, Ordering::SeqCst);
        let path = request.first.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut head = format!("{}\n", request.first);
        for (name, value) in &request.headers {
            head.push_str(&format!("{name}: {value}\n"));
        }
        let is_head = request.first.starts_with("HEAD ");
        let plain = |writer: &mut TcpStream, status: &str, body: &[u8]| -> io::Result<()> {
            let length = body.len();
            write!(
                writer,
                "HTTP/1.1 {status}\r\nX-Endpoint: {name}\r\nContent-Length: {length}\r\n\r\n"
            )?;
            if is_head { Ok(()) } else { writer.write_all(body) }
        };
        match path.split('?').next().unwrap_or_default() {
            "/echo" => plain(&mut writer, "200 OK", &request.body)?,
            "/length" => plain(&mut writer, "200 OK", request.body.len().to_string().as_bytes())?,
            "/big" => plain(&mut writer, "200 OK", &pattern(50 << 20))?,
            "/chunked" => {
                write!(writer, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                for part in ["one ", "two ", "three"] {
                    write!(writer, "{:x};note=\"a b\"\r\n{part}\r\n", part.len())?;
                    writer.flush()?;
                }
                write!(writer, "0\r\nx-trailer: dropped\r\n\r\n")?;
            }
            "/until-close" => {
                write!(writer, "HTTP/1.1 200 OK\r\n\r\nall that comes")?;
                return Ok(());
            }
            "/hang" => std::thread::sleep(Duration::from_secs(5)),
            "/hang-up" => return Ok(()),
            "/truncate" => {
                write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")?;
                return Ok(());
            }
            "/ambiguous" => {
                write!(
                    writer,
                    "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                )?;
            }
            "/close-after" => {
                plain(&mut writer, "200 OK", b"last")?;
                return Ok(());
            }
            "/interim" => {
                write!(writer, "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")?;
                plain(&mut writer, "200 OK", b"final")?;
            }
            "/status" => {
                let status = path.split('?').nth(1).unwrap_or("200");
                plain(&mut writer, &format!("{status} Some"), b"asked for")?;
            }
            // 503 until this endpoint has seen so many requests; then what /echo does.
            "/until" => {
                let wanted: usize = path.split('?').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
                if seen.load(Ordering::SeqCst) < wanted {
                    plain(&mut writer, "503 Some", b"not yet")?;
                } else {
                    let count = request.header("x-envoy-attempt-count").unwrap_or("none");
                    let body = [count.as_bytes(), b" ", &request.body].concat();
                    plain(&mut writer, "200 OK", &body)?;
                }
            }
            // Closes the connection, or says nothing for a second, until so many requests were seen.
            "/close-until" | "/silent-until" => {
                let wanted: usize = path.split('?').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
                if seen.load(Ordering::SeqCst) < wanted {
                    if path.starts_with("/silent") {
                        std::thread::sleep(Duration::from_secs(1));
                    }
                    return Ok(());
                }
                plain(&mut writer, "200 OK", &request.body)?;
            }
            "/no-content" => write!(writer, "HTTP/1.1 204 No Content\r\n\r\n")?,
            _ => plain(&mut writer, "200 OK", head.as_bytes())?,
        }
    }
    Ok(())
}

/// Octets whose place can be checked.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(31) >> 3) as u8).collect()
}

/// A client connection.
pub(crate) struct Client {
    pub(crate) reader: BufReader<TcpStream>,
}

impl Client {
    pub(crate) fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            reader: BufReader::new(stream),
        }
    }

    pub(crate) fn send(&mut self, octets: impl AsRef<[u8]>) {
        self.reader.get_mut().write_all(octets.as_ref()).unwrap();
    }

    pub(crate) fn receive(&mut self) -> Message {
        self.try_receive().unwrap().expect("a response")
    }

    pub(crate) fn try_receive(&mut self) -> io::Result<Option<Message>> {
        read_message(&mut self.reader, false, true)
    }

    pub(crate) fn get(&mut self, path: &str) -> Message {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"));
        self.receive()
    }

    /// Whether the proxy closed the connection (all that is left is read).
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.reader.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

/// A bootstrap with one HTTP listener `web`; `routes` is the YAML list of routes, `clusters` the YAML list of clusters.
pub(crate) fn bootstrap(routes: &str, clusters: &str, extra: &str) -> String {
    bootstrap_with(routes, clusters, extra, "", "")
}

/// The same with `filters` (YAML list items in flow form, each on a line) before the router, and `host` beside the
/// virtual host's domains.
pub(crate) fn bootstrap_with(routes: &str, clusters: &str, extra: &str, filters: &str, host: &str) -> String {
    format!(
        r#"
node: {{id: test, cluster: test}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
  - name: web
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: web
          {extra}
          route_config:
            name: routes
            virtual_hosts:
            - name: all
              domains: ["*"]
              {host}
              routes: {routes}
          http_filters:
          {filters}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters: {clusters}
"#
    )
}

/// A STATIC cluster in YAML's flow form.
pub(crate) fn cluster(name: &str, endpoints: &[SocketAddr], more: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|e| lb_endpoint(*e)).collect();
    format!(
        "{{name: {name}, type: STATIC, connect_timeout: 1s{more}, load_assignment: {{cluster_name: {name}, \
         endpoints: [{{lb_endpoints: [{}]}}]}}}}",
        endpoints.join(", ")
    )
}

pub(crate) fn lb_endpoint(address: SocketAddr) -> String {
    let (ip, port) = (address.ip(), address.port());
    format!("{{endpoint: {{address: {{socket_address: {{address: \"{ip}\", port_value: {port}}}}}}}}}")
}

/// The usual bootstrap: everything to one endpoint.
pub(crate) fn simple(endpoint: SocketAddr, extra: &str) -> String {
    let routes = "[{match: {prefix: /}, route: {cluster: app}}]";
    bootstrap(routes, &format!("[{}]", cluster("app", &[endpoint], "")), extra)
}

/// A proxy started from text; its files live in `folder`.
pub(crate) struct Running {
    pub(crate) proxy: Proxy,
    pub(crate) folder: tempfile::TempDir,
}

impl Running {
    pub(crate) fn start(bootstrap: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), bootstrap, 1)
    }

    pub(crate) fn start_in(folder: tempfile::TempDir, bootstrap: &str, concurrency: usize) -> Self {
        Self::start_with(folder, bootstrap, concurrency, Duration::from_secs(3))
    }

    pub(crate) fn start_in_netns(bootstrap: &str, netns: std::path::PathBuf) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bootstrap.yaml");
        std::fs::write(&path, bootstrap).unwrap();
        let options = Options {
            stack_netns: Some(netns),
            concurrency: 2,
            ..Options::new(path)
        };
        let proxy = Proxy::start(options).unwrap_or_else(|e| panic!("{e}\n{bootstrap}"));
        Self { proxy, folder }
    }

    pub(crate) fn start_with(
        folder: tempfile::TempDir,
        bootstrap: &str,
        concurrency: usize,
        drain_time: Duration,
    ) -> Self {
        let path = folder.path().join("bootstrap.yaml");
        std::fs::write(&path, bootstrap).unwrap();
        let options = Options {
            concurrency,
            drain_time,
            ..Options::new(path)
        };
        let proxy = Proxy::start(options).unwrap_or_else(|e| panic!("{e}\n{bootstrap}"));
        Self { proxy, folder }
    }

    pub(crate) fn start_with_secrets(
        bootstrap: &str,
        secrets: std::sync::Arc<dyn dpumesh_proxy::tls::Secrets>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bootstrap.yaml");
        std::fs::write(&path, bootstrap).unwrap();
        let options = Options {
            secrets: Some(secrets),
            ..Options::new(path)
        };
        let proxy = Proxy::start(options).unwrap_or_else(|e| panic!("{e}\n{bootstrap}"));
        Self { proxy, folder }
    }

    pub(crate) fn web(&self) -> SocketAddr {
        self.proxy.listener_address("web").unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.web())
    }

    pub(crate) fn stat(&self, name: &str) -> u64 {
        self.proxy
            .stat(name)
            .unwrap_or_else(|| panic!("no counter {name}"))
    }

    pub(crate) fn admin(&self, method: &str, path: &str) -> Message {
        let mut client = Client::connect(self.proxy.admin_address().unwrap());
        client.send(format!(
            "{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
        ));
        client.receive()
    }

    /// Waits until a counter has reached a value.
    pub(crate) fn await_stat(&self, name: &str, at_least: u64) {
        await_true(&format!("{name} >= {at_least}"), || self.stat(name) >= at_least);
    }
}

pub(crate) fn await_true(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Replaces a file as a whole.
pub(crate) fn replace(path: &Path, text: &str) {
    let fresh = path.with_extension("fresh");
    std::fs::write(&fresh, text).unwrap();
    std::fs::rename(&fresh, path).unwrap();
}
