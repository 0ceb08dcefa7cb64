//! [`AgentSocket`]: where plugins call. Mode 0600, and only root and the agent's own user are listened to.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::geteuid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Node;
use crate::protocol::{Error, code};
use crate::talk::{self, Answer, Ask, AttachmentKey};

/// Longest wait at the end for conversations that go on.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after an accept that failed, as when descriptors have run out.
const BREATH: Duration = Duration::from_millis(100);

/// A socket that plugins can reach; its file goes with it.
#[derive(Debug)]
pub struct AgentSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[error("--socket {}: {error}", path.display())]
pub struct SocketError {
    path: PathBuf,
    error: io::Error,
}

impl AgentSocket {
    /// Listens at a path, in place of whatever socket a dead agent left there. The folder is made, for this user alone, when it
    /// is not there.
    ///
    /// The file appears with its permissions: it is made under another name and renamed.
    ///
    /// # Errors
    /// Folder or socket cannot be made.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError {
            path: path.to_owned(),
            error,
        };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.ok_or_else(|| failed(io::Error::other("must be an absolute path")))?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(failed)?;
        let new = folder.join(format!(".agent-{}.sock", std::process::id()));
        let make = || {
            let _ = fs::remove_file(&new); // of an agent that had the same number
            let listener = UnixListener::bind(&new)?;
            fs::set_permissions(&new, Permissions::from_mode(0o600))?;
            fs::rename(&new, path)?;
            Ok(listener)
        };
        let listener = make().map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Serves plugins until `shutdown` is ready, then waits a little for conversations that go on. Attachments stay.
    pub async fn serve(self, node: Arc<Node>, shutdown: impl Future<Output = ()>) {
        let mut conversations = JoinSet::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        conversations.spawn(converse(Arc::clone(&node), stream));
                    }
                    Err(error) => {
                        tracing::error!("accept a plugin: {error}");
                        tokio::time::sleep(BREATH).await;
                    }
                },
                Some(_) = conversations.join_next() => {}
            }
        }
        let _ = fs::remove_file(&self.path); // a plugin that comes now shall leave a note
        let drained = async { while conversations.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::warn!("conversations were broken off: the next agent takes back what they left");
        }
    }
}

async fn converse(node: Arc<Node>, stream: UnixStream) {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == geteuid().as_raw() => {}
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "a stranger called");
            return;
        }
        Err(error) => {
            tracing::warn!("who calls? {error}");
            return;
        }
    }
    let (from, to) = stream.into_split();
    let mut conversation = Conversation {
        node,
        from,
        to,
        unfinished: None,
    };
    if let Err(error) = conversation.run().await {
        tracing::warn!("a plugin broke off: {error}");
    }
    if let Some(key) = conversation.unfinished {
        tracing::info!(%key, "its ADD broke off: undone");
        if let Err(error) = conversation.node.detach(&key).await {
            tracing::error!(%key, "cannot be undone yet: {error}");
        }
    }
}

struct Conversation {
    node: Arc<Node>,
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    /// The attachment whose ADD is under way.
    unfinished: Option<AttachmentKey>,
}

impl Conversation {
    async fn run(&mut self) -> io::Result<()> {
        while let Some(ask) = self.next().await? {
            let ask = match ask {
                Ok(ask) => ask,
                Err(error) => {
                    let refusal = Error::new(code::DECODE, error.to_string());
                    return self.answer(&Answer::Refused(refusal)).await;
                }
            };
            let answer = self.handle(ask).await?;
            self.answer(&answer).await?;
            // Only an answer that was delivered is an ADD that the plugin knows of.
            if matches!(answer, Answer::Bound { .. }) {
                self.unfinished = None;
            }
        }
        Ok(())
    }

    /// The next ask; `None` at the end, an inner error for one that was not understood.
    async fn next(&mut self) -> io::Result<Option<io::Result<Ask>>> {
        let mut length = [0; 4];
        if self.from.read(&mut length[..1]).await? == 0 {
            return Ok(None);
        }
        self.from.read_exact(&mut length[1..]).await?;
        let length = match talk::body_length(length) {
            Ok(length) => length,
            Err(error) => return Ok(Some(Err(error))),
        };
        let mut body = vec![0; length];
        self.from.read_exact(&mut body).await?;
        Ok(Some(talk::decode(&body)))
    }

    /// Works on an ask to its end, even when the plugin goes meanwhile: a VF on its way is not dropped.
    async fn handle(&mut self, ask: Ask) -> io::Result<Answer> {
        let (leave, gone) = watch::channel(false);
        let started = match &ask {
            Ask::Attach(ask) => Some(ask.key.clone()),
            _ => None,
        };
        let ended = matches!(&ask, Ask::Detach { key } if Some(key) == self.unfinished.as_ref());
        let node = Arc::clone(&self.node);
        let mut work = tokio::spawn(async move { node.handle(ask, gone).await });
        let mut octet = [0];
        let (done, closed) = tokio::select! {
            done = &mut work => (done, None),
            read = self.from.read(&mut octet) => {
                leave.send_replace(true);
                let why = match read {
                    Ok(0) => io::Error::from(io::ErrorKind::UnexpectedEof),
                    Ok(_) => io::Error::new(io::ErrorKind::InvalidData, "it spoke out of turn"),
                    Err(error) => error,
                };
                ((&mut work).await, Some(why))
            }
        };
        let answer = done.map_err(|_| io::Error::other("the agent's work broke off"))?;
        if matches!(answer, Answer::Attached(_)) {
            self.unfinished = started;
        } else if ended && answer == Answer::Done {
            self.unfinished = None;
        }
        match closed {
            Some(why) => Err(why),
            None => Ok(answer),
        }
    }

    async fn answer(&mut self, answer: &Answer) -> io::Result<()> {
        self.to.write_all(&talk::encode(answer)?).await
    }
}
