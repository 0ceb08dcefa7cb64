//! The servers and clients that run in pods: small plain programs that know nothing of a mesh, a proxy or a DPU.
//!
//! They are roles of the example's own executable, so that one file is all there is to build: [`command`] starts it
//! again with a hidden first argument, and [`requested`] at the top of `main` recognises that. A server prints
//! `ready ADDRESS` on standard output once it can be reached, and runs until it is killed. A client prints what
//! happened (with `--json` as one line that its summary type reads back) and exits with status 0 if it could try at
//! all: judging the outcome is the caller's part.
//!
//! | role | counterpart |
//! |---|---|
//! | `http-server` ([`http_server`]) | `http-get` ([`http_client`]) |
//! | `tcp-echo`, `tcp-sink`, `tcp-witness` ([`tcp`]) | `tcp-connect`, `tcp-send` |
//! | `udp-echo` ([`udp`]) | `udp-send` |
//! | the kernel | `ping` ([`ping`]) |
//! | none | `spoof` ([`spoof`]) |

mod http_body;
pub mod http_client;
pub mod http_server;
pub mod ping;
pub mod spoof;
pub mod tcp;
pub mod udp;

use std::error::Error;
use std::ffi::OsStr;
use std::fmt::Display;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;

/// The hidden first argument that makes the executable a workload.
pub const ARGUMENT: &str = "workload";

/// What a server prints on standard output, followed by its address, once it can be reached.
pub const READY: &str = "ready ";

/// A command that runs this executable as a workload, for example
/// `command(["http-server", "0.0.0.0:80", "web-a"])`.
pub fn command<S: AsRef<OsStr>>(role: impl IntoIterator<Item = S>) -> Command {
    // The file that runs now, even if another one has taken its path meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg(ARGUMENT).args(role);
    command
}

/// The role that this process was started for, if it is a workload. A malformed role ends the process with the
/// reason, as clap does.
pub fn requested() -> Option<Role> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()?.to_str() != Some(ARGUMENT) {
        return None;
    }
    let named = std::iter::once(ARGUMENT.into()).chain(arguments);
    Some(CommandLine::parse_from(named).role)
}

#[derive(Debug, Parser)]
#[command(name = ARGUMENT, about = "Plain servers and clients for pods")]
struct CommandLine {
    #[command(subcommand)]
    role: Role,
}

/// One server or client.
#[derive(Clone, Debug, Subcommand)]
pub enum Role {
    /// Serve HTTP/1.1; each answer names the server and the client it saw
    HttpServer {
        /// Address and port; port 0 takes a free one
        listen: SocketAddr,
        /// The name that answers carry
        name: String,
    },
    /// Send every octet back
    TcpEcho {
        /// Address and port; port 0 takes a free one
        listen: SocketAddr,
    },
    /// Take octets until the sender closes its half, then answer with their number and checksum
    TcpSink {
        /// Address and port; port 0 takes a free one
        listen: SocketAddr,
        /// Take nothing from a new connection for so long, milliseconds
        #[arg(long, default_value_t = 0)]
        pause_ms: u64,
    },
    /// Send every octet back, reset connections that ask for it, and print how each one ended
    TcpWitness {
        /// Address and port; port 0 takes a free one
        listen: SocketAddr,
    },
    /// Send every datagram back
    UdpEcho {
        /// Address and port; port 0 takes a free one
        listen: SocketAddr,
    },
    /// Send HTTP GET requests and sum up the answers
    HttpGet(http_client::Options),
    /// Send a known pattern to a tcp-sink and compare its checksum
    TcpSend(tcp::SendOptions),
    /// Open a TCP connection and tell what became of it
    TcpConnect(tcp::ConnectOptions),
    /// Send datagrams and count the answers
    UdpSend(udp::Options),
    /// Send ICMP echo requests and count the answers
    Ping {
        /// Whom to ask
        address: IpAddr,
        /// How many requests
        #[arg(long, default_value_t = 1)]
        count: u64,
        /// How long to wait for each answer, milliseconds
        #[arg(long, default_value_t = 1000)]
        timeout_ms: u64,
        /// Print one line of JSON
        #[arg(long)]
        json: bool,
    },
    /// Send frames with a forged source MAC and a forged source IP address, and honest ones beside them
    Spoof(spoof::Options),
}

impl Role {
    /// Plays the role: a server for ever, a client until it is done.
    pub fn run(self) -> ExitCode {
        match self.play() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        }
    }

    fn play(self) -> Result<(), Box<dyn Error>> {
        raise_open_files();
        match self {
            Self::HttpServer { listen, name } => {
                let server = http_server::Server::bind(listen, &name).map_err(|e| in_context(listen, e))?;
                ready(server.address()?)?;
                server.serve()?;
            }
            Self::TcpEcho { listen } => {
                let listener = tcp::listen(listen).map_err(|e| in_context(listen, e))?;
                ready(listener.local_addr()?)?;
                tcp::echo(&listener)?;
            }
            Self::TcpSink { listen, pause_ms } => {
                let listener = tcp::listen(listen).map_err(|e| in_context(listen, e))?;
                ready(listener.local_addr()?)?;
                tcp::slow_sink(&listener, Duration::from_millis(pause_ms))?;
            }
            Self::TcpWitness { listen } => {
                let listener = tcp::listen(listen).map_err(|e| in_context(listen, e))?;
                ready(listener.local_addr()?)?;
                tcp::witness(&listener)?;
            }
            Self::UdpEcho { listen } => {
                let socket = std::net::UdpSocket::bind(listen).map_err(|e| in_context(listen, e))?;
                ready(socket.local_addr()?)?;
                udp::echo(&socket)?;
            }
            Self::HttpGet(options) => {
                let summary = http_client::get(&options).map_err(|e| in_context(options.address, e))?;
                tell(&summary, options.json)?;
            }
            Self::TcpSend(options) => {
                let summary = tcp::send(&options).map_err(|e| in_context(options.address, e))?;
                tell(&summary, options.json)?;
            }
            Self::TcpConnect(options) => tell(&tcp::connect(&options), options.json)?,
            Self::UdpSend(options) => {
                let summary = udp::send(&options).map_err(|e| in_context(options.address, e))?;
                tell(&summary, options.json)?;
            }
            Self::Ping {
                address,
                count,
                timeout_ms,
                json,
            } => {
                let summary = ping::ping(address, count, Duration::from_millis(timeout_ms))
                    .map_err(|e| in_context(address, e))?;
                tell(&summary, json)?;
            }
            Self::Spoof(options) => {
                let summary = spoof::spoof(&options).map_err(|e| in_context(&options.interface, e))?;
                tell(&summary, options.json)?;
            }
        }
        Ok(())
    }
}

fn in_context(object: impl Display, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{object}: {error}"))
}

fn ready(address: SocketAddr) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{READY}{address}")?;
    out.flush()
}

fn tell(summary: &impl Serialize, json: bool) -> io::Result<()> {
    let text = if json {
        serde_json::to_string(summary)
    } else {
        serde_json::to_string_pretty(summary)
    };
    writeln!(io::stdout().lock(), "{}", text.map_err(io::Error::other)?)
}

/// A thousand connections are more files than the usual soft limit. What cannot be raised stays as it is; running
/// out is then reported where it happens.
fn raise_open_files() {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <CommandLine as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn roles_are_read() {
        let parsed =
            CommandLine::try_parse_from(["workload", "http-server", "[::1]:0", "web"]).expect("valid");
        assert!(matches!(parsed.role, Role::HttpServer { name, .. } if name == "web"));
        for bad in [
            &["workload"][..],
            &["workload", "http-server", "nowhere", "web"],
            &["workload", "http-get", "127.0.0.1:80", "--header", "no colon"],
            &["workload", "http-get", "127.0.0.1:80", "--connections", "0"],
        ] {
            assert!(CommandLine::try_parse_from(bad).is_err(), "{bad:?}");
        }
    }
}
