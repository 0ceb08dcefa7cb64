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
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dpumesh_hw::stream::IngressPort;

use crate::stats::{self, Registry, Scope, Shard};

/// Envoy's default format.
pub const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \
\"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// Buffers that may wait for the writer before lines are dropped.
pub const QUEUE: usize = 256;

const FLUSH_AT: usize = 64 * 1024;

/// One access log: a format and where its lines go.
#[derive(Debug)]
pub struct AccessLog {
    parts: Vec<Part>,
    sink: Arc<Sink>,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(Vec<u8>),
    StartTime,
    Request(HeaderPart),
    Response(HeaderPart),
    Protocol,
    ResponseCode,
    ResponseFlags,
    BytesReceived,
    BytesSent,
    Duration,
    UpstreamHost,
    UpstreamCluster,
    RouteName,
    Details,
    Termination,
    TransportFailure,
    UpstreamLocal,
    ServerName,
    Remote { port: bool },
    DirectRemote { port: bool },
    Local { port: bool },
    Ingress,
}

/// `%REQ(NAME?OTHER):LENGTH%`
#[derive(Debug, PartialEq, Eq)]
struct HeaderPart {
    name: Vec<u8>,
    or: Option<Vec<u8>>,
    max: usize,
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
    /// The client.
    pub remote: SocketAddr,
    /// Where it connected to.
    pub local: SocketAddr,
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
    /// A fault held the request up: flag `DI`.
    pub delayed: bool,
    /// A retry was due, but there was none left: flag `URX`.
    pub exhausted: bool,
}

impl AccessLog {
    /// Compiles `format` (Envoy's default where there is none).
    ///
    /// # Errors
    /// The operator that is unknown or malformed, in words.
    pub fn new(format: Option<&str>, sink: Arc<Sink>) -> Result<Self, String> {
        Ok(Self {
            parts: compile(format.unwrap_or(DEFAULT_FORMAT))?,
            sink,
        })
    }

    /// Whether [`Extra::upstream_local`] is wanted, which costs a system call.
    pub fn asks_for_upstream_local(&self) -> bool {
        self.parts.contains(&Part::UpstreamLocal)
    }

    /// Renders one line into the worker's buffer.
    pub fn log(&self, record: &Record<'_>, lines: &mut Lines) {
        let buffer = lines.buffer(&self.sink);
        for part in &self.parts {
            part.render(record, buffer);
        }
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
        let early = |part: &Part| {
            matches!(
                part,
                Part::Text(_)
                    | Part::Request(_)
                    | Part::Protocol
                    | Part::ServerName
                    | Part::Remote { .. }
                    | Part::DirectRemote { .. }
                    | Part::Local { .. }
            )
        };
        match parts.iter().find(|part| !early(part)) {
            Some(_) => Err(format!("{text:?} asks for more than the request says")),
            None => Ok(Self(parts)),
        }
    }

    /// The value for a request.
    pub fn render(&self, record: &Record<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        for part in &self.0 {
            match part {
                Part::Request(header) => {
                    let value = header.value(record.request).unwrap_or_default();
                    out.extend_from_slice(value);
                }
                Part::ServerName => {
                    out.extend_from_slice(record.extra.server_name.unwrap_or_default().as_bytes());
                }
                part => part.render(record, &mut out),
            }
        }
        out
    }
}

fn compile(format: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut text = Vec::new();
    let mut rest = format;
    while let Some(start) = rest.find('%') {
        text.extend_from_slice(&rest.as_bytes()[..start]);
        rest = &rest[start + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            text.push(b'%');
            rest = after;
            continue;
        }
        let end = rest
            .find('%')
            .ok_or_else(|| format!("no closing % after {rest:?}"))?;
        if !text.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut text)));
        }
        parts.push(operator(&rest[..end])?);
        rest = &rest[end + 1..];
    }
    text.extend_from_slice(rest.as_bytes());
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
    Ok(parts)
}

fn operator(text: &str) -> Result<Part, String> {
    Ok(match text {
        "START_TIME" => Part::StartTime,
        "PROTOCOL" => Part::Protocol,
        "RESPONSE_CODE" => Part::ResponseCode,
        "RESPONSE_FLAGS" => Part::ResponseFlags,
        "BYTES_RECEIVED" => Part::BytesReceived,
        "BYTES_SENT" => Part::BytesSent,
        "DURATION" => Part::Duration,
        "UPSTREAM_HOST" => Part::UpstreamHost,
        // No cluster here has another name for statistics alone that would show in a log.
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Part::UpstreamCluster,
        "ROUTE_NAME" => Part::RouteName,
        "RESPONSE_CODE_DETAILS" => Part::Details,
        "CONNECTION_TERMINATION_DETAILS" => Part::Termination,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Part::TransportFailure,
        "UPSTREAM_LOCAL_ADDRESS" => Part::UpstreamLocal,
        "REQUESTED_SERVER_NAME" => Part::ServerName,
        "DOWNSTREAM_REMOTE_ADDRESS" => Part::Remote { port: true },
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Part::Remote { port: false },
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Part::DirectRemote { port: true },
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => Part::DirectRemote { port: false },
        "DOWNSTREAM_LOCAL_ADDRESS" => Part::Local { port: true },
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Part::Local { port: false },
        // Envoy's way to name what others put beside a connection; Envoy itself prints `-` for this key.
        "FILTER_STATE(dpumesh.ingress:PLAIN)" => Part::Ingress,
        _ => {
            if let Some(rest) = text.strip_prefix("REQ(") {
                Part::Request(header_part(rest, text)?)
            } else if let Some(rest) = text.strip_prefix("RESP(") {
                Part::Response(header_part(rest, text)?)
            } else {
                return Err(format!("%{text}% is not supported yet"));
            }
        }
    })
}

fn header_part(rest: &str, whole: &str) -> Result<HeaderPart, String> {
    let malformed = || format!("%{whole}% is malformed");
    let (names, tail) = rest.split_once(')').ok_or_else(malformed)?;
    let max = match tail.strip_prefix(':') {
        Some(length) => length.parse().map_err(|_| malformed())?,
        None if tail.is_empty() => usize::MAX,
        None => return Err(malformed()),
    };
    let lower = |name: &str| name.to_ascii_lowercase().into_bytes();
    let (name, or) = match names.split_once('?') {
        Some((name, or)) => (lower(name), Some(lower(or))),
        None => (lower(names), None),
    };
    if name.is_empty() {
        Err(malformed())
    } else {
        Ok(HeaderPart { name, or, max })
    }
}

impl Part {
    fn render(&self, record: &Record<'_>, out: &mut Vec<u8>) {
        match self {
            Self::Text(text) => out.extend_from_slice(text),
            Self::StartTime => timestamp(record.start, out),
            Self::Request(header) => header.render(record.request, out),
            Self::Response(header) => header.render(record.response, out),
            Self::Protocol => or_dash(record.protocol, out),
            Self::ResponseCode => number(u64::from(record.status), out),
            Self::ResponseFlags => {
                let Extra {
                    delayed, exhausted, ..
                } = record.extra;
                join_flags(record.flags, delayed, exhausted, out);
            }
            Self::BytesReceived => number(record.received, out),
            Self::BytesSent => number(record.sent, out),
            Self::Duration => number(
                u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX),
                out,
            ),
            Self::UpstreamHost => match record.upstream {
                Some(address) => {
                    let _ = write!(out, "{address}");
                }
                None => out.push(b'-'),
            },
            Self::UpstreamCluster => or_dash(record.cluster, out),
            Self::RouteName => or_dash(record.route.filter(|r| !r.is_empty()), out),
            Self::Details => or_dash(record.extra.details, out),
            Self::Termination => or_dash(record.extra.termination, out),
            Self::TransportFailure => or_dash(record.extra.transport_failure, out),
            Self::UpstreamLocal => match record.extra.upstream_local {
                Some(local) => address(local, true, out),
                None => out.push(b'-'),
            },
            Self::ServerName => or_dash(record.extra.server_name.filter(|n| !n.is_empty()), out),
            Self::Remote { port } => {
                // As in Envoy an address taken from a request has port 0.
                let said = record.extra.request_remote.map(|ip| SocketAddr::new(ip, 0));
                address(said.unwrap_or(record.remote), *port, out);
            }
            Self::DirectRemote { port } => address(record.remote, *port, out),
            Self::Local { port } => address(record.local, *port, out),
            Self::Ingress => match record.ingress {
                Some(port) => number(u64::from(port.get()), out),
                None => out.push(b'-'),
            },
        }
    }
}

impl HeaderPart {
    fn value<'a>(&self, headers: Option<&'a dyn Headers>) -> Option<&'a [u8]> {
        let headers = headers?;
        let or = || self.or.as_ref().and_then(|other| headers.header(other));
        let value = headers.header(&self.name).or_else(or)?;
        Some(&value[..value.len().min(self.max)])
    }

    fn render(&self, headers: Option<&dyn Headers>, out: &mut Vec<u8>) {
        out.extend_from_slice(self.value(headers).unwrap_or(b"-"));
    }
}

/// Response flags as Envoy prints them, in its order where there are several; `-` for none.
pub(crate) fn join_flags(flag: &str, delayed: bool, exhausted: bool, out: &mut Vec<u8>) {
    let begin = out.len();
    let first = matches!(flag, "SI" | "DPE" | "UPE");
    let own = (!first).then_some(flag);
    let (before, own) = match own {
        // `DI` stands before `FI` and behind what went wrong with an endpoint.
        Some("FI") => (None, Some("FI")),
        own => (own, None),
    };
    let late = first.then_some(flag);
    let delayed = delayed.then_some("DI");
    let exhausted = exhausted.then_some("URX");
    let all = [before, delayed, own, exhausted, late];
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

fn or_dash(text: Option<&str>, out: &mut Vec<u8>) {
    out.extend_from_slice(text.unwrap_or("-").as_bytes());
}

fn number(value: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

fn address(address: SocketAddr, port: bool, out: &mut Vec<u8>) {
    let _ = if port {
        write!(out, "{address}")
    } else {
        write!(out, "{}", address.ip())
    };
}

/// `2026-11-22T15:36:48.833Z`
pub(crate) fn timestamp(time: SystemTime, out: &mut Vec<u8>) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let mut text = *b"0000-00-00T00:00:00.000Z";
    let mut put = |at: usize, width: usize, mut value: u64| {
        for place in (at..at + width).rev() {
            text[place] = b'0' + (value % 10) as u8;
            value /= 10;
        }
    };
    put(0, 4, year);
    put(5, 2, month);
    put(8, 2, day);
    put(11, 2, second / 3600);
    put(14, 2, second / 60 % 60);
    put(17, 2, second % 60);
    put(20, 3, u64::from(since.subsec_millis()));
    out.extend_from_slice(&text);
}

/// Year, month and day of a count of days since 1970 (proleptic Gregorian).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
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
            local: "[::1]:80".parse().unwrap(),
            ingress: IngressPort::new(3),
            extra: Extra::default(),
        };
        let mut out = Vec::new();
        for part in compile(format.unwrap_or(DEFAULT_FORMAT)).unwrap() {
            part.render(&record, &mut out);
        }
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
            "%START_TIME(%s)%",
            "%FILTER_STATE(other:PLAIN)%",
        ] {
            assert!(compile(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_778), (2026, 11, 21));
    }
}
