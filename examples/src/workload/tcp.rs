//! TCP servers (echo, sink, witness) and clients (send, connect).
//!
//! `tcp-send` writes a pattern that never repeats, closes its half and compares what the sink says about it: number
//! of octets and CRC-32 (ISO-HDLC, as in Ethernet and zip). A lost, doubled, swapped or changed octet shows.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

/// Stack of a thread that serves one connection, octets. Buffers are on the heap.
const STACK: usize = 64 * 1024;
/// Connections that may wait to be accepted: a thousand may come at once.
const BACKLOG: i32 = 4096;

/// Listens on `address` with a long queue. On an IPv6 address it serves IPv6 only.
///
/// # Errors
/// If the address cannot be bound.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Sends every octet back, for ever; a thread for each connection.
///
/// # Errors
/// If accepting fails for good.
pub fn echo(listener: &TcpListener) -> io::Result<()> {
    serve(listener, |mut stream| {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                count => stream.write_all(&buffer[..count])?,
            }
        }
    })
}

/// What a sink received on one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// How many octets.
    pub octets: u64,
    /// Their CRC-32.
    pub crc32: u32,
}

/// Takes octets until the sender closes its half, then answers with [`Received`] as a line of JSON; for ever, a
/// thread for each connection.
///
/// # Errors
/// If accepting fails for good.
pub fn sink(listener: &TcpListener) -> io::Result<()> {
    slow_sink(listener, Duration::ZERO)
}

/// As [`sink`], but looks at each connection only after `pause`: its receive window closes meanwhile.
///
/// # Errors
/// If accepting fails for good.
pub fn slow_sink(listener: &TcpListener, pause: Duration) -> io::Result<()> {
    serve(listener, move |mut stream| {
        thread::sleep(pause);
        let mut checksum = crc32fast::Hasher::new();
        let mut octets = 0;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            checksum.update(&buffer[..count]);
            octets += count as u64;
        }
        let received = Received {
            octets,
            crc32: checksum.finalize(),
        };
        let mut line = serde_json::to_vec(&received).map_err(io::Error::other)?;
        line.push(b'\n');
        stream.write_all(&line)
    })
}

/// What a witness's client says to be reset.
pub const RESET_ME: &str = "reset me";
/// What a witness prints when a connection has ended, followed by `closed` or `reset`.
pub const ENDED: &str = "ended ";

/// Sends every octet back, resets a connection on which [`RESET_ME`] arrives, and prints how each connection ended:
/// `ended closed` or `ended reset`; for ever, a thread for each connection.
///
/// # Errors
/// If accepting fails for good.
pub fn witness(listener: &TcpListener) -> io::Result<()> {
    serve(listener, |mut stream| {
        let end = match witnessed(&mut stream) {
            Ok(()) => "closed".to_owned(),
            Err(error) => reason(&error),
        };
        writeln!(io::stdout().lock(), "{ENDED}{end}")
    })
}

fn witnessed(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [0; 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count if &buffer[..count] == RESET_ME.as_bytes() => return reset_on_close(stream),
            count => stream.write_all(&buffer[..count])?,
        }
    }
}

/// The connection's end will be a RST.
fn reset_on_close(stream: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

fn serve<F>(listener: &TcpListener, work: F) -> io::Result<()>
where
    F: FnOnce(TcpStream) -> io::Result<()> + Copy + Send + 'static,
{
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                // Trouble on a connection ends that connection only.
                let serving = move || drop(work(stream));
                thread::Builder::new().stack_size(STACK).spawn(serving)?;
            }
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ECONNABORTED | Errno::EINTR) => {}
                _ => return Err(error),
            },
        }
    }
}

/// What to send, and how.
#[derive(Args, Clone, Debug)]
pub struct SendOptions {
    /// Address and port of a tcp-sink
    pub address: SocketAddr,
    /// How many octets
    #[arg(long, default_value_t = 100_000_000)]
    pub bytes: u64,
    /// Octets per write
    #[arg(long, default_value_t = 16 * 1024, value_parser = clap::value_parser!(u32).range(1..=16 * 1024 * 1024))]
    pub write: u32,
    /// Congestion control of the connection, for example cubic; the system's if absent
    #[arg(long)]
    pub congestion: Option<String>,
    /// How long connecting, a write or the answer may take, milliseconds
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout_ms: u64,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

impl SendOptions {
    /// `bytes` octets to `address`.
    pub fn new(address: SocketAddr, bytes: u64) -> Self {
        Self {
            address,
            bytes,
            write: 16 * 1024,
            congestion: None,
            timeout_ms: 30_000,
            json: true,
        }
    }
}

/// How sending went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    /// What went out.
    pub sent: Received,
    /// What the sink says it got.
    pub received: Received,
    /// Whether they are the same.
    pub intact: bool,
    /// From the first write to the sink's answer, microseconds.
    pub elapsed_us: u64,
    /// Payload over that time, megabits per second.
    pub mbit_per_s: f64,
}

/// Sends the pattern, closes the sending half and compares the sink's answer. Blocks.
///
/// # Errors
/// If connecting, sending or the answer fails or takes longer than the timeout, or the answer is no sink's.
pub fn send(options: &SendOptions) -> io::Result<Sent> {
    let timeout = Duration::from_millis(options.timeout_ms);
    let mut stream = TcpStream::connect_timeout(&options.address, timeout)?;
    if let Some(name) = &options.congestion {
        setsockopt(&stream, sockopt::TcpCongestion, &name.into())
            .map_err(|errno| io::Error::other(format!("congestion control {name}: {errno}")))?;
    }
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let begun = Instant::now();
    let sent = send_pattern(&mut stream, options.bytes, options.write as usize)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let elapsed = begun.elapsed();
    let received: Received = serde_json::from_str(&answer).map_err(|error| {
        io::Error::new(
            ErrorKind::InvalidData,
            format!("not a sink's answer {answer:?}: {error}"),
        )
    })?;
    Ok(Sent {
        intact: sent == received,
        mbit_per_s: sent.octets as f64 * 8.0 / elapsed.as_secs_f64() / 1e6,
        sent,
        received,
        elapsed_us: u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX),
    })
}

fn send_pattern(stream: &mut TcpStream, octets: u64, write: usize) -> io::Result<Received> {
    let mut checksum = crc32fast::Hasher::new();
    let mut words = Words(0);
    let mut buffer = vec![0; write];
    let mut left = octets;
    while left > 0 {
        let count = write.min(usize::try_from(left).unwrap_or(usize::MAX));
        for word in buffer[..count].chunks_mut(8) {
            word.copy_from_slice(&words.next().to_le_bytes()[..word.len()]);
        }
        checksum.update(&buffer[..count]);
        stream.write_all(&buffer[..count])?;
        left -= count as u64;
    }
    Ok(Received {
        octets,
        crc32: checksum.finalize(),
    })
}

/// The sequence splitmix64: no period within any amount one would send.
struct Words(u64);

impl Words {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

/// Where to connect, and what to look for.
#[derive(Args, Clone, Debug)]
pub struct ConnectOptions {
    /// Address and port
    pub address: SocketAddr,
    /// Send this text and wait for an octet of answer; without, the connection is closed at once
    #[arg(long)]
    pub say: Option<String>,
    /// Reset the connection after the answer instead of closing it
    #[arg(long, requires = "say")]
    pub reset: bool,
    /// How long connecting, and then the answer, may take, milliseconds
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout_ms: u64,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// What became of a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connected {
    /// In one word.
    pub outcome: Outcome,
    /// The system's words, if it failed.
    pub reason: Option<String>,
    /// How long connecting took, or trying to, milliseconds.
    pub connect_ms: f64,
    /// The beginning of the answer (at most 1024 octets).
    pub answer: Option<String>,
}

/// What became of a connection, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was established; nothing was asked (no `--say`).
    Connected,
    /// It was established and the peer answered.
    Answered,
    /// It was established and closed by the peer without an answer.
    Closed,
    /// It was established and reset by the peer.
    Reset,
    /// It was established and the peer said nothing within the time.
    Silent,
    /// It was refused with a RST.
    Refused,
    /// Nothing came back.
    Timeout,
    /// The network said that there is no way.
    Unreachable,
    /// Something else; see the reason.
    Other,
}

/// Opens a connection and tells what became of it. Blocks for twice the timeout at most.
pub fn connect(options: &ConnectOptions) -> Connected {
    let timeout = Duration::from_millis(options.timeout_ms);
    let begun = Instant::now();
    let stream = TcpStream::connect_timeout(&options.address, timeout);
    let connect_ms = begun.elapsed().as_secs_f64() * 1e3;
    let told = |outcome, reason: Option<io::Error>, answer| Connected {
        outcome,
        reason: reason.map(|error| error.to_string()),
        connect_ms,
        answer,
    };
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => return told(refusal(&error), Some(error), None),
    };
    let Some(text) = &options.say else {
        return told(Outcome::Connected, None, None);
    };
    match ask(stream, text, timeout, options.reset) {
        Ok(answer) if answer.is_empty() => told(Outcome::Closed, None, None),
        Ok(answer) => told(Outcome::Answered, None, Some(answer)),
        Err(error) => {
            let outcome = match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Outcome::Silent,
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Outcome::Reset,
                _ => Outcome::Other,
            };
            told(outcome, Some(error), None)
        }
    }
}

fn ask(mut stream: TcpStream, text: &str, timeout: Duration, reset: bool) -> io::Result<String> {
    stream.set_read_timeout(Some(timeout))?;
    stream.write_all(text.as_bytes())?;
    let mut answer = [0; 1024];
    let count = stream.read(&mut answer)?;
    if reset {
        reset_on_close(&stream)?;
    }
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}

fn refusal(error: &io::Error) -> Outcome {
    match error.kind() {
        ErrorKind::ConnectionRefused => Outcome::Refused,
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Timeout,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Outcome::Unreachable,
        ErrorKind::ConnectionReset => Outcome::Reset,
        _ => Outcome::Other,
    }
}

/// Why a request failed, as a key of a table of counts.
pub(super) fn reason(error: &io::Error) -> String {
    match refusal(error) {
        Outcome::Refused => "refused".to_owned(),
        Outcome::Timeout => "timeout".to_owned(),
        Outcome::Unreachable => "unreachable".to_owned(),
        Outcome::Reset => "reset".to_owned(),
        _ if error.kind() == ErrorKind::BrokenPipe => "reset".to_owned(),
        _ => format!("other: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    fn start(serve: fn(&TcpListener) -> io::Result<()>, address: &str) -> SocketAddr {
        let listener = listen(address.parse().expect("address")).expect("bound");
        let address = listener.local_addr().expect("address");
        thread::spawn(move || serve(&listener));
        address
    }

    fn connect_options(address: SocketAddr, say: Option<&str>) -> ConnectOptions {
        ConnectOptions {
            address,
            say: say.map(str::to_owned),
            reset: false,
            timeout_ms: 300,
            json: true,
        }
    }

    #[test]
    fn a_hundred_megabytes_arrive_intact() {
        let sent = send(&SendOptions::new(start(sink, "127.0.0.1:0"), 100_000_000)).expect("sent");
        assert!(sent.intact, "{sent:?}");
        assert_eq!(sent.received.octets, 100_000_000);
    }

    #[test]
    fn odd_sizes_and_ipv6() {
        let sink = start(sink, "[::1]:0");
        for (bytes, write) in [(0, 1), (1, 8), (1001, 7), (65_537, 65_536)] {
            let options = SendOptions {
                write,
                congestion: Some("cubic".to_owned()),
                ..SendOptions::new(sink, bytes)
            };
            let sent = send(&options).expect("sent");
            assert!(sent.intact, "{sent:?}");
        }
    }

    #[test]
    fn a_changed_octet_shows() {
        // A sink behind a wire that changes one octet.
        let sink = start(sink, "127.0.0.1:0");
        let wire = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = wire.local_addr().expect("address");
        thread::spawn(move || -> io::Result<()> {
            let (mut near, _) = wire.accept()?;
            let mut far = TcpStream::connect(sink)?;
            let mut octets = Vec::new();
            near.read_to_end(&mut octets)?;
            octets[5000] ^= 1;
            far.write_all(&octets)?;
            far.shutdown(std::net::Shutdown::Write)?;
            io::copy(&mut far, &mut near).map(drop)
        });
        let sent = send(&SendOptions::new(address, 10_000)).expect("sent");
        assert!(!sent.intact, "{sent:?}");
    }

    #[test]
    fn an_answer_that_is_no_sinks_is_an_error() {
        let address = start(echo, "127.0.0.1:0");
        let error = send(&SendOptions::new(address, 100)).expect_err("echoes");
        assert_eq!(error.kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn outcomes_are_told_apart() {
        let echo = start(echo, "127.0.0.1:0");
        let outcome = |address, say| connect(&connect_options(address, say)).outcome;
        assert_eq!(outcome(echo, None), Outcome::Connected);
        assert_eq!(
            connect(&connect_options(echo, Some("hello"))).answer.as_deref(),
            Some("hello")
        );
        let silent = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).expect("bound");
        assert_eq!(
            outcome(silent.local_addr().expect("address"), Some("hello")),
            Outcome::Silent
        );
        let closer = listen("127.0.0.1:0".parse().expect("address")).expect("bound");
        let address = closer.local_addr().expect("address");
        let server = thread::spawn(move || {
            let (mut stream, _) = closer.accept()?;
            stream.read_exact(&mut [0; 5])?;
            drop(stream);
            let (stream, _) = closer.accept()?;
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))
        });
        assert_eq!(outcome(address, Some("hello")), Outcome::Closed);
        assert_eq!(outcome(address, Some("hello")), Outcome::Reset);
        server.join().expect("no panic").expect("no error");
        assert_eq!(outcome(address, Some("hello")), Outcome::Refused);
    }
}
