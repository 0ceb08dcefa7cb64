//! [`Ipam`]: another plugin that gives addresses, called with our environment and our very input.

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::protocol::{AddResult, Environment, Error, code};

/// The delegated plugin of one call.
#[derive(Debug)]
pub(super) struct Ipam<'a> {
    kind: &'a str,
    path: &'a [PathBuf],
    input: &'a [u8],
}

impl<'a> Ipam<'a> {
    pub(super) fn new(kind: &'a str, environment: &'a Environment, input: &'a [u8]) -> Self {
        Self {
            kind,
            path: &environment.path,
            input,
        }
    }

    /// Addresses for the container. When it fails, whatever it has kept is freed before the error is returned by the caller,
    /// who undoes.
    pub(super) fn add(&self) -> Result<AddResult, Error> {
        let output = self.call("ADD")?;
        let result: AddResult = serde_json::from_slice(&output)
            .map_err(|error| Error::new(code::DECODE, format!("ipam {}: {error}", self.kind)))?;
        if result.ips.is_empty() {
            let message = format!("ipam {} gave no address", self.kind);
            return Err(Error::new(code::CONFIG, message).details("the dataplane passes nothing without one"));
        }
        Ok(result)
    }

    pub(super) fn del(&self) -> Result<(), Error> {
        self.call("DEL").map(drop)
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        self.call("CHECK").map(drop)
    }

    /// A plugin from before 1.1.0 does not know the verb: it has nothing to say then.
    pub(super) fn status(&self) -> Result<(), Error> {
        self.unless_unknown("STATUS")
    }

    /// As [`Ipam::status`].
    pub(super) fn collect(&self) -> Result<(), Error> {
        self.unless_unknown("GC")
    }

    fn unless_unknown(&self, verb: &str) -> Result<(), Error> {
        match self.call(verb) {
            Err(error) if error.code == code::ENVIRONMENT => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Runs the plugin; its standard error is ours.
    fn call(&self, verb: &str) -> Result<Vec<u8>, Error> {
        let failed = |what: &str, error: std::io::Error| {
            Error::new(code::IO, format!("ipam {}: {what}: {error}", self.kind))
        };
        let program = self.program()?;
        let mut command = Command::new(program);
        command
            .env("CNI_COMMAND", OsString::from(verb))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| failed("start", error))?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(self.input) {
                Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(failed("write to", error)),
                _ => {} // one that does not read says what it wants by its result
            }
        }
        let output = child
            .wait_with_output()
            .map_err(|error| failed("wait for", error))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let told: Result<Error, _> = serde_json::from_slice(&output.stdout);
        Err(told.map_or_else(
            |_| {
                let text = String::from_utf8_lossy(&output.stdout);
                let text = text.trim().chars().take(500).collect::<String>();
                Error::new(
                    code::IO,
                    format!("ipam {} ended with {}", self.kind, output.status),
                )
                .details(text)
            },
            |mut error| {
                error.msg = format!("ipam {}: {}", self.kind, error.msg);
                error
            },
        ))
    }

    fn program(&self) -> Result<PathBuf, Error> {
        // The name comes from the configuration: it must not lead out of the folders.
        let is_file_name = Path::new(self.kind)
            .file_name()
            .is_some_and(|name| name == self.kind);
        let found = self.path.iter().map(|folder| folder.join(self.kind));
        let found = found
            .into_iter()
            .find(|program| is_file_name && program.is_file());
        found.ok_or_else(|| {
            let folders: Vec<_> = self
                .path
                .iter()
                .map(|folder| folder.display().to_string())
                .collect();
            let message = format!("ipam.type {:?} is in no folder of CNI_PATH", self.kind);
            Error::new(code::CONFIG, message).details(format_args!("looked in {}", folders.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn ask(script: &str, verb: fn(&Ipam<'_>) -> Result<(), Error>) -> Result<(), Error> {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("static");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("written");
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("executable");
        let path = [folder.path().to_owned()];
        verb(&Ipam {
            kind: "static",
            path: &path,
            input: &[b'x'; 1 << 17],
        })
    }

    #[test]
    fn its_error_is_ours_and_a_crash_is_told_as_one() {
        let add = |ipam: &Ipam<'_>| ipam.add().map(drop);
        let error = ask(r#"cat >/dev/null; echo '{"code":11,"msg":"full"}'; exit 1"#, add).expect_err("full");
        assert_eq!((error.code, error.msg.as_str()), (11, "ipam static: full"));
        let error = ask("echo e: boom; exit 3", add).expect_err("crashed");
        assert!(
            error.msg.contains("exit status: 3") && error.details.contains("boom"),
            "{error}"
        );
        assert_eq!(ask("echo '{}'", add).expect_err("no address").code, code::CONFIG);
        assert_eq!(ask("echo x", add).expect_err("no JSON").code, code::DECODE);
    }

    #[test]
    fn it_gets_its_verb_and_need_not_know_the_newest() {
        ask(r#"[ "$CNI_COMMAND" = DEL ]"#, |ipam| ipam.del()).expect("freed");
        ask(
            r#"echo '{"code":4,"msg":"unknown CNI_COMMAND"}'; exit 1"#,
            |ipam| ipam.status(),
        )
        .expect("nothing to say");
        ask(r#"echo '{"code":50,"msg":"empty"}'; exit 1"#, |ipam| {
            ipam.status()
        })
        .expect_err("empty");
    }

    #[test]
    fn its_name_cannot_lead_out_of_its_folder() {
        for kind in ["../sh", "/bin/sh", "..", "nobody"] {
            let path = ["/bin".into()];
            let ipam = Ipam {
                kind,
                path: &path,
                input: b"",
            };
            assert_eq!(ipam.program().expect_err("refused").code, code::CONFIG, "{kind}");
        }
    }
}
