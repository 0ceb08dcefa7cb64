//! [`Environment`]: what a runtime says by variables.

use std::ffi::OsString;
use std::path::PathBuf;

use super::{Args, Error, code, is_ifname, is_name};

/// What a plugin is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// Take the attachment away again.
    Del,
    /// Look whether the attachment is as ADD left it.
    Check,
    /// Look whether ADD could be served.
    Status,
    /// Remove every attachment that is not in a list.
    Gc,
    /// Tell the versions that are spoken.
    Version,
}

/// The variables of one call, checked as far as the verb asks for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub verb: Verb,
    /// `CNI_CONTAINERID`; empty for verbs without a container.
    pub container: String,
    /// `CNI_NETNS`; `None` where the runtime left it empty, as on a late DEL.
    pub netns: Option<PathBuf>,
    /// `CNI_IFNAME`; empty for verbs without a container.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: Args,
    /// `CNI_PATH`: where delegated plugins are looked for.
    pub path: Vec<PathBuf>,
    /// `CNI_NETNS_OVERRIDE`: the plugin's own namespace will do.
    pub netns_override: bool,
}

impl Environment {
    /// Reads the variables of this process.
    ///
    /// # Errors
    /// [`code::ENVIRONMENT`], naming every variable that is missing or wrong.
    pub fn of_process() -> Result<Self, Error> {
        Self::read(|name| std::env::var_os(name))
    }

    /// Reads the variables that `variable` knows. An empty one is as good as none.
    ///
    /// # Errors
    /// As [`Environment::of_process`].
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let text = |name| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.map(|value| value.to_string_lossy().into_owned())
        };
        let verb = match text("CNI_COMMAND").as_deref() {
            Some("ADD") => Verb::Add,
            Some("DEL") => Verb::Del,
            Some("CHECK") => Verb::Check,
            Some("STATUS") => Verb::Status,
            Some("GC") => Verb::Gc,
            Some("VERSION") => Verb::Version,
            Some(other) => {
                return Err(Error::new(
                    code::ENVIRONMENT,
                    format!("unknown CNI_COMMAND {other:?}"),
                ));
            }
            None => {
                return Err(Error::new(code::ENVIRONMENT, "CNI_COMMAND is not set")
                    .details("this is a CNI plugin: a container runtime calls it; --help tells more"));
            }
        };
        let environment = Self {
            verb,
            container: text("CNI_CONTAINERID").unwrap_or_default(),
            netns: text("CNI_NETNS").map(PathBuf::from),
            ifname: text("CNI_IFNAME").unwrap_or_default(),
            args: Args::parse(&text("CNI_ARGS").unwrap_or_default()),
            path: variable("CNI_PATH").map_or_else(Vec::new, |path| std::env::split_paths(&path).collect()),
            netns_override: text("CNI_NETNS_OVERRIDE")
                .is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true")),
        };
        environment.check()?;
        Ok(environment)
    }

    fn check(&self) -> Result<(), Error> {
        let mut wrong = Vec::new();
        let of_container = matches!(self.verb, Verb::Add | Verb::Del | Verb::Check);
        if of_container && !is_name(&self.container) {
            wrong.push(format!("CNI_CONTAINERID {:?} is no container id", self.container));
        }
        if of_container && !is_ifname(&self.ifname) {
            wrong.push(format!("CNI_IFNAME {:?} is no interface name", self.ifname));
        }
        if matches!(self.verb, Verb::Add | Verb::Check) && self.netns.is_none() {
            wrong.push("CNI_NETNS is not set".to_owned());
        }
        if self.verb != Verb::Version && self.path.is_empty() {
            wrong.push("CNI_PATH is not set".to_owned());
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::new(code::ENVIRONMENT, wrong.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Environment, Error> {
        Environment::read(|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    const WHOLE: [(&str, &str); 5] = [
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/c1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin:/usr/lib/cni"),
        ("TRACEPARENT", "00-1-2-01"),
    ];

    fn without(verb: &'static str, missing: &str) -> Result<Environment, Error> {
        let mut variables: Vec<_> = WHOLE.into_iter().filter(|(name, _)| *name != missing).collect();
        variables.push(("CNI_COMMAND", verb));
        read(&variables)
    }

    #[test]
    fn each_verb_asks_for_its_own_variables() {
        let needed = [
            (
                "ADD",
                vec!["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            ),
            (
                "CHECK",
                vec!["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            ),
            ("DEL", vec!["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]),
            ("STATUS", vec!["CNI_PATH"]),
            ("GC", vec!["CNI_PATH"]),
            ("VERSION", vec![]),
        ];
        for (verb, needed) in needed {
            assert!(without(verb, "").is_ok(), "{verb}");
            for (name, _) in WHOLE {
                let read = without(verb, name);
                if needed.contains(&name) {
                    let error = read.expect_err("needed");
                    assert_eq!(error.code, code::ENVIRONMENT);
                    assert!(error.msg.contains(name), "{verb}: {error}");
                } else {
                    assert!(read.is_ok(), "{verb} does without {name}");
                }
            }
        }
    }

    #[test]
    fn a_late_del_has_an_empty_namespace() {
        let mut variables = WHOLE.to_vec();
        variables[1].1 = "";
        variables.push(("CNI_COMMAND", "DEL"));
        assert_eq!(read(&variables).expect("taken").netns, None);
    }

    #[test]
    fn no_variable_leads_out_of_a_folder() {
        for (name, value) in [
            ("CNI_CONTAINERID", "../c1"),
            ("CNI_IFNAME", "../eth0"),
            ("CNI_IFNAME", ".."),
        ] {
            let mut variables: Vec<_> = WHOLE.into_iter().filter(|(known, _)| *known != name).collect();
            variables.extend([("CNI_COMMAND", "DEL"), (name, value)]);
            assert_eq!(read(&variables).expect_err("refused").code, code::ENVIRONMENT);
        }
        assert!(read(&[("CNI_COMMAND", "add")]).is_err());
        assert!(read(&[]).is_err());
    }
}
