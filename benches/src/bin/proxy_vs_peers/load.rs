//! What puts a proxy to work: wrk and h2load by duration; clients of our own for handshakes, paced requests, many addresses,
//! one large answer, and connections that do nothing. Any answer but a 200 fails the run.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::Result;
use crate::machine::{find, pinned};
use crate::trust::HOST;

pub(crate) const CONNECTIONS: usize = 32;
pub(crate) const BULK_OCTETS: usize = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Requests that wrk had answered, over keep-alive connections.
pub(crate) fn wrk(scheme: &str, address: SocketAddr, seconds: u32, processor: usize) -> Result<u64> {
    let wrk = find("wrk").ok_or("wrk is not there")?;
    let output = pinned(processor, &wrk)
        .args(["-t1", "-c", &CONNECTIONS.to_string(), &format!("-d{seconds}s")])
        .args(["--timeout", &format!("{}s", PATIENCE.as_secs())])
        .arg(format!("{scheme}://{address}/"))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        return Err(format!("wrong answers:\n{text}").into());
    }
    let line = text.lines().find(|line| line.contains("requests in"));
    let count = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    count.ok_or_else(|| format!("wrk said:\n{text}").into())
}

/// Requests that h2load had answered, by 8 HTTP/2 connections with 16 streams each, with prior knowledge.
pub(crate) fn h2load(address: SocketAddr, seconds: u32, processor: usize) -> Result<u64> {
    let h2load = find("h2load").ok_or("h2load is not there")?;
    let output = pinned(processor, &h2load)
        .args(["-t1", "-c8", "-m16", "-D", &seconds.to_string()])
        .arg(format!("http://{address}/"))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    // "status codes: 12345 2xx, 0 3xx, 0 4xx, 0 5xx"
    let line = text.lines().find(|line| line.starts_with("status codes:"));
    let counts: Vec<u64> = line
        .into_iter()
        .flat_map(str::split_whitespace)
        .filter_map(|word| word.parse().ok())
        .collect();
    match counts[..] {
        [good, 0, 0, 0] if good > 0 => Ok(good),
        _ => Err(format!("h2load said:\n{text}").into()),
    }
}

/// A client's connection, in clear text or with TLS.
pub(crate) struct Client {
    stream: Box<dyn Stream>,
    read: Vec<u8>,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Client {
    /// Connects; with a configuration the handshake is done as well.
    pub(crate) fn connect(address: SocketAddr, tls: Option<&Arc<ClientConfig>>) -> Result<Self> {
        let mut tcp = TcpStream::connect(address)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(tcp),
            Some(config) => {
                let mut tls = ClientConnection::new(Arc::clone(config), ServerName::try_from(HOST)?)?;
                while tls.is_handshaking() {
                    tls.complete_io(&mut tcp)?;
                }
                Box::new(StreamOwned::new(tls, tcp))
            }
        };
        Ok(Self {
            stream,
            read: vec![0; 256 << 10],
        })
    }

    pub(crate) fn send(&mut self, path: &str) -> Result<()> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
        self.stream.write_all(request.as_bytes())?;
        Ok(self.stream.flush()?)
    }

    /// Reads one answer; how many octets its body has.
    pub(crate) fn receive(&mut self) -> Result<usize> {
        let mut filled = 0;
        let (head, length) = loop {
            let more = self.stream.read(&mut self.read[filled..])?;
            if more == 0 {
                return Err("the connection ended within an answer".into());
            }
            filled += more;
            let text = &self.read[..filled];
            if let Some(end) = text.windows(4).position(|four| four == b"\r\n\r\n") {
                break (end + 4, content_length(&text[..end])?);
            }
        };
        let mut left = (head + length).saturating_sub(filled);
        while left > 0 {
            let most = left.min(self.read.len());
            match self.stream.read(&mut self.read[..most])? {
                0 => return Err("the connection ended within a body".into()),
                more => left -= more,
            }
        }
        Ok(length)
    }
}

fn content_length(head: &[u8]) -> Result<usize> {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    if !head.starts_with("http/1.1 200 ") {
        return Err(format!("a wrong answer:\n{head}").into());
    }
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    Ok(length.ok_or("an answer without content-length")?.trim().parse()?)
}

/// New connections with a full handshake and one request each, one after another.
pub(crate) fn handshakes(address: SocketAddr, tls: &Arc<ClientConfig>, lasting: Duration) -> Result<u64> {
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < lasting {
        let mut client = Client::connect(address, Some(tls))?;
        client.send("/")?;
        client.receive()?;
        count += 1;
    }
    Ok(count)
}

/// Requests on one connection to each of these addresses, all sent before the first answer is read, again and again.
pub(crate) fn in_turns(addresses: &[SocketAddr], lasting: Duration) -> Result<u64> {
    let mut clients: Vec<Client> = addresses
        .iter()
        .map(|address| Client::connect(*address, None))
        .collect::<Result<_>>()?;
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < lasting {
        for client in &mut clients {
            client.send("/")?;
        }
        for client in &mut clients {
            client.receive()?;
            count += 1;
        }
    }
    Ok(count)
}

/// The time that each answer took, microseconds, of a request sent every millisecond on one connection.
pub(crate) fn paced(address: SocketAddr, tls: Option<&Arc<ClientConfig>>, requests: u32) -> Result<Vec<f64>> {
    let mut client = Client::connect(address, tls)?;
    client.send("/")?;
    client.receive()?;
    let begun = Instant::now();
    let mut taken = Vec::with_capacity(requests as usize);
    for request in 0..requests {
        let due = begun + Duration::from_millis(1) * request;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let sent = Instant::now();
        client.send("/")?;
        client.receive()?;
        taken.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    Ok(taken)
}

/// Gigabits per second of one large answer.
pub(crate) fn bulk(address: SocketAddr, tls: Option<&Arc<ClientConfig>>) -> Result<f64> {
    let mut client = Client::connect(address, tls)?;
    let begun = Instant::now();
    client.send("/bulk")?;
    let octets = client.receive()?;
    if octets != BULK_OCTETS {
        return Err(format!("{octets} octets came, of {BULK_OCTETS}").into());
    }
    Ok(octets as f64 * 8.0 / begun.elapsed().as_secs_f64() / 1e9)
}
