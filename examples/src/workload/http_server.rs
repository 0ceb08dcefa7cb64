//! An HTTP/1.1 server on one thread: epoll, keep-alive, pipelining, thousands of connections.
//!
//! | path | answer |
//! |---|---|
//! | `/bytes/N` | a body of N octets |
//! | `/slow?ms=N` | the usual answer, N milliseconds later |
//! | `/status/N` | the usual body with status N (200 to 599) |
//! | `/headers` | the head of the request, as it arrived |
//! | anything else | `NAME answers METHOD PATH to CLIENT`, the client's address as the server sees it |
//!
//! Each answer also carries the headers `x-served-by` (the name) and `x-client` (the address). Bodies of requests are
//! read and thrown away. One connection's life is a `Connection`; [`Server::serve`] only waits and wakes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use httparse::Status;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::http_body::Body;
use super::tcp;

/// Longest head of a request, octets.
const HEAD: usize = 64 * 1024;
/// Most headers in one request.
const HEADERS: usize = 100;
/// Longest pause of `/slow`, milliseconds.
const PAUSE: u64 = 600_000;
/// The listener's token; connections count from 1.
const LISTENER: u64 = 0;
/// What `/bytes/N` is made of.
static FILLER: [u8; 64 * 1024] = [b'x'; 64 * 1024];

/// A listening server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    name: String,
}

impl Server {
    /// Listens on `address`; answers will carry `name`.
    ///
    /// # Errors
    /// If the address cannot be bound, or the name is no header value.
    pub fn bind(address: SocketAddr, name: &str) -> io::Result<Self> {
        if name.is_empty() || !name.bytes().all(|octet| octet.is_ascii_graphic()) {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!("server name {name:?} must be visible ASCII without spaces"),
            ));
        }
        let listener = tcp::listen(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            name: name.to_owned(),
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves for ever on the calling thread.
    ///
    /// # Errors
    /// If waiting for events fails; trouble on a connection ends that connection only.
    pub fn serve(self) -> io::Result<()> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&self.listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        let mut worker = Worker {
            server: self,
            epoll,
            connections: HashMap::new(),
            pauses: BinaryHeap::new(),
            last_token: LISTENER,
            listening: true,
        };
        loop {
            worker.turn()?;
        }
    }
}

struct Worker {
    server: Server,
    epoll: Epoll,
    connections: HashMap<u64, Connection>,
    /// When a paused connection goes on. A connection that has ended meanwhile is not found any more.
    pauses: BinaryHeap<Reverse<(Instant, u64)>>,
    last_token: u64,
    /// False while there are no descriptors left for new connections.
    listening: bool,
}

impl Worker {
    /// Waits once and serves what is ready.
    fn turn(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        let count = match self.epoll.wait(&mut events, self.patience()) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept()?,
                token => self.advance(
                    token,
                    event
                        .events()
                        .intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP),
                )?,
            }
        }
        self.end_pauses()
    }

    fn patience(&self) -> EpollTimeout {
        let Some(Reverse((due, _))) = self.pauses.peek() else {
            return EpollTimeout::NONE;
        };
        let millis = due.saturating_duration_since(Instant::now()).as_millis() + 1;
        EpollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
    }

    fn end_pauses(&mut self) -> io::Result<()> {
        while let Some(&Reverse((due, token))) = self.pauses.peek() {
            if due > Instant::now() {
                break;
            }
            self.pauses.pop();
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.end_pause(&self.server.name);
                self.advance(token, false)?;
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            match self.server.listener.accept() {
                Ok((stream, client)) => self.admit(stream, client)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    // No descriptors: wait until a connection ends.
                    Some(Errno::EMFILE | Errno::ENFILE) => return self.listen(false),
                    // The client gave up before it was accepted.
                    Some(Errno::ECONNABORTED | Errno::EINTR) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn listen(&mut self, listening: bool) -> io::Result<()> {
        let interest = if listening {
            EpollFlags::EPOLLIN
        } else {
            EpollFlags::empty()
        };
        self.epoll
            .modify(&self.server.listener, &mut EpollEvent::new(interest, LISTENER))?;
        self.listening = listening;
        Ok(())
    }

    fn admit(&mut self, stream: TcpStream, client: SocketAddr) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        self.last_token += 1;
        self.epoll
            .add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, self.last_token))?;
        let connection = Connection::new(stream, client);
        self.connections.insert(self.last_token, connection);
        Ok(())
    }

    fn advance(&mut self, token: u64, broken: bool) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        let wait = if broken {
            None
        } else {
            connection.advance(&self.server.name).unwrap_or(None)
        };
        let interest = match wait {
            None => {
                // Closing the socket takes it out of the epoll set.
                self.connections.remove(&token);
                return if self.listening { Ok(()) } else { self.listen(true) };
            }
            Some(Wait::Readable) => EpollFlags::EPOLLIN,
            Some(Wait::Writable) => EpollFlags::EPOLLOUT,
            Some(Wait::Until(due)) => {
                self.pauses.push(Reverse((due, token)));
                EpollFlags::empty()
            }
        };
        if connection.interest != interest {
            connection.interest = interest;
            self.epoll
                .modify(&connection.stream, &mut EpollEvent::new(interest, token))?;
        }
        Ok(())
    }
}

/// What a connection waits for.
enum Wait {
    Readable,
    Writable,
    Until(Instant),
}

/// Where a connection stands in its present request.
enum Phase {
    Head,
    Body(Request, Body),
    Pause(Request, Instant),
}

struct Connection {
    stream: TcpStream,
    client: SocketAddr,
    interest: EpollFlags,
    phase: Phase,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of `output` is sent.
    sent: usize,
    /// Octets of filler to send after `output`.
    filler: u64,
    /// Close when everything is sent.
    last: bool,
}

/// What is kept of a request's head.
struct Request {
    method: String,
    path: String,
    head: Vec<u8>,
    keep_alive: bool,
}

impl Connection {
    fn new(stream: TcpStream, client: SocketAddr) -> Self {
        Self {
            stream,
            client,
            interest: EpollFlags::EPOLLIN,
            phase: Phase::Head,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            filler: 0,
            last: false,
        }
    }

    /// Goes on as far as possible. `None`: the connection is over.
    fn advance(&mut self, name: &str) -> io::Result<Option<Wait>> {
        let mut drained = false;
        loop {
            while self.step(name) {}
            if !self.flush()? {
                return Ok(Some(Wait::Writable));
            }
            if self.last {
                return Ok(None);
            }
            if let Phase::Pause(_, due) = self.phase {
                return Ok(Some(Wait::Until(due)));
            }
            if drained {
                return Ok(Some(Wait::Readable));
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    self.input.extend_from_slice(&piece[..count]);
                    // What came meanwhile, the next wait tells: it looks at levels, not edges.
                    drained = count < piece.len();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(Wait::Readable)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Works on what has been read; false if more must be read or written first.
    fn step(&mut self, name: &str) -> bool {
        if self.filler > 0 || self.last || self.output.len() > FILLER.len() {
            return false;
        }
        match std::mem::replace(&mut self.phase, Phase::Head) {
            Phase::Head => self.read_head(name),
            Phase::Body(request, body) => self.read_body(name, request, body),
            pause @ Phase::Pause(..) => {
                self.phase = pause;
                false
            }
        }
    }

    fn read_head(&mut self, name: &str) -> bool {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut head = httparse::Request::new(&mut headers);
        let length = match head.parse(&self.input) {
            Ok(Status::Complete(length)) => length,
            Ok(Status::Partial) if self.input.len() <= HEAD => return false,
            Ok(Status::Partial) => return self.refuse(name, 431, "head too long"),
            Err(error) => return self.refuse(name, 400, &error.to_string()),
        };
        let body = match Body::announced(head.headers) {
            Ok(body) => body.unwrap_or(Body::Length(0)),
            Err(reason) => return self.refuse(name, 400, reason),
        };
        let has = |name: &str, value: &[u8]| {
            head.headers.iter().any(|header| {
                header.name.eq_ignore_ascii_case(name) && header.value.eq_ignore_ascii_case(value)
            })
        };
        let request = Request {
            method: head.method.unwrap_or_default().to_owned(),
            path: head.path.unwrap_or_default().to_owned(),
            head: self.input[..length].to_vec(),
            keep_alive: if head.version == Some(1) {
                !has("connection", b"close")
            } else {
                has("connection", b"keep-alive")
            },
        };
        if has("expect", b"100-continue") && !body.is_complete() {
            self.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        self.input.drain(..length);
        self.phase = Phase::Body(request, body);
        true
    }

    fn read_body(&mut self, name: &str, request: Request, mut body: Body) -> bool {
        match body.take(&self.input, |_| {}) {
            Ok(used) => drop(self.input.drain(..used)),
            Err(reason) => return self.refuse(name, 400, reason),
        }
        if !body.is_complete() {
            self.phase = Phase::Body(request, body);
            return false;
        }
        match pause_of(&request.path) {
            Some(pause) => {
                self.phase = Phase::Pause(request, Instant::now() + pause);
                false
            }
            None => {
                self.answer(name, &request);
                true
            }
        }
    }

    fn end_pause(&mut self, name: &str) {
        if let Phase::Pause(request, _) = std::mem::replace(&mut self.phase, Phase::Head) {
            self.answer(name, &request);
        }
    }

    fn answer(&mut self, name: &str, request: &Request) {
        let number = |prefix: &str| request.path.strip_prefix(prefix)?.parse::<u64>().ok();
        self.last = !request.keep_alive;
        let with_body = request.method != "HEAD";
        if let Some(count) = number("/bytes/") {
            self.head(name, 200, count);
            self.filler = if with_body { count } else { 0 };
            return;
        }
        let status = number("/status/").filter(|status| (200..=599).contains(status));
        let body = if request.path == "/headers" {
            request.head.clone()
        } else {
            format!(
                "{name} answers {} {} to {}\n",
                request.method,
                request.path,
                self.client.ip()
            )
            .into_bytes()
        };
        self.head(name, status.unwrap_or(200), body.len() as u64);
        if with_body && !matches!(status, Some(204 | 304)) {
            self.output.extend_from_slice(&body);
        }
    }

    fn refuse(&mut self, name: &str, status: u64, reason: &str) -> bool {
        self.last = true;
        self.head(name, status, reason.len() as u64 + 1);
        self.output.extend_from_slice(reason.as_bytes());
        self.output.push(b'\n');
        false
    }

    fn head(&mut self, name: &str, status: u64, length: u64) {
        let reason = match status {
            200 => "OK",
            204 => "No Content",
            304 => "Not Modified",
            400 => "Bad Request",
            404 => "Not Found",
            431 => "Request Header Fields Too Large",
            500 => "Internal Server Error",
            503 => "Service Unavailable",
            _ => "As Asked",
        };
        let client = self.client;
        let closing = if self.last { "connection: close\r\n" } else { "" };
        // RFC 9110 §8.6: no length with 204.
        let length = if status == 204 {
            String::new()
        } else {
            format!("content-length: {length}\r\n")
        };
        let head = format!(
            "HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain\r\n{length}x-served-by: {name}\r\n\
             x-client: {client}\r\n{closing}\r\n"
        );
        self.output.extend_from_slice(head.as_bytes());
    }

    /// Sends what is to be sent; false if the socket takes no more now.
    fn flush(&mut self) -> io::Result<bool> {
        while self.sent < self.output.len() || self.filler > 0 {
            let from_output = self.sent < self.output.len();
            let piece = if from_output {
                &self.output[self.sent..]
            } else {
                &FILLER[..FILLER
                    .len()
                    .min(usize::try_from(self.filler).unwrap_or(usize::MAX))]
            };
            match self.stream.write(piece) {
                Ok(count) if from_output => self.sent += count,
                Ok(count) => self.filler -= count as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(true)
    }
}

fn pause_of(path: &str) -> Option<Duration> {
    let millis: u64 = path.strip_prefix("/slow?ms=")?.parse().ok()?;
    Some(Duration::from_millis(millis.min(PAUSE)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A server that lives as long as the test process.
    pub(crate) fn start(name: &str) -> SocketAddr {
        let server = Server::bind("127.0.0.1:0".parse().expect("address"), name).expect("bound");
        let address = server.address().expect("address");
        std::thread::spawn(move || server.serve());
        address
    }

    fn talk(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).expect("connected");
        stream.set_read_timeout(Some(DEADLINE)).expect("set");
        stream.write_all(request).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered and closed");
        answer
    }

    #[test]
    fn pipelined_requests_are_answered_in_order() {
        let answer = talk(
            start("web"),
            b"GET /1 HTTP/1.1\r\nhost: a\r\n\r\nPOST /2 HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc\
              POST /3 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n\
              GET /slow?ms=30 HTTP/1.1\r\n\r\nHEAD /5 HTTP/1.1\r\n\r\nGET /6 HTTP/1.0\r\n\r\n",
        );
        let bodies: Vec<&str> = answer
            .lines()
            .filter(|line| line.starts_with("web answers"))
            .collect();
        assert_eq!(
            bodies,
            [
                "web answers GET /1 to 127.0.0.1",
                "web answers POST /2 to 127.0.0.1",
                "web answers POST /3 to 127.0.0.1",
                "web answers GET /slow?ms=30 to 127.0.0.1",
                "web answers GET /6 to 127.0.0.1"
            ]
        );
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 6, "{answer}");
        assert_eq!(answer.matches("x-served-by: web").count(), 6);
    }

    #[test]
    fn paths_do_what_they_say() {
        let web = start("web");
        let get = |path: &str| {
            talk(
                web,
                format!("GET {path} HTTP/1.1\r\nconnection: close\r\nx-a: b\r\n\r\n").as_bytes(),
            )
        };
        assert_eq!(
            get("/bytes/200000").split("\r\n\r\n").nth(1).map(str::len),
            Some(200_000)
        );
        assert!(get("/status/503").starts_with("HTTP/1.1 503 Service Unavailable\r\n"));
        assert!(!get("/status/204").contains("content-length"));
        assert!(get("/headers").contains("x-a: b"));
        let before = Instant::now();
        get("/slow?ms=50");
        assert!(before.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn expect_is_answered_before_the_body_comes() {
        let mut stream = TcpStream::connect(start("web")).expect("connected");
        stream.set_read_timeout(Some(DEADLINE)).expect("set");
        let head =
            b"PUT / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\nconnection: close\r\n\r\n";
        stream.write_all(head).expect("sent");
        let mut interim = [0; 25];
        stream.read_exact(&mut interim).expect("told to go on");
        assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
        stream.write_all(b"ab").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        assert!(answer.starts_with("HTTP/1.1 200 OK"));
    }

    #[test]
    fn malformed_requests_are_refused() {
        let web = start("web");
        assert!(talk(web, b"nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
        assert!(talk(web, b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n").starts_with("HTTP/1.1 400"));
        let long = [b"GET / HTTP/1.1\r\na: ", [b'a'; HEAD + 1].as_slice()].concat();
        assert!(talk(web, &long).starts_with("HTTP/1.1 431"));
    }

    #[test]
    fn a_name_must_fit_a_header() {
        let address = "127.0.0.1:0".parse().expect("address");
        assert!(Server::bind(address, "a\r\nb: c").is_err());
        assert!(Server::bind(address, "").is_err());
    }
}
