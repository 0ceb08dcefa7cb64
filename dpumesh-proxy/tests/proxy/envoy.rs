//! The same configuration and the same requests at this proxy and at a stock Envoy (`ENVOY_BIN`), so that what the tests
//! expect is what Envoy does. Without Envoy the cases run at this proxy alone, and say so.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::harness::{Client, Endpoint, Message, Running, await_true};

/// A proxy under test.
pub(crate) enum Subject {
    /// This one.
    Ours(Running),
    /// Envoy.
    Envoy {
        process: Child,
        web: SocketAddr,
        admin: SocketAddr,
        /// Its files, as long as it runs.
        folder: tempfile::TempDir,
    },
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Self::Envoy { process, .. } = self {
            // It may have ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Subject {
    pub(crate) fn client(&self) -> Client {
        Client::connect(self.web())
    }

    pub(crate) fn web(&self) -> SocketAddr {
        match self {
            Self::Ours(running) => running.web(),
            Self::Envoy { web, .. } => *web,
        }
    }

    /// Where its listener is, or was.
    pub(crate) fn web_if_there(&self) -> Option<SocketAddr> {
        match self {
            Self::Ours(running) => running.proxy.listener_address("web"),
            Self::Envoy { web, .. } => Some(*web),
        }
    }

    /// Where its files are.
    pub(crate) fn folder(&self) -> &std::path::Path {
        match self {
            Self::Ours(running) => running.folder.path(),
            Self::Envoy { folder, .. } => folder.path(),
        }
    }

    /// The least time in which a wait of `asked` may end. Envoy's timers count from when its loop woke, in whole
    /// milliseconds, so its waits can be short of what was asked.
    pub(crate) fn shortest(&self, asked: Duration) -> Duration {
        match self {
            Self::Ours(_) => asked,
            Self::Envoy { .. } => asked.saturating_sub(Duration::from_millis(20)),
        }
    }

    /// A counter's value once it has reached `at_least`; Envoy merges its counters a moment later.
    pub(crate) fn await_stat(&self, name: &str, at_least: u64) -> u64 {
        await_true(&format!("{name} >= {at_least} at {}", self.name()), || {
            self.stat(name) >= at_least
        });
        self.stat(name)
    }

    /// What an admin path says.
    pub(crate) fn admin(&self, path: &str) -> String {
        match self {
            Self::Ours(running) => running.admin("GET", path).text(),
            Self::Envoy { admin, .. } => get(*admin, path),
        }
    }

    /// Waits until a gauge or counter is just so.
    pub(crate) fn await_value(&self, name: &str, value: u64) {
        await_true(&format!("{name} == {value} at {}", self.name()), || {
            self.stat(name) == value
        });
    }

    pub(crate) fn stat(&self, name: &str) -> u64 {
        match self {
            Self::Ours(running) => running.stat(name),
            Self::Envoy { admin, .. } => {
                let text = get(*admin, "/stats");
                let line = text.lines().find_map(|l| l.strip_prefix(&format!("{name}: ")));
                line.and_then(|n| n.trim().parse().ok()).unwrap_or_default()
            }
        }
    }

    /// What the admin server answers.
    pub(crate) fn ask_admin(&self, method: &str, path: &str) -> Message {
        match self {
            Self::Ours(running) => running.admin(method, path),
            Self::Envoy { admin, .. } => {
                let mut client = Client::connect(*admin);
                client.send(format!(
                    "{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
                ));
                client.receive()
            }
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Ours(_) => "ours",
            Self::Envoy { .. } => "envoy",
        }
    }
}

/// Runs a case: `bootstrap` makes the configuration for an endpoint, `check` sees proxy and endpoint.
pub(crate) fn at_both(bootstrap: impl Fn(&Endpoint, &str) -> String, check: impl Fn(&Subject, &Endpoint)) {
    let endpoint = Endpoint::start("only");
    let folder = tempfile::tempdir().unwrap();
    let text = bootstrap(&endpoint, &folder.path().to_string_lossy());
    check(&Subject::Ours(Running::start_in(folder, &text, 1)), &endpoint);
    let Some(binary) = std::env::var_os("ENVOY_BIN").map(PathBuf::from) else {
        eprintln!("SKIP envoy: not compared with it (set ENVOY_BIN)");
        return;
    };
    let endpoint = Endpoint::start("only");
    let folder = tempfile::tempdir().unwrap();
    let text = bootstrap(&endpoint, &folder.path().to_string_lossy());
    check(&start_envoy(&binary, folder, &text), &endpoint);
}

pub(crate) fn start_envoy(binary: &std::path::Path, folder: tempfile::TempDir, bootstrap: &str) -> Subject {
    let file = folder.path().join("bootstrap.yaml");
    std::fs::write(&file, bootstrap).unwrap();
    let admin_file = folder.path().join("admin");
    let log = folder.path().join("envoy.log");
    let process = Command::new(binary)
        .args(["--disable-hot-restart", "--concurrency", "1", "-l", "warning"])
        .args(["--file-flush-interval-msec", "20"])
        .arg("-c")
        .arg(&file)
        .arg("--log-path")
        .arg(&log)
        .arg("--admin-address-path")
        .arg(&admin_file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let mut subject = Subject::Envoy {
        process,
        web: nowhere,
        admin: nowhere,
        folder,
    };
    if let Subject::Envoy {
        process, web, admin, ..
    } = &mut subject
    {
        await_true("envoy listens", || {
            if let Some(status) = process.try_wait().unwrap() {
                let log = std::fs::read_to_string(&log).unwrap_or_default();
                panic!("envoy ended, {status}: {log}");
            }
            let Ok(address) = std::fs::read_to_string(&admin_file).unwrap_or_default().parse() else {
                return false;
            };
            *admin = address;
            if get(*admin, "/ready").trim() != "LIVE" {
                return false;
            }
            let listeners = get(*admin, "/listeners");
            let address = listeners.lines().find_map(|l| l.strip_prefix("web::"));
            address.and_then(|a| a.parse().ok()).map(|a| *web = a).is_some()
        });
    }
    subject
}

fn get(admin: SocketAddr, path: &str) -> String {
    let mut client = Client::connect(admin);
    client.send(format!(
        "GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
    ));
    client.receive().text()
}
