//! A closed-loop HTTP/1.1 client on one thread: each connection sends a request, waits for the answer, sends the
//! next. What came back is summed up by status, by the server that answered and by the client address it saw.
//!
//! A `Connection` knows its own state and nothing of the others. [`get`] waits for all of them,
//! with a deadline for each.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use clap::Args;
use httparse::Status;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::http_body::Body;
use crate::measure::Percentiles;

/// Longest head of an answer, octets.
const HEAD: usize = 64 * 1024;
/// Most headers in one answer.
const HEADERS: usize = 100;
/// How much of the first body is kept, octets.
const KEPT: usize = 4096;
/// How often deadlines are looked at, milliseconds.
const TICK: u16 = 20;

/// What to ask, and how.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Address and port to connect to
    pub address: SocketAddr,
    /// Path and query
    #[arg(long, default_value = "/")]
    pub path: String,
    /// Host header; the address if absent
    #[arg(long)]
    pub host: Option<String>,
    /// Further headers, NAME:VALUE
    #[arg(long = "header", value_parser = header)]
    pub headers: Vec<(String, String)>,
    /// How many requests, shared out evenly over the connections
    #[arg(long, default_value_t = 1)]
    pub count: u64,
    /// Send for so long instead of counting, milliseconds
    #[arg(long)]
    pub for_ms: Option<u64>,
    /// How many connections
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub connections: u32,
    /// Send the first request only when all connections are open
    #[arg(long)]
    pub together: bool,
    /// A new connection for every request
    #[arg(long)]
    pub reconnect: bool,
    /// How long a request may take, connecting included, milliseconds
    #[arg(long, default_value_t = 10_000)]
    pub timeout_ms: u64,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// One request for `/` to `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            path: "/".to_owned(),
            host: None,
            headers: Vec::new(),
            count: 1,
            for_ms: None,
            connections: 1,
            together: false,
            reconnect: false,
            timeout_ms: 10_000,
            json: true,
        }
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("a header is written NAME:VALUE")?;
    if name.is_empty() || text.contains(['\r', '\n']) {
        return Err("a header has a name and no line ends".to_owned());
    }
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// What came back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Requests that were answered, whatever the status.
    pub answered: u64,
    /// Requests that were not, by reason: `refused`, `timeout`, `reset`, `closed`, `unreachable`, `malformed: …`, `other: …`.
    pub errors: BTreeMap<String, u64>,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Answers by the server's name (header `x-served-by`).
    pub served_by: BTreeMap<String, u64>,
    /// Answers by the client address that the server saw (header `x-client`, without the port).
    pub seen_as: BTreeMap<String, u64>,
    /// Connections that the server closed between two requests, and that were opened again.
    pub reopened: u64,
    /// Most connections open at once.
    pub open_at_once: u64,
    /// Octets of bodies.
    pub body_octets: u64,
    /// From the first connect to the last answer, microseconds.
    pub elapsed_us: u64,
    /// From the sending of a request (with `--reconnect`: from connecting) to the end of its answer, microseconds.
    pub latency_us: Percentiles,
    /// The first answer in full.
    pub first: Option<Answer>,
    /// The first answer with a status from 500 in full.
    pub failure: Option<Answer>,
}

/// One answer in full.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers; names in lower case, the last of each name.
    pub headers: BTreeMap<String, String>,
    /// The beginning of its body (at most 4096 octets).
    pub body: String,
}

/// Sends the requests and waits for all answers or their deadlines. Blocks; a failing request is a count in the
/// summary, not an error.
///
/// # Errors
/// If no epoll instance or socket can be made, or a header is malformed.
pub fn get(options: &Options) -> io::Result<Summary> {
    Client::new(options)?.run()
}

struct Client<'a> {
    options: &'a Options,
    request: Vec<u8>,
    epoll: Epoll,
    connections: Vec<Connection>,
    summary: Summary,
    latencies: Vec<u64>,
    /// No new request after this.
    until: Option<Instant>,
    /// Connections that have not finished all their requests.
    busy: usize,
    open: u64,
    /// Connections that still hold back the first request of all.
    awaited: usize,
    /// Connections to go on with before the next wait.
    due: Vec<usize>,
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between two requests.
    Idle,
    /// A request is due, on the open connection or a new one.
    Due,
    Connecting,
    /// Connected, and waiting for all others to be.
    Ready,
    Sending(usize),
    Head,
    Body(Body),
    /// No more requests. The connection stays open until the end, so that "at once" means it.
    Done,
}

struct Connection {
    socket: Option<Socket>,
    state: State,
    /// Requests still to send.
    left: u64,
    input: Vec<u8>,
    started: Instant,
    deadline: Instant,
    /// Whether the present connection has carried an answer already.
    reused: bool,
    /// Whether the first connect has succeeded or failed.
    counted: bool,
    /// Whether the present answer is the connection's last.
    close: bool,
    told: Told,
    kept: Option<Answer>,
}

/// What the head of an answer told.
#[derive(Default)]
struct Told {
    status: u16,
    served_by: Option<String>,
    seen_as: Option<String>,
    is_closing: bool,
}

/// Why a request was not answered.
enum Trouble {
    /// Nothing wrong: the socket has no more at present.
    NotYet,
    Failed(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => Self::NotYet,
            _ => Self::Failed(super::tcp::reason(&error)),
        }
    }
}

impl From<&str> for Trouble {
    fn from(reason: &str) -> Self {
        Self::Failed(format!("malformed: {reason}"))
    }
}

impl<'a> Client<'a> {
    fn new(options: &'a Options) -> io::Result<Self> {
        let now = Instant::now();
        let connections = u64::from(options.connections);
        let share = |index: u64| match options.for_ms {
            Some(_) => u64::MAX,
            None => options.count / connections + u64::from(index < options.count % connections),
        };
        let connections: Vec<Connection> = (0..connections)
            .map(|index| Connection::new(share(index), now))
            .filter(|connection| connection.left > 0)
            .collect();
        Ok(Self {
            request: request(options)?,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            busy: connections.len(),
            awaited: if options.together { connections.len() } else { 0 },
            due: (0..connections.len()).collect(),
            connections,
            summary: Summary::default(),
            latencies: Vec::new(),
            until: None,
            open: 0,
            options,
        })
    }

    fn run(mut self) -> io::Result<Summary> {
        let begun = Instant::now();
        let time = self.options.for_ms.map(Duration::from_millis);
        self.until = time.map(|time| begun + time);
        let mut looked = begun;
        while self.busy > 0 {
            for index in std::mem::take(&mut self.due) {
                self.drive(index)?;
            }
            self.wait()?;
            if looked.elapsed() >= Duration::from_millis(u64::from(TICK)) {
                looked = Instant::now();
                self.expire(looked);
            }
        }
        self.summary.elapsed_us = micros(begun.elapsed());
        self.summary.latency_us = Percentiles::of(&mut self.latencies);
        Ok(self.summary)
    }

    fn wait(&mut self) -> io::Result<()> {
        let patience = if self.busy == 0 || !self.due.is_empty() {
            0
        } else {
            TICK
        };
        let mut events = [EpollEvent::empty(); 256];
        let count = match self.epoll.wait(&mut events, EpollTimeout::from(patience)) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        for event in &events[..count] {
            // A token is an index into `connections`.
            self.drive(event.data() as usize)?;
        }
        Ok(())
    }

    /// Takes a connection as far as it goes now.
    fn drive(&mut self, index: usize) -> io::Result<()> {
        loop {
            let connection = &mut self.connections[index];
            let step = match connection.state {
                State::Done | State::Ready => return Ok(()),
                State::Idle => {
                    self.next_request(index);
                    continue;
                }
                State::Due => connection.send_or_connect(&self.epoll, self.options.address, index),
                State::Connecting => match connection.connected() {
                    Ok(()) => {
                        self.opened(index);
                        continue;
                    }
                    Err(trouble) => Err(trouble),
                },
                State::Sending(from) => connection.send(&self.request, from),
                State::Head => connection.head(|status| self.summary.wants(status)),
                State::Body(body) => connection.body(body, &mut self.summary.body_octets),
            };
            match step {
                Ok(false) => {}
                Ok(true) => self.finish(index),
                Err(Trouble::NotYet) => return Ok(()),
                Err(Trouble::Failed(_)) if self.connections[index].closed_while_idle() => {
                    self.summary.reopened += 1;
                    self.close(index);
                    self.connections[index].state = State::Due;
                }
                Err(Trouble::Failed(reason)) => {
                    self.fail(index, reason);
                    return Ok(());
                }
            }
        }
    }

    fn next_request(&mut self, index: usize) {
        let now = Instant::now();
        let over = self.until.is_some_and(|until| now >= until);
        let connection = &mut self.connections[index];
        if connection.left == 0 || over {
            connection.state = State::Done;
            self.busy -= 1;
            self.count_in(index);
            return;
        }
        connection.left -= 1;
        connection.started = now;
        connection.deadline = now + Duration::from_millis(self.options.timeout_ms);
        connection.state = State::Due;
    }

    fn opened(&mut self, index: usize) {
        self.open += 1;
        self.summary.open_at_once = self.summary.open_at_once.max(self.open);
        self.connections[index].state = State::Ready;
        self.count_in(index);
        if self.awaited == 0 {
            self.connections[index].state = State::Sending(0);
        }
    }

    /// A connection has opened or failed for the first time; after the last one, all start that were held back.
    fn count_in(&mut self, index: usize) {
        if !self.options.together || self.connections[index].counted {
            return;
        }
        self.connections[index].counted = true;
        self.awaited -= 1;
        if self.awaited > 0 {
            return;
        }
        let now = Instant::now();
        for (held, connection) in self.connections.iter_mut().enumerate() {
            if connection.state == State::Ready {
                connection.started = now;
                connection.deadline = now + Duration::from_millis(self.options.timeout_ms);
                connection.state = State::Sending(0);
                self.due.push(held);
            }
        }
    }

    /// The answer is complete.
    fn finish(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        self.latencies.push(micros(connection.started.elapsed()));
        self.summary.count(std::mem::take(&mut connection.told));
        if let Some(answer) = connection.kept.take() {
            self.summary.keep(answer);
        }
        connection.reused = true;
        connection.state = State::Idle;
        if connection.close || self.options.reconnect {
            self.close(index);
        }
    }

    /// The request will not be answered. The next one waits for the next turn, so that others get theirs.
    fn fail(&mut self, index: usize, reason: String) {
        *self.summary.errors.entry(reason).or_default() += 1;
        self.close(index);
        self.count_in(index);
        self.due.push(index);
    }

    fn close(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        if connection.socket.take().is_some() && connection.state != State::Connecting {
            self.open -= 1;
        }
        connection.kept = None;
        connection.state = State::Idle;
    }

    fn expire(&mut self, now: Instant) {
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            let waits = !matches!(connection.state, State::Idle | State::Ready | State::Done);
            if waits && connection.deadline <= now {
                self.fail(index, "timeout".to_owned());
            }
        }
    }
}

impl Summary {
    /// Whether an answer with `status` is kept in full.
    fn wants(&self, status: u16) -> bool {
        self.first.is_none() || (status >= 500 && self.failure.is_none())
    }

    fn keep(&mut self, answer: Answer) {
        if answer.status >= 500 {
            self.failure.get_or_insert_with(|| answer.clone());
        }
        self.first.get_or_insert(answer);
    }

    fn count(&mut self, told: Told) {
        self.answered += 1;
        *self.statuses.entry(told.status).or_default() += 1;
        if let Some(server) = told.served_by {
            *self.served_by.entry(server).or_default() += 1;
        }
        if let Some(client) = told.seen_as {
            *self.seen_as.entry(client).or_default() += 1;
        }
    }
}

impl Connection {
    fn new(left: u64, now: Instant) -> Self {
        Self {
            socket: None,
            state: State::Idle,
            left,
            input: Vec::new(),
            started: now,
            deadline: now,
            reused: false,
            counted: false,
            close: false,
            told: Told::default(),
            kept: None,
        }
    }

    fn send_or_connect(&mut self, epoll: &Epoll, address: SocketAddr, index: usize) -> Result<bool, Trouble> {
        if self.socket.is_some() {
            self.state = State::Sending(0);
            return Ok(false);
        }
        let socket = connecting(address)?;
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll
            .add(&socket, EpollEvent::new(interest, index as u64))
            .map_err(io::Error::from)?;
        self.open(socket);
        Ok(false)
    }

    fn open(&mut self, socket: Socket) {
        self.socket = Some(socket);
        self.state = State::Connecting;
        self.reused = false;
        self.close = false;
        self.input.clear();
    }

    fn socket(&self) -> Result<&Socket, Trouble> {
        self.socket
            .as_ref()
            .ok_or_else(|| Trouble::Failed("closed".to_owned()))
    }

    fn connected(&self) -> Result<(), Trouble> {
        let socket = self.socket()?;
        if let Some(error) = socket.take_error()? {
            return Err(error.into());
        }
        match socket.peer_addr() {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotConnected => Err(Trouble::NotYet),
            Err(error) => Err(error.into()),
        }
    }

    /// A server may close an idle connection at any time (RFC 9112 §9.5); a request that met that goes again.
    fn closed_while_idle(&self) -> bool {
        let unanswered = matches!(self.state, State::Sending(_) | State::Head) && self.input.is_empty();
        self.reused && unanswered
    }

    fn send(&mut self, request: &[u8], from: usize) -> Result<bool, Trouble> {
        let count = self.socket()?.write(&request[from..])?;
        self.state = if from + count == request.len() {
            State::Head
        } else {
            State::Sending(from + count)
        };
        Ok(false)
    }

    /// Reads once; 0 at the end.
    fn read(&mut self) -> Result<usize, Trouble> {
        let mut piece = [0; 16 * 1024];
        let count = self.socket()?.read(&mut piece)?;
        self.input.extend_from_slice(&piece[..count]);
        Ok(count)
    }

    fn head(&mut self, wants: impl Fn(u16) -> bool) -> Result<bool, Trouble> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut head = httparse::Response::new(&mut headers);
        let length = match head.parse(&self.input) {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) if self.input.len() > HEAD => return Err("head too long".into()),
            Ok(Status::Partial) => {
                return match self.read()? {
                    0 => Err(Trouble::Failed("closed".to_owned())),
                    _ => Ok(false),
                };
            }
            Err(error) => return Err(error.to_string().as_str().into()),
        };
        let status = head.code.unwrap_or_default();
        if status < 200 {
            self.input.drain(..length);
            return Ok(false);
        }
        let announced = Body::announced(head.headers)?;
        let body = match status {
            204 | 304 => Body::Length(0),
            _ => announced.unwrap_or(Body::UntilClose),
        };
        self.told = Told::by(&head);
        self.close = head.version == Some(0) || self.told.is_closing || body == Body::UntilClose;
        self.kept = wants(status).then(|| in_full(&head));
        self.input.drain(..length);
        self.state = State::Body(body);
        Ok(body.is_complete())
    }

    fn body(&mut self, mut body: Body, counted: &mut u64) -> Result<bool, Trouble> {
        let mut kept = self.kept.as_mut().map(|answer| &mut answer.body);
        let used = body.take(&self.input, |octets| {
            *counted += octets.len() as u64;
            if let Some(kept) = &mut kept {
                let room = KEPT.saturating_sub(kept.len()).min(octets.len());
                kept.push_str(&String::from_utf8_lossy(&octets[..room]));
            }
        })?;
        self.input.drain(..used);
        self.state = State::Body(body);
        if body.is_complete() {
            return Ok(true);
        }
        match self.read()? {
            0 if body == Body::UntilClose => Ok(true),
            0 => Err(Trouble::Failed("closed".to_owned())),
            _ => Ok(false),
        }
    }
}

impl Told {
    fn by(head: &httparse::Response<'_, '_>) -> Self {
        let mut told = Self {
            status: head.code.unwrap_or_default(),
            ..Self::default()
        };
        for header in head.headers.iter() {
            let value = String::from_utf8_lossy(header.value);
            if header.name.eq_ignore_ascii_case("x-served-by") {
                told.served_by = Some(value.into_owned());
            } else if header.name.eq_ignore_ascii_case("x-client") {
                let address = value.parse::<SocketAddr>().map(|client| client.ip().to_string());
                told.seen_as = Some(address.unwrap_or_else(|_| value.into_owned()));
            } else if header.name.eq_ignore_ascii_case("connection") {
                told.is_closing = value.eq_ignore_ascii_case("close");
            }
        }
        told
    }
}

fn in_full(head: &httparse::Response<'_, '_>) -> Answer {
    let headers = head.headers.iter().map(|header| {
        (
            header.name.to_ascii_lowercase(),
            String::from_utf8_lossy(header.value).into_owned(),
        )
    });
    Answer {
        status: head.code.unwrap_or_default(),
        headers: headers.collect(),
        body: String::new(),
    }
}

fn connecting(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => Err(error),
        _ => Ok(socket),
    }
}

fn request(options: &Options) -> io::Result<Vec<u8>> {
    let host = options
        .host
        .clone()
        .unwrap_or_else(|| options.address.to_string());
    let closing = if options.reconnect {
        "connection: close\r\n"
    } else {
        ""
    };
    let mut text = format!("GET {} HTTP/1.1\r\nhost: {host}\r\n{closing}", options.path);
    for (name, value) in &options.headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let complete = httparse::Request::new(&mut headers).parse(text.as_bytes());
    match complete {
        Ok(Status::Complete(length)) if length == text.len() => Ok(text.into_bytes()),
        _ => Err(io::Error::new(
            ErrorKind::InvalidInput,
            "path, host or a header cannot be sent",
        )),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::http_server::tests::start;
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    fn sum(counts: &BTreeMap<impl Ord, u64>) -> u64 {
        counts.values().sum()
    }

    #[test]
    fn answers_are_counted() {
        let options = Options {
            count: 500,
            connections: 8,
            ..Options::new(start("web"))
        };
        let summary = get(&options).expect("ran");
        assert_eq!(summary.answered, 500);
        assert_eq!(summary.statuses, BTreeMap::from([(200, 500)]));
        assert_eq!(summary.served_by, BTreeMap::from([("web".to_owned(), 500)]));
        assert_eq!(summary.seen_as, BTreeMap::from([("127.0.0.1".to_owned(), 500)]));
        assert!(summary.errors.is_empty() && summary.latency_us.p50 > 0.0);
        let first = summary.first.expect("kept");
        assert_eq!(first.headers["x-served-by"], "web");
        assert!(first.body.starts_with("web answers GET /"), "{first:?}");
    }

    #[test]
    fn requests_can_go_on_for_a_time() {
        let options = Options {
            for_ms: Some(100),
            connections: 2,
            ..Options::new(start("web"))
        };
        let summary = get(&options).expect("ran");
        assert!(summary.answered > 10 && summary.errors.is_empty(), "{summary:?}");
        assert!((100_000..5_000_000).contains(&summary.elapsed_us), "{summary:?}");
    }

    #[test]
    fn a_thousand_connections_are_open_at_once() {
        super::super::raise_open_files();
        let options = Options {
            count: 3000,
            connections: 1000,
            together: true,
            timeout_ms: 60_000,
            ..Options::new(start("web"))
        };
        let summary = get(&options).expect("ran");
        assert_eq!((summary.answered, summary.errors.len()), (3000, 0), "{summary:?}");
        assert_eq!(summary.open_at_once, 1000);
    }

    #[test]
    fn large_bodies_and_new_connections() {
        let options = Options {
            path: "/bytes/300000".to_owned(),
            count: 20,
            connections: 3,
            reconnect: true,
            ..Options::new(start("web"))
        };
        let summary = get(&options).expect("ran");
        assert_eq!((summary.answered, summary.body_octets), (20, 6_000_000));
    }

    #[test]
    fn a_slow_answer_is_a_timeout() {
        let options = Options {
            path: "/slow?ms=5000".to_owned(),
            count: 4,
            connections: 2,
            timeout_ms: 60,
            ..Options::new(start("web"))
        };
        let summary = get(&options).expect("ran");
        assert_eq!(summary.errors, BTreeMap::from([("timeout".to_owned(), 4)]));
        assert_eq!(summary.answered, 0);
    }

    #[test]
    fn nobody_listening_is_refused() {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .expect("address");
        let options = Options {
            count: 6,
            connections: 3,
            together: true,
            ..Options::new(address)
        };
        let summary = get(&options).expect("ran");
        assert_eq!(summary.errors, BTreeMap::from([("refused".to_owned(), 6)]));
    }

    /// A server that gives each connection one of `answers` and closes it.
    fn script(answers: &'static [&'static [u8]]) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let address = listener.local_addr().expect("address");
        std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().expect("accepted");
                let mut request = [0; 1024];
                let _ = stream.read(&mut request);
                stream.write_all(answer).expect("sent");
            }
        });
        address
    }

    #[test]
    fn a_connection_closed_while_idle_is_opened_again() {
        const ONCE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        let options = Options {
            count: 3,
            ..Options::new(script(&[ONCE, ONCE, ONCE]))
        };
        let summary = get(&options).expect("ran");
        assert_eq!((summary.answered, summary.reopened), (3, 2), "{summary:?}");
    }

    #[test]
    fn every_framing_is_understood() {
        let answers: &[&[u8]] = &[
            b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 404 Not Found\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
            b"HTTP/1.0 502 Bad Gateway\r\n\r\nuntil the end",
            b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut",
            b"not http at all\r\n\r\n",
        ];
        let options = Options {
            count: 5,
            ..Options::new(script(answers))
        };
        let summary = get(&options).expect("ran");
        assert_eq!(summary.answered, 3, "{summary:?}");
        assert_eq!(sum(&summary.errors), 2);
        assert_eq!(summary.errors.get("closed"), Some(&1));
        assert_eq!(summary.first.expect("kept").body, "ab");
    }

    #[test]
    fn a_request_that_would_be_two_is_not_sent() {
        let options = Options {
            path: "/ HTTP/1.1\r\n\r\nGET /".to_owned(),
            ..Options::new("127.0.0.1:1".parse().expect("address"))
        };
        assert!(get(&options).is_err());
    }

    #[test]
    fn the_summary_survives_json() {
        let summary = get(&Options::new(start("web"))).expect("ran");
        let text = serde_json::to_string(&summary).expect("written");
        assert_eq!(serde_json::from_str::<Summary>(&text).expect("read"), summary);
    }
}
