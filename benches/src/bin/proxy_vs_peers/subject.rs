//! A proxy under test: which program, in which shape, and the endpoint behind it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::files;
use crate::machine::{Process, SERVING, find, free_address, free_addresses, pinned};
use crate::trust::Trust;

/// The programs that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    DpuProxy,
    Envoy,
    Haproxy,
    Nginx,
}

impl Program {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::DpuProxy => "dpu-proxy",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    /// Its file: `DPU_PROXY_BIN` or the one beside this program; `ENVOY_BIN` or `envoy` on `PATH`; the others on `PATH`.
    pub(crate) fn file(self) -> Option<PathBuf> {
        let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
        match self {
            Self::DpuProxy => named("DPU_PROXY_BIN")
                .or_else(|| Some(std::env::current_exe().ok()?.with_file_name("dpu-proxy")))
                .filter(|file| file.is_file()),
            Self::Envoy => named("ENVOY_BIN").or_else(|| find("envoy")),
            Self::Haproxy | Self::Nginx => find(self.name()),
        }
    }
}

/// What a proxy makes of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// Octets.
    Tcp,
    /// HTTP/1.1 requests, with a route, access rules and statistics.
    Http1,
    /// The same of HTTP/2 clients, to an HTTP/1.1 endpoint.
    Http2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Security {
    Plain,
    /// The server shows a certificate.
    Tls,
    /// Both do.
    Mutual,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layer: Layer,
    pub(crate) front: Security,
    pub(crate) back: Security,
    /// Listeners, each with routes, access rules and a cluster of its own.
    pub(crate) pods: usize,
}

impl Shape {
    pub(crate) fn new(layer: Layer, front: Security, back: Security) -> Self {
        Self {
            layer,
            front,
            back,
            pods: 1,
        }
    }
}

/// A running proxy.
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) process: Process,
    /// One listener for each pod.
    pub(crate) addresses: Vec<SocketAddr>,
}

impl Subject {
    pub(crate) fn start(
        program: Program,
        shape: Shape,
        endpoint: SocketAddr,
        folder: &Path,
        trust: &Trust,
    ) -> Result<Self> {
        let name = program.name();
        let file = program.file().ok_or_else(|| format!("{name} is not there"))?;
        let addresses = free_addresses(shape.pods)?;
        let (text, arguments): (String, &[&str]) = match program {
            Program::DpuProxy => (
                files::bootstrap(shape, &addresses, endpoint, trust),
                &["--concurrency", "1", "--log-level", "error", "-c"],
            ),
            Program::Envoy => (
                files::bootstrap(shape, &addresses, endpoint, trust),
                &[
                    "--concurrency",
                    "1",
                    "--log-level",
                    "error",
                    "--disable-hot-restart",
                    "-c",
                ],
            ),
            Program::Haproxy => (files::haproxy(shape, &addresses, endpoint, trust), &["-db", "-f"]),
            Program::Nginx => (
                files::nginx_proxy(shape, addresses[0], endpoint, folder, trust),
                &["-c"],
            ),
        };
        let path = folder.join(format!("{name}-{}.yaml", addresses[0].port()));
        std::fs::write(&path, text)?;
        let mut command = pinned(SERVING, &file);
        command.args(arguments).arg(&path);
        if program == Program::Nginx {
            command.stderr(std::process::Stdio::null());
        }
        Ok(Self {
            name,
            process: Process::start(name, command, &addresses)?,
            addresses,
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// A load's answer, with this subject's name where it failed.
    pub(crate) fn blamed<T>(&self, answer: Result<T>) -> Result<T> {
        answer.map_err(|error| format!("{}: {error}", self.name).into())
    }
}

/// What answers: nginx, with 1 KiB at `/` and a file of 256 MiB at `/bulk`.
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    _process: Process,
}

impl Endpoint {
    pub(crate) fn start(security: Security, folder: &Path, trust: &Trust) -> Result<Self> {
        let nginx = find("nginx").ok_or("nginx is not there")?;
        let address = free_address()?;
        let file = folder.join(format!("endpoint-{}.conf", address.port()));
        std::fs::write(&file, files::endpoint(security, address, folder, trust))?;
        let bulk = folder.join("bulk");
        if !bulk.exists() {
            std::fs::write(&bulk, vec![b'x'; crate::load::BULK_OCTETS])?;
        }
        let mut command = pinned(SERVING, &nginx);
        command.arg("-c").arg(&file).stderr(std::process::Stdio::null());
        let process = Process::start("nginx", command, &[address])?;
        Ok(Self {
            address,
            _process: process,
        })
    }
}
