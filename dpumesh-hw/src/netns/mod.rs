//! Network namespaces as values.
//!
//! A [`Namespace`] is an open file descriptor: the namespace lives as long as somebody holds one (or a process or
//! an interface in it does) and it has no name anywhere, so that a killed process leaves nothing behind.
//!
//! A namespace is a property of a *thread*. This module therefore never switches the caller's thread behind its
//! back: [`Namespace::run`] uses a thread of its own, [`Namespace::spawn`] starts a process from one, and only
//! [`Namespace::enter_thread`] moves the caller, for good, which is what a worker of the proxy wants. A socket stays
//! in the namespace it was made in, whichever thread uses it later.
//!
//! [`user`] gets the rights for all this without root; [`process`] ties children to their parent's life;
//! [`testing`] runs tests that need namespaces.

#![forbid(unsafe_code)]

pub mod process;
pub mod testing;
pub mod user;

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

pub use user::{Privilege, PrivilegeError, ensure_privilege};

/// A network namespace, held open by this value.
///
/// Dropping the last handle destroys the namespace and the virtual interfaces in it, unless a process, a socket or
/// another handle still holds it. Destruction is done by the kernel in the background and may take some milliseconds.
///
/// ```no_run
/// use dpumesh_hw::netns::Namespace;
///
/// let pod = Namespace::create()?;
/// let interfaces = pod.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
/// assert!(interfaces.contains("lo:"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Namespace {
    fd: OwnedFd,
    id: NamespaceId,
}

/// The kernel's identity of a namespace (device and inode of its nsfs file): equal exactly if the namespace is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl NamespaceId {
    /// The number that `ls -l /proc/PID/ns/net` shows in brackets.
    pub fn inode(self) -> u64 {
        self.inode
    }
}

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// A namespace operation that failed: which, on what, and why.
#[derive(Debug, thiserror::Error)]
#[error("{operation} network namespace {object}: {source}{}", advice(.source))]
pub struct NamespaceError {
    operation: &'static str,
    object: String,
    source: io::Error,
}

impl NamespaceError {
    fn new(operation: &'static str, object: impl fmt::Display, source: impl Into<io::Error>) -> Self {
        Self {
            operation,
            object: object.to_string(),
            source: source.into(),
        }
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            " (needs CAP_SYS_ADMIN: run as root, or call netns::ensure_privilege first thing in main)"
        }
        Some(libc::ENOSPC) => " (limit reached: see /proc/sys/user/max_net_namespaces)",
        Some(libc::EMFILE) => " (too many open files: see RLIMIT_NOFILE)",
        Some(libc::EINVAL) => " (not a network namespace, or not supported by this kernel)",
        _ => "",
    }
}

thread_local! {
    /// The namespace this thread was moved into by `enter_thread`; `None`: never moved.
    static ENTERED: Cell<Option<NamespaceId>> = const { Cell::new(None) };
}

impl Namespace {
    /// Makes a new, empty namespace with its loopback interface up. Blocks for well under a millisecond.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, or beyond the user's limit of namespaces.
    pub fn create() -> Result<Self, NamespaceError> {
        let made = on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|errno| NamespaceError::new("create", "(new)", errno))?;
            raise_loopback().map_err(|error| NamespaceError::new("raise lo in", "(new)", error))?;
            Self::current()
        });
        made.map_err(|error| NamespaceError::new("create", "(new)", error))?
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// If `/proc` is not mounted or descriptors have run out.
    pub fn current() -> Result<Self, NamespaceError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Opens a namespace by path: `/proc/PID/ns/net`, a bind mount such as `/run/netns/NAME` (a CNI runtime passes
    /// one), or what [`path`](Self::path) returned.
    ///
    /// # Errors
    /// If the path cannot be opened, or is no network namespace (found when it is first entered).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NamespaceError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|error| NamespaceError::new("open", path.display(), error))?;
        Self::from_fd(file.into())
    }

    /// Takes over a descriptor, for example one received from another process.
    ///
    /// # Errors
    /// If the descriptor cannot be examined.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NamespaceError> {
        let file = File::from(fd);
        let metadata = file
            .metadata()
            .map_err(|error| NamespaceError::new("examine", "(descriptor)", error))?;
        let id = NamespaceId {
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        Ok(Self { fd: file.into(), id })
    }

    /// A second handle on the same namespace.
    ///
    /// # Errors
    /// If descriptors have run out.
    pub fn try_clone(&self) -> Result<Self, NamespaceError> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|error| NamespaceError::new("duplicate handle of", self.id, error))?;
        Ok(Self { fd, id: self.id })
    }

    /// The kernel's identity of this namespace.
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// A path by which another process of the same user can enter it while this value lives: `/proc/<pid>/fd/<n>`,
    /// as in `nsenter --net=<path>`. If that process is in a [user namespace](user) of its own, the namespace can be
    /// entered only through that: `nsenter --user=/proc/<pid>/ns/user --preserve-credentials --net=<path>`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()))
    }

    /// Runs `work` inside the namespace, on a thread made for it, and returns its value. Blocks until it is done.
    /// Sockets and files that it opens may be returned and used anywhere. A panic in `work` goes on in the caller.
    ///
    /// # Errors
    /// If the namespace cannot be entered or no thread can be started; `work` has not run then.
    pub fn run<T, F>(&self, work: F) -> Result<T, NamespaceError>
    where
        T: Send,
        F: FnOnce() -> T + Send,
    {
        on_own_thread(|| {
            self.enter_thread()?;
            Ok(work())
        })
        .map_err(|error| NamespaceError::new("start thread for", self.id, error))?
    }

    /// Starts a process inside the namespace.
    ///
    /// The child sees `DPUMESH_PARENT` in its environment, so that a program of ours can tie its life to the
    /// caller's by [`process::die_with_parent`]. Foreign programs are not tied: whoever starts them ends them.
    ///
    /// # Errors
    /// If the namespace cannot be entered or the program cannot be started.
    pub fn spawn(&self, command: Command) -> Result<Child, NamespaceError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let namespace = self.try_clone()?;
        process::spawn_from_lasting_thread(namespace, command).map_err(|error| {
            NamespaceError::new("start process in", format!("{} ({program})", self.id), error)
        })
    }

    /// Moves the calling thread into the namespace, for good. Threads that it starts afterwards begin there too.
    /// A thread that is inside already needs no rights for it.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN over this namespace; the thread has not moved then.
    pub fn enter_thread(&self) -> Result<(), NamespaceError> {
        if Self::current()?.id != self.id {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| NamespaceError::new("enter", self.id, errno))?;
        }
        ENTERED.set(Some(self.id));
        Ok(())
    }

    /// Whether [`enter_thread`](Self::enter_thread) put the calling thread here. Costs no system call. A thread
    /// that was born inside says no: whoever must be sure enters again, which is harmless.
    pub fn is_entered(&self) -> bool {
        ENTERED.get() == Some(self.id)
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Namespace({}, fd {})", self.id, self.fd.as_raw_fd())
    }
}

impl PartialEq for Namespace {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Namespace {}

/// Runs `work` on a thread of its own, because what it does to the thread cannot be undone.
fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)?;
        thread.join().map_err(|panic| std::panic::resume_unwind(panic))
    })
}

fn raise_loopback() -> io::Result<()> {
    let mut netlink = crate::netlink::Netlink::open().map_err(io::Error::other)?;
    let loopback = netlink.link("lo").map_err(io::Error::other)?;
    netlink
        .change_link(loopback.index, &crate::netlink::LinkChange::new().up())
        .map_err(io::Error::other)
}
