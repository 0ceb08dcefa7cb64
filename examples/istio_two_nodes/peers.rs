//! [`ControlPlane`]: the real apiserver and istiod in a namespace of their own, and kubectl for what people would do with them.
//!
//! `tests/peers/run` starts and stops them. A guard beside them waits for the end of this process, however it comes, and then
//! stops them: nothing of them outlives the example.

use std::collections::HashMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dpumesh_examples::children::{Process, Run};
use dpumesh_hw::netns::Namespace;
use serde_json::Value;

use super::Result;

/// Where the control plane listens, on the management network.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 1);
/// How istiod collects changes before it pushes them.
pub(crate) const DEBOUNCE: Duration = Duration::from_millis(100);
/// How long the peers may take to start, or kubectl to answer.
const PATIENCE: Duration = Duration::from_secs(150);

/// etcd, kube-apiserver, kube-controller-manager and istiod.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    pub(crate) namespace: Namespace,
    folder: PathBuf,
    variables: HashMap<String, String>,
    run: Arc<Run>,
    files: AtomicU32,
    guard: Option<Child>,
}

/// Why the example cannot run on this machine, and what would help.
pub(crate) fn missing() -> Option<String> {
    let script = scripts().join("build");
    let output = Command::new(&script).arg("--check").output();
    match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!(
            "the peers are not built ({}): build them with `tests/peers/build` (minutes the first time)",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Some(format!("{}: {error}", script.display())),
    }
}

/// The folder `tests/peers` of this source tree.
pub(crate) fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/peers")
}

impl ControlPlane {
    /// Starts all of them and waits until they are ready.
    pub(crate) fn start(namespace: Namespace, run: &Arc<Run>) -> Result<Self> {
        let folder = run.folder().join("peers");
        fs::create_dir_all(&folder)?;
        let guard = Command::new("/bin/sh")
            .args(["-c", r#"read _; exec "$0" stop "$1""#])
            .arg(scripts().join("run"))
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let mut plane = Self {
            namespace,
            folder,
            variables: HashMap::new(),
            run: Arc::clone(run),
            files: AtomicU32::new(0),
            guard: Some(guard),
        };
        plane.script("start", &[])?;
        plane.variables = exports(&fs::read_to_string(plane.folder.join("env"))?);
        Ok(plane)
    }

    /// Runs `tests/peers/run` for all peers, or one of them.
    fn script(&self, verb: &str, peer: &[&str]) -> Result<()> {
        let mut command = Command::new(scripts().join("run"));
        command.arg(verb).arg(&self.folder).args(peer);
        command.env("PEERS_LISTEN", ADDRESS.to_string());
        Process::output(&self.run, "tests/peers/run", &self.namespace, command, PATIENCE)?;
        self.record()
    }

    /// Writes the peers into the record of the run: if it is killed, and the next one comes before the guard is done, that one ends them.
    fn record(&self) -> Result<()> {
        for entry in fs::read_dir(self.folder.join("pid"))? {
            let entry = entry?;
            let text = fs::read_to_string(entry.path())?;
            if let Some(pid) = text.split(' ').next().and_then(|number| number.parse().ok()) {
                self.run.record(&entry.file_name().to_string_lossy(), pid)?;
            }
        }
        Ok(())
    }

    /// Ends istiod.
    pub(crate) fn stop_istiod(&self) -> Result<()> {
        self.script("stop", &["istiod"])
    }

    /// Starts it again, on the ports it had.
    pub(crate) fn start_istiod(&self) -> Result<()> {
        self.script("start", &["istiod"])
    }

    /// A value of `tests/peers/run`'s file `env`.
    pub(crate) fn variable(&self, name: &str) -> Result<&str> {
        let value = self.variables.get(name).map(String::as_str);
        value.ok_or_else(|| format!("tests/peers/run told no {name}").into())
    }

    /// Applies objects, given as YAML or JSON; returns how long kubectl took.
    pub(crate) fn apply(&self, objects: &str) -> Result<Duration> {
        let begun = Instant::now();
        self.with_file("apply", objects)?;
        Ok(begun.elapsed())
    }

    /// Deletes them again.
    pub(crate) fn delete(&self, objects: &str) -> Result<()> {
        self.with_file("delete", objects)
    }

    fn with_file(&self, verb: &str, objects: &str) -> Result<()> {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let file = self.folder.join(format!("objects-{number}.yaml"));
        fs::write(&file, objects)?;
        self.kubectl(&[verb, "-f", &file.to_string_lossy()])?;
        Ok(())
    }

    /// Runs kubectl and returns what it says.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let program = self.variable("PATH")?.split(':').next().unwrap_or_default();
        let mut command = Command::new(Path::new(program).join("kubectl"));
        command
            .args(arguments)
            .env("KUBECONFIG", self.variable("KUBECONFIG")?);
        command.arg(format!(
            "--cache-dir={}",
            self.folder.join("kube/cache").display()
        ));
        Ok(Process::output(
            &self.run,
            "kubectl",
            &self.namespace,
            command,
            PATIENCE,
        )?)
    }

    /// An object as JSON.
    pub(crate) fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], arguments].concat())?;
        Ok(serde_json::from_str(&text)?)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            drop(guard.stdin.take());
            // It reports to nobody; what it could not end, its own record names.
            let _ = guard.wait();
        }
    }
}

/// `export NAME='VALUE'` by line.
fn exports(text: &str) -> HashMap<String, String> {
    let pairs = text.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("export ")?.split_once('=')?;
        Some((name.to_owned(), value.replace('\'', "")))
    });
    pairs.collect()
}
