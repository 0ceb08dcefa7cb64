//! What plugin and node agent say to each other, over a UNIX socket that only root can open.
//!
//! ```text
//! frame   length of the body in octets (u32, big endian, at most 256 KiB) · body: JSON
//! ask     {"version":1,"body":{"attach":{…}}}
//! answer  {"version":1,"body":{"attached":{…}}}   or   {"version":1,"body":{"refused":{"code","msg","details"}}}
//! ```
//! One connection carries the asks of one call of the plugin, one after the other. **An ADD is one conversation**: when the
//! connection ends between `attach` and the answer to `bind`, the agent undoes the attachment, whatever became of the plugin.
//!
//! A DEL while no agent answers leaves a **note**, an empty file `deleted/<container>@<interface>` beside the socket
//! ([`note_of`]). The agent reads notes before it serves anybody, and removes each when its work is done.
//!
//! Both programs come from one package but are replaced at different moments, so each frame names its version. An agent
//! answers every version from [`VERSION_MIN`]; a plugin that is answered in a version it does not speak says so. Unknown
//! fields are refused: a field that one side relies on must not be dropped by the other in silence.

use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use dpumesh_core::pci::PciAddress;
use dpumesh_core::{DpuId, MacAddr, Mtu, PortRef};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::protocol::{Error, ValidAttachment, code};

/// The version that this code speaks.
pub const VERSION: u32 = 1;
/// The oldest that it still speaks.
pub const VERSION_MIN: u32 = 1;
/// Longest body, octets.
pub const MAX_BODY: usize = 256 << 10;

/// Where DELs wait for an agent that is away.
pub fn notes_of(socket: &Path) -> PathBuf {
    socket.with_file_name("deleted")
}

/// The note that this attachment is to be taken away.
pub fn note_of(socket: &Path, key: &AttachmentKey) -> PathBuf {
    // Neither a container id nor an interface name holds `/`, and the former no `@`.
    notes_of(socket).join(format!("{}@{}", key.container, key.ifname))
}

/// The attachment that a note speaks of.
pub fn key_of(note: &Path) -> Option<AttachmentKey> {
    let (container, ifname) = note.file_name()?.to_str()?.split_once('@')?;
    Some(AttachmentKey {
        container: container.to_owned(),
        ifname: ifname.to_owned(),
    })
}

/// Which attachment: a container's interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachmentKey {
    /// The runtime's name of the container (the sandbox).
    pub container: String,
    /// The interface in it.
    pub ifname: String,
}

impl std::fmt::Display for AttachmentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.container, self.ifname)
    }
}

/// Who a pod is, as far as the runtime says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodName {
    /// Its name; a container's name outside Kubernetes.
    pub name: String,
    /// Its namespace; empty outside Kubernetes.
    pub namespace: String,
    /// Its uid; empty where the runtime does not tell.
    pub uid: String,
}

impl std::fmt::Display for PodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What a plugin asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Lease a VF and move it into the pod under its final name. Nothing passes yet.
    Attach(Attach),
    /// The pod has these addresses now: open its port in the dataplane, wait until it is governed, install its rules.
    Bind {
        /// Which attachment.
        key: AttachmentKey,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// Take an attachment away. One that is not there is no error.
    Detach {
        /// Which attachment.
        key: AttachmentKey,
    },
    /// Is everything of this attachment as it was made?
    Check {
        /// Which attachment.
        key: AttachmentKey,
        /// Where it ought to be.
        netns: PathBuf,
        /// The addresses it ought to have.
        addresses: Vec<IpAddr>,
    },
    /// Could an ADD be served?
    Status,
    /// Take away every attachment of a network that is not listed.
    Collect {
        /// Name of the network.
        network: String,
        /// Those that stay.
        valid: Vec<ValidAttachment>,
    },
}

/// The first half of an ADD.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Which attachment.
    pub key: AttachmentKey,
    /// Name of the network, for GC.
    pub network: String,
    /// Path of the pod's namespace.
    pub netns: PathBuf,
    /// Who the pod is.
    pub pod: PodName,
    /// The MAC that it asks for.
    pub mac: Option<MacAddr>,
    /// The MTU that it asks for.
    pub mtu: Option<Mtu>,
    /// The device that it was promised.
    pub device: Option<PciAddress>,
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To `attach`.
    Attached(Attached),
    /// To `bind`.
    Bound {
        /// The pod's program is acknowledged and its rules are installed. `false`: it is closed until then.
        governed: bool,
    },
    /// To everything else that worked.
    Done,
    /// It did not work.
    Refused(Error),
}

/// The VF in the pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attached {
    /// Of which card.
    pub dpu: DpuId,
    /// Which VF.
    pub port: PortRef,
    /// Its PCI address, where there is one.
    pub pci: Option<PciAddress>,
    /// Its MAC.
    pub mac: MacAddr,
    /// Its MTU.
    pub mtu: Mtu,
}

/// A frame's body.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<T> {
    version: u32,
    body: T,
}

/// The version alone, whatever else a newer peer writes.
#[derive(Deserialize)]
struct VersionOnly {
    #[serde(default)]
    version: u32,
}

/// Writes a message as one frame.
///
/// # Errors
/// Those of the socket; `InvalidInput` when it is longer than [`MAX_BODY`].
pub fn write<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    to.write_all(&encode(message)?)?;
    to.flush()
}

/// Reads one frame; `None` when the peer has ended the connection between two.
///
/// # Errors
/// Those of the socket; `InvalidData` for a frame that is too long, no message, or of a version that is not spoken.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    if from.read(&mut length[..1])? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut length[1..])?;
    let mut body = vec![0; body_length(length)?];
    from.read_exact(&mut body)?;
    decode(&body).map(Some)
}

/// A message as one frame.
///
/// # Errors
/// `InvalidInput` when it is longer than [`MAX_BODY`].
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let envelope = Envelope {
        version: VERSION,
        body: message,
    };
    let body = serde_json::to_vec(&envelope)?;
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_BODY);
    let Some(length) = length else {
        let message = format!("a message of {} octets is longer than {MAX_BODY}", body.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    };
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(body);
    Ok(frame)
}

/// Length of the body that follows a frame's first four octets.
///
/// # Errors
/// `InvalidData` when it is longer than [`MAX_BODY`].
pub fn body_length(octets: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(octets) as usize;
    if length > MAX_BODY {
        let message = format!("a message of {length} octets is longer than {MAX_BODY}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(length)
}

/// A message from a frame's body.
///
/// # Errors
/// `InvalidData`: no message, or of a version that is not spoken here; the text names both.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> io::Result<T> {
    let invalid = |message| io::Error::new(io::ErrorKind::InvalidData, message);
    let version = serde_json::from_slice(body)
        .map(|VersionOnly { version }| version)
        .map_err(|error| invalid(format!("no message: {error}")))?;
    if !(VERSION_MIN..=VERSION).contains(&version) {
        return Err(invalid(format!(
            "plugin and agent do not understand each other: one speaks version {version}, the other \
             {VERSION_MIN} to {VERSION}; install both from the same release"
        )));
    }
    serde_json::from_slice(body)
        .map(|Envelope { body, .. }| body)
        .map_err(|error| invalid(format!("no message: {error}")))
}

/// What a plugin tells the runtime when the conversation broke off.
pub fn broken(error: &io::Error) -> Error {
    let message = format!("the node agent broke off: {error}");
    Error::new(code::TRY_AGAIN, message).details("see its log; it undoes what was not finished")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ask() -> Ask {
        Ask::Bind {
            key: AttachmentKey {
                container: "c1".to_owned(),
                ifname: "eth0".to_owned(),
            },
            addresses: vec!["10.244.1.2".parse().expect("an address")],
        }
    }

    #[test]
    fn a_frame_is_length_version_and_message() {
        let frame = encode(&ask()).expect("short");
        assert_eq!(
            frame.len(),
            4 + body_length(frame[..4].try_into().expect("four")).expect("short")
        );
        let text = std::str::from_utf8(&frame[4..]).expect("JSON");
        assert!(text.starts_with(r#"{"version":1,"body":{"bind":"#), "{text}");
        let mut two = frame.clone();
        two.extend(&frame);
        let mut from = two.as_slice();
        assert_eq!(read::<Ask>(&mut from).expect("sound"), Some(ask()));
        assert_eq!(read::<Ask>(&mut from).expect("sound"), Some(ask()));
        assert_eq!(read::<Ask>(&mut from).expect("ended"), None);
    }

    #[test]
    fn a_note_names_its_attachment() {
        let Ask::Bind { key, .. } = ask() else {
            panic!("a bind");
        };
        let note = note_of(Path::new("/run/dpumesh/agent.sock"), &key);
        assert_eq!(note, Path::new("/run/dpumesh/deleted/c1@eth0"));
        assert_eq!(key_of(&note), Some(key));
        assert_eq!(key_of(Path::new("/run/dpumesh/deleted/.swp")), None);
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let error = decode::<Ask>(br#"{"version":7,"body":"status","new":1}"#).expect_err("newer");
        assert!(error.to_string().contains("version 7"), "{error}");
        assert!(error.to_string().contains("1 to 1"), "{error}");
    }

    #[test]
    fn unknown_fields_and_long_frames_are_refused() {
        let unknown = br#"{"version":1,"body":{"detach":{"key":{"container":"c","ifname":"e","moon":1}}}}"#;
        assert!(
            decode::<Ask>(unknown)
                .expect_err("unknown")
                .to_string()
                .contains("moon")
        );
        assert!(body_length([0xff; 4]).is_err());
    }

    proptest! {
        #[test]
        fn a_truncated_frame_is_an_error_at_every_length(cut in 1usize..60) {
            let frame = encode(&ask()).expect("short");
            let cut = cut.min(frame.len() - 1);
            prop_assert!(read::<Ask>(&mut &frame[..cut]).is_err());
        }

        #[test]
        fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = decode::<Ask>(&body);
        }
    }
}
