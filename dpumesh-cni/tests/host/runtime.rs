//! [`Runtime`]: plays the container runtime against any plugin program, by the specification's words alone.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// A runtime with one network.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    /// The plugin's program.
    pub(crate) plugin: PathBuf,
    /// Where it finds delegated plugins.
    pub(crate) path: PathBuf,
    /// The network's configuration, without what a call adds.
    pub(crate) conf: Value,
    /// More variables, for plugins that are test doubles.
    pub(crate) variables: Vec<(String, PathBuf)>,
}

/// One attachment, as a runtime knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sandbox<'a> {
    pub(crate) container: &'a str,
    /// `None`: empty, as on a late DEL.
    pub(crate) netns: Option<&'a Path>,
    pub(crate) ifname: &'a str,
}

/// What a plugin answered: standard output as JSON (or null), and whether it succeeded.
pub(crate) type Answer = Result<Value, Value>;

impl Runtime {
    pub(crate) fn add(&self, sandbox: Sandbox<'_>) -> Answer {
        self.call("ADD", Some(sandbox), None)
    }

    pub(crate) fn del(&self, sandbox: Sandbox<'_>, previous: Option<&Value>) -> Answer {
        self.call("DEL", Some(sandbox), previous)
    }

    pub(crate) fn check(&self, sandbox: Sandbox<'_>, previous: &Value) -> Answer {
        self.call("CHECK", Some(sandbox), Some(previous))
    }

    pub(crate) fn status(&self) -> Answer {
        self.call("STATUS", None, None)
    }

    /// GC with these attachments as the valid ones.
    pub(crate) fn collect(&self, valid: &[(&str, &str)]) -> Answer {
        let valid: Vec<Value> = valid
            .iter()
            .map(|(container, ifname)| json!({ "containerID": container, "ifname": ifname }))
            .collect();
        let mut with_list = self.clone();
        with_list.conf["cni.dev/valid-attachments"] = valid.into();
        with_list.call("GC", None, None)
    }

    /// The plugin as it would be called by another user.
    pub(crate) fn status_as(&self, uid: u32) -> Answer {
        self.answer("STATUS", None, None, |command| {
            command.uid(uid).gid(uid);
        })
    }

    fn call(&self, verb: &str, sandbox: Option<Sandbox<'_>>, previous: Option<&Value>) -> Answer {
        self.answer(verb, sandbox, previous, |_| {})
    }

    fn answer(
        &self,
        verb: &str,
        sandbox: Option<Sandbox<'_>>,
        previous: Option<&Value>,
        adjust: impl FnOnce(&mut Command),
    ) -> Answer {
        let mut conf = self.conf.clone();
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        let mut command = Command::new(&self.plugin);
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_PATH", &self.path);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        if let Some(sandbox) = sandbox {
            command
                .env("CNI_CONTAINERID", sandbox.container)
                .env("CNI_NETNS", sandbox.netns.unwrap_or_else(|| Path::new("")))
                .env("CNI_IFNAME", sandbox.ifname)
                .env("CNI_ARGS", arguments(verb, sandbox.container));
        }
        adjust(&mut command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the plugin starts");
        let mut stdin = child.stdin.take().expect("piped");
        // A plugin that is killed does not read.
        let _ = stdin.write_all(conf.to_string().as_bytes());
        drop(stdin);
        let output = child.wait_with_output().expect("the plugin ends");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let json = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{verb}: {error}: {text}"))
        };
        if output.status.success() {
            assert!(
                json.get("code").is_none(),
                "{verb}: success with an error: {json}"
            );
            assert!(
                verb == "ADD" || json.is_null(),
                "{verb} writes nothing on success: {json}"
            );
            Ok(json)
        } else {
            let killed = output.status.code().is_none();
            assert!(
                killed || json["code"].as_u64().is_some_and(|code| code > 0),
                "{verb}: no error: {text:?}"
            );
            Err(json)
        }
    }
}

/// As containerd does, in another order on DEL.
fn arguments(verb: &str, container: &str) -> String {
    let mut all = [
        "IgnoreUnknown=1".to_owned(),
        "K8S_POD_NAMESPACE=shop".to_owned(),
        format!("K8S_POD_NAME=pod-{container}"),
        format!("K8S_POD_INFRA_CONTAINER_ID={container}"),
    ];
    if verb == "DEL" {
        all.reverse();
    }
    all.join(";")
}
