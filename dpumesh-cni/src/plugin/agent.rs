//! The plugin's end of the conversation with the node agent.

use std::fs::{self, File};
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use crate::protocol::{Error, NetConf, code};
use crate::talk::{self, Answer, Ask, AttachmentKey};

/// A conversation.
#[derive(Debug)]
pub(super) struct Agent {
    stream: UnixStream,
}

impl Agent {
    /// Calls the agent. Whoever answers must be root or this user: a stranger's socket gives no pod an address.
    pub(super) fn connect(conf: &NetConf) -> Result<Self, Error> {
        Self::call(&conf.socket, conf.timeout).map_err(|error| away(&conf.socket, &error))
    }

    fn call(socket: &Path, timeout: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let peer = getsockopt(&stream, PeerCredentials)?.uid();
        if peer != 0 && peer != geteuid().as_raw() {
            let message = format!("it belongs to user {peer}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Self { stream })
    }

    /// Asks and waits for the answer, no longer than the time given. What the agent refuses is an error.
    pub(super) fn ask(&mut self, ask: &Ask) -> Result<Answer, Error> {
        let exchanged = talk::write(&mut self.stream, ask).and_then(|()| talk::read(&mut self.stream));
        match exchanged {
            Ok(Some(Answer::Refused(error))) => Err(error),
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(talk::broken(&io::Error::from(io::ErrorKind::UnexpectedEof))),
            Err(error) => {
                // A late answer must not be taken for that to the next question. That it is closed already is no news.
                let _ = self.stream.shutdown(Shutdown::Both);
                Err(talk::broken(&error))
            }
        }
    }
}

/// Takes an attachment away, by the agent if it is there, else by a note that it finds before it serves anybody again.
///
/// So pods can end while the agent is away. Nothing of theirs is given to another pod before the agent has read the note:
/// only the agent gives.
pub(super) fn detach(conf: &NetConf, key: &AttachmentKey) -> Result<(), Error> {
    match Agent::call(&conf.socket, conf.timeout) {
        Ok(mut agent) => agent.ask(&Ask::Detach { key: key.clone() }).map(drop),
        Err(error) if is_away(&error) => note(&conf.socket, key).map_err(|failed| {
            let path = talk::note_of(&conf.socket, key);
            away(&conf.socket, &error).details(format_args!("{}: {failed}", path.display()))
        }),
        Err(error) => Err(away(&conf.socket, &error)),
    }
}

fn is_away(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn note(socket: &Path, key: &AttachmentKey) -> io::Result<()> {
    let folder = talk::notes_of(socket);
    match fs::create_dir(&folder) {
        // A host on which no agent has ever run has nothing to take away.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    File::create(talk::note_of(socket, key))?.sync_all()?;
    File::open(folder)?.sync_all()
}

fn away(socket: &Path, error: &io::Error) -> Error {
    let message = format!(
        "the node agent at {} cannot be reached: {error}",
        socket.display()
    );
    Error::new(code::TRY_AGAIN, message)
        .details("is istio-dpu-agent running, and is agentSocket its --socket?")
}

pub(super) fn unexpected() -> Error {
    Error::new(
        code::AGENT,
        "the node agent answered something else than was asked",
    )
    .details("install plugin and agent from the same release")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_ends_while_the_agent_is_away_and_leaves_a_note() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("agent.sock");
        let text = format!(
            r#"{{"cniVersion":"1.0.0","name":"mesh","agentSocket":{:?}}}"#,
            socket.to_str().expect("text")
        );
        let conf = NetConf::parse(text.as_bytes()).expect("a configuration");
        let key = AttachmentKey {
            container: "c1".to_owned(),
            ifname: "eth0".to_owned(),
        };
        for _ in 0..2 {
            detach(&conf, &key).expect("noted");
        }
        assert!(folder.path().join("deleted/c1@eth0").exists());
        // A socket of a dead agent refuses; one that was never made is not there.
        drop(std::os::unix::net::UnixListener::bind(&socket).expect("bound"));
        detach(&conf, &key).expect("noted");
        assert_eq!(Agent::connect(&conf).expect_err("dead").code, code::TRY_AGAIN);
    }

    #[test]
    fn where_no_agent_ever_ran_there_is_nothing_to_note() {
        let text = r#"{"cniVersion":"1.0.0","name":"mesh","agentSocket":"/nowhere/at/all/agent.sock"}"#;
        let conf = NetConf::parse(text.as_bytes()).expect("a configuration");
        let key = AttachmentKey {
            container: "c1".to_owned(),
            ifname: "eth0".to_owned(),
        };
        assert_eq!(detach(&conf, &key), Ok(()));
    }
}
