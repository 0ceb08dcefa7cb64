//! Access logs: a format compiled once, lines rendered into a worker's own buffer, written by one thread.
//!
//! A worker never waits for a disk or a pipe: it hands over whole buffers ([`Lines::flush`], every 64 KiB or at its next
//! tick) and where the writer is behind by [`QUEUE`] buffers the lines are dropped and counted
//! (`filesystem.write_dropped`).

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use dpumesh_hw::stream::IngressPort;

mod filter;
mod format;
pub mod fuzz;
mod json;
mod time;

pub use self::filter::{Compare, Filter, How};
use self::format::{Part, compile};
use self::json::Json;
pub(crate) use self::time::timestamp;
use crate::config::model::Endpoint;
use crate::stats::{self, Registry, Scope, Shard};
use crate::tls::Connection;

/// Envoy's default format.
pub const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \
\"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// Buffers that may wait for the writer before lines are dropped.
pub const QUEUE: usize = 256;

const FLUSH_AT: usize = 64 * 1024;

/// One access log: how its lines look, which are written, and where they go.
#[derive(Debug)]
pub struct AccessLog {
    format: Format,
    filter: Option<Filter>,
    sink: Arc<Sink>,
    asks: Asks,
}

/// What a format asks for that is not had for nothing.
#[derive(Debug, Clone, Copy, Default)]
struct Asks {
    upstream_local: bool,
    host_name: bool,
}

/// How a line looks.
#[derive(Debug)]
pub struct Format {
    kind: Kind,
    /// What is not there is empty, not `-`.
    omit_empty: bool,
}

#[derive(Debug)]
enum Kind {
    Text(Vec<Part>),
    Json(Json),
}

impl Format {
    /// Of text with operators; Envoy's default where there is none.
    ///
    /// # Errors
    /// The operator that is unknown or malformed, in words.
    pub fn text(format: Option<&str>, omit_empty: bool) -> Result<Self, String> {
        let kind = Kind::Text(compile(format.unwrap_or(DEFAULT_FORMAT))?);
        Ok(Self { kind, omit_empty })
    }

    /// Of JSON whose texts have operators.
    ///
    /// # Errors
    /// The operator that is unknown or malformed, in words.
    pub fn json(format: &serde_json::Value, omit_empty: bool) -> Result<Self, String> {
        let kind = Kind::Json(Json::new(format)?);
        Ok(Self { kind, omit_empty })
    }

    fn render(&self, record: &Record<'_>, out: &mut Vec<u8>) {
        match &self.kind {
            Kind::Text(parts) => parts
                .iter()
                .for_each(|part| part.render(record, self.omit_empty, out)),
            Kind::Json(json) => {
                json.render(record, self.omit_empty, out);
                out.push(b'\n');
            }
        }
    }

    fn parts(&self) -> Vec<&Part> {
        match &self.kind {
            Kind::Text(parts) => parts.iter().collect(),
            Kind::Json(json) => json.parts(),
        }
    }
}

/// Looks a header up by its lower-case name; requests know `:method`, `:path`, `:authority` too.
pub trait Headers {
    /// The first value.
    fn header(&self, name: &[u8]) -> Option<&[u8]>;
}

/// What happened, as far as a line can say.
#[expect(missing_debug_implementations, reason = "holds borrowed header views")]
#[derive(Clone, Copy)]
pub struct Record<'a> {
    /// When the request (or connection) began.
    pub start: SystemTime,
    /// From then to its end.
    pub duration: Duration,
    /// Request headers, if a request was read.
    pub request: Option<&'a dyn Headers>,
    /// Response headers, if there was a response.
    pub response: Option<&'a dyn Headers>,
    /// `HTTP/1.1`, or nothing.
    pub protocol: Option<&'a str>,
    /// The status sent; 0 if none.
    pub status: u16,
    /// Envoy's response flags (`UF`, `UH`, `UT`, `NR`, …).
    pub flags: &'a str,
    /// Body octets received from the client.
    pub received: u64,
    /// Body octets sent to the client.
    pub sent: u64,
    /// The endpoint chosen.
    pub upstream: Option<SocketAddr>,
    /// The cluster chosen.
    pub cluster: Option<&'a str>,
    /// The route's name.
    pub route: Option<&'a str>,
    /// The client: the socket's other end, or whom a PROXY header names.
    pub remote: SocketAddr,
    /// The socket's other end.
    pub direct_remote: SocketAddr,
    /// Where the client connected to, by a PROXY header too.
    pub local: SocketAddr,
    /// The socket's own address.
    pub direct_local: SocketAddr,
    /// The dataplane's port it came in by.
    pub ingress: Option<IngressPort>,
    /// What only some formats ask for.
    pub extra: Extra<'a>,
}

/// What only some formats ask for. The default knows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extra<'a> {
    /// Why the response is as it is, in Envoy's words (`via_upstream`, `route_not_found`, …).
    pub details: Option<&'a str>,
    /// Why the connection was ended.
    pub termination: Option<&'a str>,
    /// Why the connection to the endpoint failed.
    pub transport_failure: Option<&'a str>,
    /// Our end of the connection to the endpoint.
    pub upstream_local: Option<SocketAddr>,
    /// The name asked for in the TLS handshake.
    pub server_name: Option<&'a str>,
    /// Where the request says it comes from.
    pub request_remote: Option<IpAddr>,
    /// What has flags of its own.
    pub besides: Besides,
    /// The trailers of the response, lines as they came.
    pub trailers: Option<&'a [u8]>,
    /// gRPC's status, or the one that the HTTP status stands for.
    pub grpc: Option<u32>,
    /// Whether the request is gRPC.
    pub is_grpc: bool,
    /// What is known of the client's connection.
    pub connection: Option<&'a Connection>,
    /// The number of that connection.
    pub connection_id: Option<u64>,
    /// What the line is about.
    pub about: About,
    /// The cluster's endpoints.
    pub endpoints: &'a [Endpoint],
    /// The filter chain's name.
    pub chain: Option<&'a str>,
    /// What the endpoint speaks.
    pub upstream_protocol: Option<&'a str>,
    /// The SPIFFE id that the endpoint's certificate has.
    pub upstream_peer: Option<&'a str>,
    /// How often the request was sent.
    pub attempts: u32,
    /// Points in time.
    pub times: Times,
}

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum About {
    /// Neither: a header's value.
    #[default]
    Nothing,
    /// A request that has ended.
    Request,
    /// A TCP connection that has ended.
    Connection,
}

/// Points in a request's time, from its begin.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// All of the request had come.
    pub request_complete: Option<Duration>,
    /// All of it had been sent to the endpoint.
    pub request_sent: Option<Duration>,
    /// The endpoint's response began.
    pub response_begun: Option<Duration>,
}

impl AccessLog {
    /// A log of lines in `format`, of what passes `filter`, to `sink`.
    pub fn new(format: Format, filter: Option<Filter>, sink: Arc<Sink>) -> Self {
        let parts = format.parts();
        let upstream_local =
            |part: &&Part| matches!(part, Part::UpstreamLocal { .. } | Part::UpstreamLocalPort);
        let asks = Asks {
            upstream_local: parts.iter().any(upstream_local),
            host_name: parts
                .iter()
                .any(|part| matches!(part, Part::UpstreamHostName { .. })),
        };
        Self {
            format,
            filter,
            sink,
            asks,
        }
    }

    /// Whether [`Extra::upstream_local`] is wanted, which costs a system call.
    pub fn asks_for_upstream_local(&self) -> bool {
        self.asks.upstream_local
    }

    /// Whether [`Extra::endpoints`] are wanted, for which a request's cluster is looked up once more.
    pub fn asks_for_host_name(&self) -> bool {
        self.asks.host_name
    }

    /// Renders one line into the worker's buffer.
    pub fn log(&self, record: &Record<'_>, lines: &mut Lines) {
        if self.filter.as_ref().is_some_and(|filter| !filter.passes(record)) {
            return;
        }
        self.format.render(record, lines.buffer(&self.sink));
        lines.after_line(&self.sink);
    }
}

/// A header's value with operators that say something of the request: `%REQ()%`, `%PROTOCOL%`, addresses, server name.
/// What is not there is empty, not `-` as in a log.
#[derive(Debug)]
pub struct Template(Vec<Part>);

impl Template {
    /// Compiles `text`.
    ///
    /// # Errors
    /// The operator that is unknown or malformed, or that asks for what comes behind the request.
    pub fn new(text: &str) -> Result<Self, String> {
        let parts = compile(text)?;
        match parts.iter().find(|part| !part.is_early()) {
            Some(_) => Err(format!("{text:?} asks for more than the request says")),
            None => Ok(Self(parts)),
        }
    }

    /// The value for a request.
    pub fn render(&self, record: &Record<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        for part in &self.0 {
            part.render(record, true, &mut out);
        }
        out
    }
}

/// What became of a request beside the one thing that its flag tells.
#[derive(Debug, Clone, Copy, Default)]
pub struct Besides {
    /// A fault held it up (`DI`).
    pub delayed: bool,
    /// A retry was due, but there was none left (`URX`).
    pub exhausted: bool,
    /// A retry was due that the cluster's circuit breaker did not allow (`UO`).
    pub overflowed: bool,
}

/// Response flags as Envoy prints them, in its order where there are several; `-` for none.
pub(crate) fn join_flags(flag: &str, besides: Besides, out: &mut Vec<u8>) {
    let begin = out.len();
    let first = matches!(flag, "SI" | "DPE" | "UPE");
    let own = (!first).then_some(flag);
    let (before, own) = match own {
        // `DI` stands before `FI` and behind what went wrong with an endpoint.
        Some("FI") => (None, Some("FI")),
        own => (own, None),
    };
    let late = first.then_some(flag);
    let delayed = besides.delayed.then_some("DI");
    let exhausted = besides.exhausted.then_some("URX");
    let overflowed = besides.overflowed.then_some("UO");
    // What became of retries was known before what became of the request.
    let all = [exhausted, overflowed, before, delayed, own, late];
    for flag in all.into_iter().flatten().filter(|f| !f.is_empty()) {
        if out.len() > begin {
            out.push(b',');
        }
        out.extend_from_slice(flag.as_bytes());
    }
    if out.len() == begin {
        out.push(b'-');
    }
}

/// A worker's unwritten lines, by sink.
#[derive(Debug, Default)]
pub struct Lines {
    buffers: Vec<(Arc<Sink>, Vec<u8>)>,
    shard: Option<Shard>,
}

impl Lines {
    /// The lines of one worker.
    pub fn new(shard: Shard) -> Self {
        Self {
            buffers: Vec::new(),
            shard: Some(shard),
        }
    }

    fn place(&mut self, sink: &Arc<Sink>) -> usize {
        match self.buffers.iter().position(|(s, _)| Arc::ptr_eq(s, sink)) {
            Some(place) => place,
            None => {
                self.buffers.push((Arc::clone(sink), Vec::new()));
                self.buffers.len() - 1
            }
        }
    }

    fn buffer(&mut self, sink: &Arc<Sink>) -> &mut Vec<u8> {
        let place = self.place(sink);
        &mut self.buffers[place].1
    }

    fn after_line(&mut self, sink: &Arc<Sink>) {
        let (place, shard) = (self.place(sink), self.shard.unwrap_or(Shard::CONTROL));
        let buffer = &mut self.buffers[place].1;
        sink.stats.inc(shard, stats::Filesystem::WriteBuffered);
        if buffer.len() >= FLUSH_AT {
            sink.send(std::mem::take(buffer), shard);
        }
    }

    /// Hands everything to the writer; called at each tick of the worker and at its end.
    pub fn flush(&mut self) {
        let shard = self.shard.unwrap_or(Shard::CONTROL);
        for (sink, buffer) in &mut self.buffers {
            if !buffer.is_empty() {
                sink.send(std::mem::take(buffer), shard);
            }
        }
        self.buffers.retain(|(sink, _)| Arc::strong_count(sink) > 1);
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.flush();
    }
}

/// An open log file (or stream).
#[derive(Debug)]
pub struct Sink {
    path: String,
    out: Arc<Mutex<Out>>,
    queue: SyncSender<Job>,
    stats: Arc<Scope>,
}

#[derive(Debug)]
enum Out {
    File(File),
    Stdout,
    Stderr,
}

#[derive(Debug)]
enum Job {
    Write(Arc<Mutex<Out>>, Vec<u8>),
    Barrier(SyncSender<()>),
}

impl Sink {
    fn send(&self, lines: Vec<u8>, shard: Shard) {
        if self
            .queue
            .try_send(Job::Write(Arc::clone(&self.out), lines))
            .is_err()
        {
            self.stats.inc(shard, stats::Filesystem::Dropped);
        }
    }
}

/// All sinks and their writing thread.
#[derive(Debug)]
pub struct Sinks {
    open: Mutex<HashMap<String, Arc<Sink>>>,
    queue: SyncSender<Job>,
    stats: Arc<Scope>,
}

impl Sinks {
    /// Starts the writing thread; it ends with the last sink.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn new(registry: &Registry) -> io::Result<Self> {
        let (queue, jobs) = sync_channel(QUEUE);
        let stats = registry.scope("filesystem", stats::Filesystem::TABLE);
        let counters = Arc::clone(&stats);
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_all(&jobs, &counters))?;
        Ok(Self {
            open: Mutex::default(),
            queue,
            stats,
        })
    }

    /// The sink of a path, opened for appending on first use.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(&self, path: &str) -> io::Result<Arc<Sink>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = open.get(path) {
            return Ok(Arc::clone(sink));
        }
        let sink = Arc::new(Sink {
            path: path.to_owned(),
            out: Arc::new(Mutex::new(open_out(path)?)),
            queue: self.queue.clone(),
            stats: Arc::clone(&self.stats),
        });
        open.insert(path.to_owned(), Arc::clone(&sink));
        Ok(sink)
    }

    /// Opens every file anew by its path (after a rotation).
    ///
    /// # Errors
    /// The first file that cannot be opened; it and the later ones keep their old handles.
    pub fn reopen(&self) -> io::Result<()> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for sink in open.values() {
            *sink.out.lock().unwrap_or_else(PoisonError::into_inner) = open_out(&sink.path)?;
        }
        Ok(())
    }

    /// Waits (at most two seconds) until all that was handed over is written.
    pub fn settle(&self) {
        let (done, wait) = sync_channel(1);
        if self.queue.send(Job::Barrier(done)).is_ok() {
            let _ = wait.recv_timeout(Duration::from_secs(2));
        }
    }
}

fn open_out(path: &str) -> io::Result<Out> {
    match path {
        "/dev/stdout" => Ok(Out::Stdout),
        "/dev/stderr" => Ok(Out::Stderr),
        path => OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .map(Out::File),
    }
}

fn write_all(jobs: &Receiver<Job>, stats: &Scope) {
    for job in jobs {
        let (out, lines) = match job {
            Job::Write(out, lines) => (out, lines),
            Job::Barrier(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let result = match &mut *out.lock().unwrap_or_else(PoisonError::into_inner) {
            Out::File(file) => file.write_all(&lines),
            Out::Stdout => io::stdout().write_all(&lines).and_then(|()| io::stdout().flush()),
            Out::Stderr => io::stderr().write_all(&lines),
        };
        let member = if result.is_ok() {
            stats::Filesystem::WriteCompleted
        } else {
            stats::Filesystem::WriteFailed
        };
        // The writer has no shard of its own; the control thread does not touch these two.
        stats.inc(Shard::CONTROL, member);
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    struct Map(Vec<(&'static str, &'static str)>);
    impl Headers for Map {
        fn header(&self, name: &[u8]) -> Option<&[u8]> {
            self.0
                .iter()
                .find(|(n, _)| n.as_bytes() == name)
                .map(|(_, v)| v.as_bytes())
        }
    }

    fn line(format: Option<&str>) -> String {
        let request = Map(vec![
            (":method", "GET"),
            (":path", "/a?b"),
            (":authority", "h"),
            ("user-agent", "curl/7"),
        ]);
        let response = Map(vec![("x-envoy-upstream-service-time", "3")]);
        let record = Record {
            start: UNIX_EPOCH + Duration::from_millis(1_795_361_808_833),
            duration: Duration::from_millis(7),
            request: Some(&request),
            response: Some(&response),
            protocol: Some("HTTP/1.1"),
            status: 200,
            flags: "",
            received: 1,
            sent: 2,
            upstream: Some("127.0.0.1:80".parse().unwrap()),
            cluster: Some("c"),
            route: None,
            remote: "10.0.0.1:5".parse().unwrap(),
            direct_remote: "10.0.0.1:5".parse().unwrap(),
            direct_local: "10.0.0.2:80".parse().unwrap(),
            local: "[::1]:80".parse().unwrap(),
            ingress: IngressPort::new(3),
            extra: Extra::default(),
        };
        let mut out = Vec::new();
        Format::text(format, false).unwrap().render(&record, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_default_format_is_envoys() {
        assert_eq!(
            line(None),
            "[2026-11-22T15:36:48.833Z] \"GET /a?b HTTP/1.1\" 200 - 1 2 7 3 \"-\" \"curl/7\" \"-\" \"h\" \"127.0.0.1:80\"\n"
        );
    }

    #[test]
    fn operators_render() {
        assert_eq!(
            line(Some("100%% %REQ(X?:METHOD):2% %ROUTE_NAME% %UPSTREAM_CLUSTER%")),
            "100% GE - c"
        );
        assert_eq!(
            line(Some(
                "%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%"
            )),
            "10.0.0.1:5 ::1"
        );
        assert_eq!(
            line(Some("ingress=%FILTER_STATE(dpumesh.ingress:PLAIN)%")),
            "ingress=3"
        );
    }

    #[test]
    fn unknown_and_malformed_operators_are_refused() {
        for bad in [
            "%NOPE%",
            "%REQ(%",
            "%REQ()%",
            "%REQ(a):x%",
            "%START_TIME",
            "%REQ(a)b%",
            "%START_TIME(%Q)%",
            "%GRPC_STATUS(LONG)%",
            "%PATH(XX)%",
            "%QUERY_PARAM()%",
            "%DURATION(a)%",
            "%FILTER_STATE(other:PLAIN)%",
        ] {
            assert!(compile(bad).is_err(), "{bad}");
        }
    }
}
