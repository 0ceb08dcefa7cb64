//! UDP echo server and client.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use clap::Args;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::measure::Percentiles;

/// Sends every datagram back, for ever.
///
/// # Errors
/// If receiving fails; an answer that cannot be sent is left out.
pub fn echo(socket: &UdpSocket) -> io::Result<()> {
    let mut datagram = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut datagram) {
            // Like any datagram, an answer may be lost.
            Ok((count, from)) => drop(socket.send_to(&datagram[..count], from)),
            // An earlier answer met a closed port.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
    }
}

/// What to send, and how.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Address and port of a udp-echo
    pub address: SocketAddr,
    /// How many datagrams
    #[arg(long, default_value_t = 1)]
    pub count: u64,
    /// Octets of payload in each, at least 8
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(8..=65_507))]
    pub octets: u16,
    /// How long to wait for each answer, milliseconds
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout_ms: u64,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// How many questions were answered; also what [`ping`](super::ping) tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// Questions sent.
    pub sent: u64,
    /// Questions answered in time, octet for octet.
    pub answered: u64,
    /// Questions that the network refused (port or host unreachable).
    pub refused: u64,
    /// Questions that are longer than the path to the peer carries, as the network said (ICMP).
    pub too_big: u64,
    /// From question to answer, microseconds.
    pub latency_us: Percentiles,
}

/// Sends datagrams one after the other and waits for each to come back. Blocks.
///
/// # Errors
/// If there is no socket or no route; silence and ICMP errors are counts in the summary.
pub fn send(options: &Options) -> io::Result<Answers> {
    let any: SocketAddr = if options.address.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(options.address)?;
    let timeout = Duration::from_millis(options.timeout_ms);
    question(options.count, timeout, |number, deadline| {
        let mut datagram: Vec<u8> = (0..options.octets).map(|index| index as u8).collect();
        datagram[..8].copy_from_slice(&number.to_be_bytes());
        socket.send(&datagram)?;
        let mut answer = vec![0; 65_536];
        loop {
            socket.set_read_timeout(Some(left(deadline)?))?;
            let count = socket.recv(&mut answer)?;
            if answer[..count] == datagram {
                return Ok(());
            }
        }
    })
}

/// Asks `count` times and sums up; `ask` gets the number of the question and the end of its time.
pub(super) fn question(
    count: u64,
    timeout: Duration,
    mut ask: impl FnMut(u64, Instant) -> io::Result<()>,
) -> io::Result<Answers> {
    let mut answers = Answers::default();
    let mut latencies = Vec::new();
    for number in 0..count {
        let begun = Instant::now();
        let outcome = ask(number, begun + timeout);
        answers.sent += 1;
        match outcome.map_err(|error| (error.kind(), error)) {
            Ok(()) => {
                answers.answered += 1;
                latencies.push(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
            Err((ErrorKind::WouldBlock | ErrorKind::TimedOut, _)) => {}
            Err((
                ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable,
                _,
            )) => answers.refused += 1,
            Err((_, error)) if is_too_big(&error) => answers.too_big += 1,
            Err((_, error)) => return Err(error),
        }
    }
    answers.latency_us = Percentiles::of(&mut latencies);
    Ok(answers)
}

fn is_too_big(error: &io::Error) -> bool {
    error.raw_os_error().map(Errno::from_raw) == Some(Errno::EMSGSIZE)
}

/// The time until `deadline`, or that it has passed.
pub(super) fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(address: SocketAddr) -> Options {
        Options {
            address,
            count: 5,
            octets: 100,
            timeout_ms: 2000,
            json: true,
        }
    }

    #[test]
    fn datagrams_come_back() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let socket = UdpSocket::bind(address).expect("bound");
            let address = socket.local_addr().expect("address");
            std::thread::spawn(move || echo(&socket));
            let answers = send(&options(address)).expect("sent");
            assert_eq!((answers.sent, answers.answered, answers.refused), (5, 5, 0));
        }
    }

    #[test]
    fn silence_and_refusal_are_counted() {
        let silent = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let address = silent.local_addr().expect("address");
        let short = Options {
            timeout_ms: 20,
            ..options(address)
        };
        let answers = send(&short).expect("sent");
        assert_eq!((answers.sent, answers.answered, answers.refused), (5, 0, 0));
        drop(silent);
        let answers = send(&options(address)).expect("sent");
        assert_eq!((answers.answered, answers.refused), (0, 5), "{answers:?}");
    }
}
