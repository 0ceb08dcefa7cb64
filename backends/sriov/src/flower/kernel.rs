//! [`Kernel`]: the seam between steering and rtnetlink. [`Socket`] is the real one; tests script their own.

use std::fmt;
use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket as RawSocket, SocketAddr};
use socket2::SockRef;

use super::octets::{attributes, text, u16_at, u32_at};

/// One rtnetlink message to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `RTM_NEWTFILTER` and the like.
    pub kind: u16,
    /// `NLM_F_*` beside `NLM_F_REQUEST` and, unless it is a dump, `NLM_F_ACK`.
    pub flags: u16,
    /// Fixed part and attributes.
    pub body: Vec<u8>,
}

/// One rtnetlink message from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `RTM_NEWTFILTER` and the like.
    pub kind: u16,
    /// Fixed part and attributes.
    pub body: Vec<u8>,
}

/// The kernel's no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Positive errno.
    pub errno: i32,
    /// Its sentence, if it gave one.
    pub message: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from_raw_os_error(self.errno);
        match &self.message {
            Some(message) => write!(f, "{error}: {message}"),
            None => error.fmt(f),
        }
    }
}

impl std::error::Error for Refusal {}

/// What came back for one request.
pub type Answer = Result<Vec<Message>, Refusal>;

/// rtnetlink of one network namespace.
pub trait Kernel: Send + fmt::Debug {
    /// Hands requests over, in order, and waits for what comes of each. A refused one does not keep the others back.
    ///
    /// # Errors
    /// When the link to the kernel itself failed; then nobody can tell what took effect.
    fn exchange(&mut self, requests: &[Request]) -> io::Result<Vec<Answer>>;
}

const HEADER: usize = 16;
const ERROR_MESSAGE: u16 = 1;
/// Requests that are in flight at a time: their echoes have to fit the socket's buffer.
const IN_FLIGHT: usize = 32;
/// Wanted size of that buffer, octets.
const BUFFER: usize = 4 << 20;
/// The kernel answers at once; this bound only keeps a kernel bug from hanging us.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A socket to rtnetlink. It stays in the namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    socket: RawSocket,
    sequence: u32,
}

impl Socket {
    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// If the kernel gives no netlink socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = RawSocket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        SockRef::from(&socket).set_read_timeout(Some(ANSWER_LIMIT))?;
        // All three only make it smoother.
        let _ = SockRef::from(&socket).set_recv_buffer_size(BUFFER);
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 1 })
    }

    fn chunk(&mut self, requests: &[Request]) -> io::Result<Vec<Answer>> {
        let first = self.sequence;
        let mut packet = Vec::with_capacity(
            requests
                .iter()
                .map(|request| request.body.len() + HEADER + 4)
                .sum(),
        );
        for request in requests {
            self.write(request, &mut packet);
        }
        self.socket.send(&packet, 0)?;
        let mut answers: Vec<Answer> = requests.iter().map(|_| Ok(Vec::new())).collect();
        let mut open = requests.len();
        while open > 0 {
            let (datagram, _) = self.socket.recv_from_full()?;
            open = open.saturating_sub(read(&datagram, first, &mut answers)?);
        }
        Ok(answers)
    }

    fn write(&mut self, request: &Request, packet: &mut Vec<u8>) {
        let ack = if request.flags & NLM_F_DUMP == NLM_F_DUMP {
            0
        } else {
            NLM_F_ACK
        };
        let length = (HEADER + request.body.len()) as u32; // some kilobytes
        packet.extend(length.to_ne_bytes());
        packet.extend(request.kind.to_ne_bytes());
        packet.extend((request.flags | NLM_F_REQUEST | ack).to_ne_bytes());
        packet.extend(self.sequence.to_ne_bytes());
        packet.extend([0; 4]);
        packet.extend(&request.body);
        packet.resize(packet.len().next_multiple_of(4), 0);
        self.sequence = self.sequence.wrapping_add(1);
    }
}

impl Kernel for Socket {
    fn exchange(&mut self, requests: &[Request]) -> io::Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(requests.len());
        for chunk in requests.chunks(IN_FLIGHT) {
            answers.extend(self.chunk(chunk)?);
        }
        Ok(answers)
    }
}

/// Takes a datagram in; returns how many requests it ended.
fn read(mut datagram: &[u8], first: u32, answers: &mut [Answer]) -> io::Result<usize> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed netlink answer");
    let mut ended = 0;
    while datagram.len() >= HEADER {
        let length = u32_at(datagram, 0).ok_or_else(malformed)? as usize;
        let (kind, flags) = (u16_at(datagram, 4).unwrap_or(0), u16_at(datagram, 6).unwrap_or(0));
        let sequence = u32_at(datagram, 8).unwrap_or(0);
        let payload = datagram.get(HEADER..length).ok_or_else(malformed)?;
        // An answer to an earlier request that was given up is not ours.
        if let Some(answer) = answers.get_mut(sequence.wrapping_sub(first) as usize) {
            match kind {
                NLMSG_ERROR | NLMSG_DONE => {
                    ended += 1;
                    let code = u32_at(payload, 0).unwrap_or(0) as i32;
                    if code < 0 {
                        *answer = Err(Refusal {
                            errno: code.saturating_neg(),
                            message: sentence(flags, payload),
                        });
                    }
                }
                _ => {
                    if let Ok(messages) = answer {
                        messages.push(Message {
                            kind,
                            body: payload.to_vec(),
                        });
                    }
                }
            }
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(ended)
}

/// The kernel's sentence in an extended acknowledgement.
fn sentence(flags: u16, payload: &[u8]) -> Option<String> {
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let refused = match flags & NLM_F_CAPPED {
        0 => u32_at(payload, 4)? as usize,
        _ => HEADER,
    };
    let behind = payload.get(refused.next_multiple_of(4).checked_add(4)?..)?;
    let (_, value) = attributes(behind).find(|(kind, _)| *kind == ERROR_MESSAGE)?;
    text(value).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut octets = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        octets.extend(kind.to_ne_bytes());
        octets.extend(flags.to_ne_bytes());
        octets.extend(sequence.to_ne_bytes());
        octets.extend([0; 4]);
        octets.extend(payload);
        octets.resize(octets.len().next_multiple_of(4), 0);
        octets
    }

    #[test]
    fn answers_go_to_their_requests_and_one_refusal_spares_the_others() {
        let mut answers: Vec<Answer> = vec![Ok(Vec::new()), Ok(Vec::new())];
        let mut datagram = message(44, 0, 7, &[1; 20]);
        datagram.extend(message(NLMSG_ERROR, 0, 7, &0_i32.to_ne_bytes()));
        let mut refusal = (-libc::EEXIST).to_ne_bytes().to_vec();
        refusal.extend([0; HEADER]);
        refusal.extend([11, 0, 1, 0]);
        refusal.extend(b"exists\0");
        datagram.extend(message(NLMSG_ERROR, NLM_F_ACK_TLVS | NLM_F_CAPPED, 8, &refusal));
        datagram.extend(message(44, 0, 3, &[9; 20]));
        assert_eq!(read(&datagram, 7, &mut answers).expect("well formed"), 2);
        assert_eq!(answers[0].as_ref().expect("done").len(), 1);
        let refusal = answers[1].as_ref().expect_err("refused");
        assert_eq!(
            (refusal.errno, refusal.message.as_deref()),
            (libc::EEXIST, Some("exists"))
        );
    }

    #[test]
    fn no_truncation_panics() {
        let mut whole = message(44, 0, 1, &[9; 33]);
        whole.extend(message(NLMSG_ERROR, NLM_F_ACK_TLVS, 1, &[0xff; 41]));
        for length in 0..whole.len() {
            let mut answers: Vec<Answer> = vec![Ok(Vec::new())];
            let _ = read(&whole[..length], 1, &mut answers);
        }
    }
}
