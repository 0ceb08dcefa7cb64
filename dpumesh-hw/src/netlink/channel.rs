//! One netlink conversation: bytes out, replies in, until the kernel has acknowledged.
//!
//! A request is one datagram holding one message (or, for nf_tables, a batch of them). The kernel answers every
//! message that asked for it with `NLMSG_ERROR` (code 0: acknowledged), a listing with many messages and
//! `NLMSG_DONE`. With extended acknowledgements it adds a sentence saying what it did not like.

use std::fmt;
use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR,
    NLMSG_NOOP, NLMSG_OVERRUN, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr};
use socket2::SockRef;

/// Octets of `struct nlmsghdr`: length (4), type (2), flags (2), sequence (4), port (4), host byte order.
pub(super) const HEADER: usize = 16;
/// The kernel answers at once; this bound only keeps a kernel bug from hanging us.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Attribute of an extended acknowledgement: the kernel's sentence.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A netlink socket and the sequence number of its next message.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Socket,
    sequence: u32,
}

/// Body of one message from the kernel that is neither error nor end mark. Its kind is what was asked for.
pub(super) type Reply = Vec<u8>;

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The kernel refused; its own sentence, if it gave one.
    Kernel { errno: i32, message: Option<String> },
    /// The socket failed.
    Io(io::Error),
    /// The listed objects changed while they were listed.
    Interrupted,
    /// The kernel's answer makes no sense.
    Malformed(&'static str),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel { errno, message: None } => write!(f, "{}", io::Error::from_raw_os_error(*errno)),
            Self::Kernel {
                errno,
                message: Some(message),
            } => {
                write!(f, "{}: {message}", io::Error::from_raw_os_error(*errno))
            }
            Self::Io(error) => error.fmt(f),
            Self::Interrupted => f.write_str("kept changing while it was listed"),
            Self::Malformed(what) => write!(f, "malformed netlink answer: {what}"),
        }
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Channel {
    pub(super) fn open(protocol: isize) -> Result<Self, Failure> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        SockRef::from(&socket).set_read_timeout(Some(ANSWER_LIMIT))?;
        // Both only improve messages; kernels older than 4.12 do without.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 1 })
    }

    /// Sends the messages in `packet`, numbering them, and collects what comes back until each message that asked
    /// for an answer has got it. The first refusal is returned, after all answers have been read.
    pub(super) fn request(&mut self, mut packet: Vec<u8>) -> Result<Vec<Reply>, Failure> {
        let first = self.sequence;
        let expected = number(&mut packet, &mut self.sequence)?;
        self.socket.send(&packet, 0)?;
        let mut conversation = Conversation {
            first,
            open: expected,
            replies: Vec::new(),
            failure: None,
        };
        while !conversation.open.is_empty() {
            let (datagram, _) = self.socket.recv_from_full().map_err(|error| {
                if error.kind() == io::ErrorKind::WouldBlock {
                    Failure::Malformed("none came")
                } else {
                    error.into()
                }
            })?;
            conversation.read(&datagram)?;
        }
        conversation.failure.map_or(Ok(conversation.replies), Err)
    }
}

/// Gives each message of `packet` its sequence number and returns those that will be answered.
fn number(packet: &mut [u8], sequence: &mut u32) -> Result<Vec<u32>, Failure> {
    let mut expected = Vec::new();
    let mut rest = packet;
    while !rest.is_empty() {
        let length = rest.first_chunk().map_or(0, |length| u32::from_ne_bytes(*length)) as usize;
        if length < HEADER || length > rest.len() {
            return Err(Failure::Malformed("request length"));
        }
        let flags = u16::from_ne_bytes([rest[6], rest[7]]);
        rest[8..12].copy_from_slice(&sequence.to_ne_bytes());
        if flags & (NLM_F_ACK | NLM_F_DUMP) != 0 {
            expected.push(*sequence);
        }
        *sequence = sequence.wrapping_add(1);
        let taken = aligned(length).min(rest.len());
        rest = &mut rest[taken..];
    }
    Ok(expected)
}

/// What has been heard so far in answer to one packet.
struct Conversation {
    first: u32,
    /// Sequence numbers still waiting for their acknowledgement or end mark.
    open: Vec<u32>,
    replies: Vec<Reply>,
    failure: Option<Failure>,
}

impl Conversation {
    fn read(&mut self, mut datagram: &[u8]) -> Result<(), Failure> {
        while datagram.len() >= HEADER {
            let (length, kind, flags, sequence) = header(datagram);
            if length < HEADER || length > datagram.len() {
                return Err(Failure::Malformed("message length"));
            }
            let payload = &datagram[HEADER..length];
            // An answer to an earlier request that was given up is not ours.
            if sequence.wrapping_sub(self.first) < u32::MAX / 2 {
                self.take(kind, flags, sequence, payload)?;
            }
            datagram = &datagram[aligned(length).min(datagram.len())..];
        }
        Ok(())
    }

    fn take(&mut self, kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Result<(), Failure> {
        if flags & NLM_F_DUMP_INTR != 0 {
            self.fail(Failure::Interrupted);
        }
        match kind {
            NLMSG_NOOP => {}
            NLMSG_OVERRUN => return Err(Failure::Malformed("overrun")),
            NLMSG_DONE => {
                self.end(sequence, code(payload).unwrap_or(0), None);
            }
            NLMSG_ERROR => {
                let errno = code(payload).ok_or(Failure::Malformed("short acknowledgement"))?;
                self.end(sequence, errno, sentence(flags, payload));
            }
            _ => self.replies.push(payload.to_vec()),
        }
        Ok(())
    }

    /// `code` is 0 or a negated errno.
    fn end(&mut self, sequence: u32, code: i32, message: Option<String>) {
        let expected = self.open.contains(&sequence);
        self.open.retain(|open| *open != sequence);
        if code < 0 {
            self.fail(Failure::Kernel {
                errno: code.saturating_neg(),
                message,
            });
            // A refusal of the frame around a batch, which asked for no answer, is the last word on all of it.
            if !expected {
                self.open.clear();
            }
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.failure.get_or_insert(failure);
    }
}

fn header(message: &[u8]) -> (usize, u16, u16, u32) {
    let word =
        |at: usize| u32::from_ne_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]]);
    let half = |at: usize| u16::from_ne_bytes([message[at], message[at + 1]]);
    (word(0) as usize, half(4), half(6), word(8))
}

fn code(payload: &[u8]) -> Option<i32> {
    payload.first_chunk().map(|code| i32::from_ne_bytes(*code))
}

/// The kernel's sentence in an extended acknowledgement: behind the code and the header of the refused message,
/// whose body the kernel leaves out if it says so.
fn sentence(flags: u16, payload: &[u8]) -> Option<String> {
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    let refused = if flags & NLM_F_CAPPED != 0 {
        HEADER
    } else {
        code(payload.get(4..)?)? as usize
    };
    let attributes = payload.get(4usize.checked_add(aligned(refused))?..)?;
    NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| {
            String::from_utf8_lossy(attribute.value())
                .trim_end_matches('\0')
                .to_owned()
        })
}

/// Messages begin at multiples of four octets.
pub(super) fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn conversation(open: &[u32]) -> Conversation {
        Conversation {
            first: 1,
            open: open.to_vec(),
            replies: Vec::new(),
            failure: None,
        }
    }

    #[test]
    fn messages_are_numbered_and_the_answered_ones_awaited() {
        let mut packet = message(16, 0, 0, &[1, 2, 3]);
        packet.extend(message(17, NLM_F_ACK, 0, &[]));
        let mut sequence = 7;
        assert_eq!(number(&mut packet, &mut sequence).expect("well formed"), [8]);
        assert_eq!(sequence, 9);
        assert_eq!(header(&packet).3, 7);
    }

    #[test]
    fn an_acknowledgement_ends_its_message_only() {
        let mut heard = conversation(&[1, 2]);
        heard.read(&message(NLMSG_ERROR, 0, 1, &[0; 20])).expect("read");
        assert_eq!(heard.open, [2]);
        assert!(heard.failure.is_none());
    }

    #[test]
    fn the_kernels_sentence_is_kept() {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend([0; HEADER]);
        payload.extend(12u16.to_ne_bytes());
        payload.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
        payload.extend(b"bad mtu\0");
        let mut heard = conversation(&[1]);
        heard
            .read(&message(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, 1, &payload))
            .expect("read");
        let failure = heard.failure.expect("refused").to_string();
        assert!(failure.ends_with("bad mtu"), "{failure}");
    }

    #[test]
    fn a_refused_batch_frame_ends_the_whole_batch() {
        let mut heard = conversation(&[2, 3]);
        let mut payload = (-libc::EPERM).to_ne_bytes().to_vec();
        payload.extend([0; HEADER]);
        heard.read(&message(NLMSG_ERROR, 0, 1, &payload)).expect("read");
        assert!(heard.open.is_empty() && heard.failure.is_some());
    }

    #[test]
    fn no_truncation_panics() {
        let mut whole = message(20, 0, 1, &[9; 33]);
        whole.extend(message(NLMSG_ERROR, NLM_F_ACK_TLVS, 1, &[0xff; 41]));
        for length in 0..whole.len() {
            let mut heard = conversation(&[1]);
            let _ = heard.read(&whole[..length]);
        }
    }
}
