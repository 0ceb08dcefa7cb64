//! The plugin: one call of a runtime, from its environment to what goes to standard output. No runtime, no threads of its own.
//!
//! ```text
//! ADD  agent: attach ─► IPAM ADD ─► addresses, routes ─► agent: bind ─► result
//!          │undo: detach    │undo: IPAM DEL                  │
//! DEL  agent: detach (or a note for an agent that is away) ─► IPAM DEL
//! ```
//! IPAM comes after the VF is in the pod under its final name, because an IPAM plugin may enter the pod and probe. What
//! fails undoes what went before, in reverse order, and every step of undoing is tried.
//!
//! The plugin keeps nothing and holds no cluster credentials: whose VF it is, is known by the agent alone.

mod agent;
mod interface;
mod ipam;

use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use dpumesh_core::PciAddress;
use serde_json::Value;

use crate::protocol::{AddResult, Environment, Error, Interface, NetConf, Verb, Version, code, versions};
use crate::talk::{Answer, Ask, Attach, Attached, AttachmentKey, PodName};
use agent::Agent;
use ipam::Ipam;

/// Longest configuration read, octets.
const LONGEST_CONF: u64 = 4 << 20;

/// What a call ends with: what goes to standard output, and whether it worked.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// One JSON document, or nothing.
    pub output: Option<Value>,
    /// Whether the exit status is 0.
    pub success: bool,
}

/// Carries out one call. Blocks until it is done: as long as IPAM takes, and at most the configured time per answer of the agent.
pub fn run(environment: Result<Environment, Error>, input: impl Read) -> Outcome {
    let mut version = Version::NEWEST;
    match call(environment, input, &mut version) {
        Ok(output) => Outcome {
            output,
            success: true,
        },
        Err(error) => Outcome {
            output: Some(error.to_json(version)),
            success: false,
        },
    }
}

fn call(
    environment: Result<Environment, Error>,
    input: impl Read,
    version: &mut Version,
) -> Result<Option<Value>, Error> {
    let environment = environment?;
    if environment.verb == Verb::Version {
        return Ok(Some(versions())); // without waiting for input: some runtimes leave it open
    }
    let mut octets = Vec::new();
    let read = input.take(LONGEST_CONF).read_to_end(&mut octets);
    read.map_err(|error| Error::new(code::IO, format!("read the configuration: {error}")))?;
    let conf = NetConf::parse(&octets)?;
    *version = conf.version;
    let call = Call {
        environment: &environment,
        conf: &conf,
        ipam: conf
            .ipam
            .as_ref()
            .map(|ipam| Ipam::new(&ipam.kind, &environment, &octets)),
    };
    match environment.verb {
        Verb::Add => call.add().map(|result| Some(result.to_json(conf.version))),
        Verb::Del => call.del().map(|()| None),
        Verb::Check => call.check().map(|()| None),
        Verb::Status => call.status().map(|()| None),
        Verb::Gc => call.collect().map(|()| None),
        Verb::Version => Ok(Some(versions())),
    }
}

/// One call with everything that it was given.
struct Call<'a> {
    environment: &'a Environment,
    conf: &'a NetConf,
    ipam: Option<Ipam<'a>>,
}

impl Call<'_> {
    fn key(&self) -> AttachmentKey {
        AttachmentKey {
            container: self.environment.container.clone(),
            ifname: self.environment.ifname.clone(),
        }
    }

    fn add(&self) -> Result<AddResult, Error> {
        if self.conf.previous.is_some() {
            let message = "this plugin makes the interface: it must be the first of its list";
            return Err(Error::new(code::CONFIG, message).details("prevResult is set"));
        }
        let Some(ipam) = &self.ipam else {
            let message = "ipam.type is not set: a pod without an address cannot pass the dataplane";
            return Err(Error::new(code::CONFIG, message).details(
                "delegate to an IPAM plugin, such as {\"type\":\"host-local\",\"subnet\":\"10.244.1.0/24\"}",
            ));
        };
        let netns = self.netns()?;
        let ask = self.attach(netns)?;
        let mut agent = Agent::connect(self.conf)?;
        let Answer::Attached(attached) = agent.ask(&Ask::Attach(ask))? else {
            return Err(agent::unexpected());
        };
        let bound = ipam
            .add()
            .and_then(|addresses| self.furnish(netns, &attached, addresses))
            .and_then(|result| self.bind(&mut agent, result));
        bound.map_err(|error| self.undo(ipam, agent, error))
    }

    fn netns(&self) -> Result<&Path, Error> {
        // The environment is checked by verb.
        let netns = self.environment.netns.as_deref().unwrap_or_else(|| Path::new(""));
        let of = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
        let there = of(netns).map_err(|error| {
            Error::new(
                code::UNKNOWN_CONTAINER,
                format!("CNI_NETNS {}: {error}", netns.display()),
            )
        })?;
        let own = of(Path::new("/proc/thread-self/ns/net"));
        if !self.environment.netns_override && own.is_ok_and(|own| own == there) {
            let message = "CNI_NETNS is the plugin's own namespace";
            return Err(Error::new(code::ENVIRONMENT, message).details("a pod needs a namespace of its own"));
        }
        Ok(netns)
    }

    fn attach(&self, netns: &Path) -> Result<Attach, Error> {
        let device: Option<PciAddress> = match self.conf.device() {
            None => None,
            Some(text) => Some(text.parse().map_err(|error| {
                Error::new(code::UNSUPPORTED, format!("deviceID: {error}"))
                    .details("only PCI functions can be given to pods")
            })?),
        };
        let args = &self.environment.args;
        Ok(Attach {
            key: self.key(),
            network: self.conf.name.clone(),
            netns: netns.to_owned(),
            pod: PodName {
                name: args
                    .pod_name
                    .clone()
                    .unwrap_or_else(|| self.environment.container.clone()),
                namespace: args.pod_namespace.clone().unwrap_or_default(),
                uid: args.pod_uid.clone().unwrap_or_default(),
            },
            mac: self.conf.mac(args)?,
            mtu: self.conf.mtu,
            device,
        })
    }

    /// Gives the interface in the pod what IPAM says and describes it.
    fn furnish(&self, netns: &Path, attached: &Attached, ipam: AddResult) -> Result<AddResult, Error> {
        let routes = interface::routes(&self.conf.routes, &ipam);
        let made = interface::furnish(
            netns,
            &self.environment.ifname,
            attached,
            &ipam,
            &routes,
            self.conf,
        )?;
        let sandbox = netns.to_string_lossy();
        let mut interface = Interface::in_sandbox(&self.environment.ifname, attached.mac, &sandbox);
        interface.mtu = Some(u32::from(attached.mtu.get()));
        interface.pci = attached.pci.map(|pci| pci.to_string());
        let mut result = ipam.on_interface(interface);
        result.routes = made;
        Ok(result)
    }

    fn bind(&self, agent: &mut Agent, result: AddResult) -> Result<AddResult, Error> {
        let addresses: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
        match agent.ask(&Ask::Bind {
            key: self.key(),
            addresses,
        })? {
            Answer::Bound { .. } => Ok(result),
            _ => Err(agent::unexpected()),
        }
    }

    /// Takes back an ADD that failed after the VF was attached. A connection that ends has the same effect on the agent,
    /// but the runtime shall find everything undone when it reads the error.
    fn undo(&self, ipam: &Ipam<'_>, mut agent: Agent, error: Error) -> Error {
        let mut error = error;
        if let Err(failed) = ipam.del() {
            error = error.details(format_args!("undoing: {failed}"));
        }
        if let Err(failed) = agent.ask(&Ask::Detach { key: self.key() }) {
            error = error.details(format_args!("undoing: {failed}"));
        }
        error
    }

    /// Port first, address last: an address that IPAM may give to the next pod must not work for this one any more.
    fn del(&self) -> Result<(), Error> {
        let detached = agent::detach(self.conf, &self.key());
        let freed = self.ipam.as_ref().map_or(Ok(()), Ipam::del);
        both(detached, freed)
    }

    fn check(&self) -> Result<(), Error> {
        let Some(previous) = self.conf.previous_result()? else {
            return Err(Error::new(code::CONFIG, "CHECK without prevResult")
                .details("the runtime must give what ADD answered"));
        };
        let netns = self.netns()?;
        let Some((interface, nets)) = previous.sandboxed(&self.environment.ifname) else {
            let message = format!("prevResult knows no interface {}", self.environment.ifname);
            return Err(Error::new(code::CONFIG, message));
        };
        interface::check(netns, interface, &nets)?;
        let ask = Ask::Check {
            key: self.key(),
            netns: netns.to_owned(),
            addresses: nets.iter().map(ipnet::IpNet::addr).collect(),
        };
        Agent::connect(self.conf)?.ask(&ask)?;
        self.ipam.as_ref().map_or(Ok(()), Ipam::check)
    }

    fn status(&self) -> Result<(), Error> {
        let not_available = |error: Error| Error {
            code: code::NOT_AVAILABLE,
            ..error
        };
        let mut agent = Agent::connect(self.conf).map_err(not_available)?;
        agent.ask(&Ask::Status).map_err(not_available)?;
        self.ipam.as_ref().map_or(Ok(()), Ipam::status)
    }

    fn collect(&self) -> Result<(), Error> {
        let Some(valid) = self.conf.valid.clone() else {
            let message = "GC without cni.dev/valid-attachments";
            return Err(Error::new(code::CONFIG, message).details("without the list nothing is collected"));
        };
        let ask = Ask::Collect {
            network: self.conf.name.clone(),
            valid,
        };
        let ours = Agent::connect(self.conf).and_then(|mut agent| agent.ask(&ask).map(drop));
        both(ours, self.ipam.as_ref().map_or(Ok(()), Ipam::collect))
    }
}

/// Both were tried; both failures are told.
fn both(one: Result<(), Error>, other: Result<(), Error>) -> Result<(), Error> {
    match (one, other) {
        (Err(one), Err(other)) => Err(one.details(other)),
        (one, other) => one.and(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    /// A call by its variables; what is not said is as a runtime would have it.
    fn call(verb: &str, netns: &str, conf: &str) -> Outcome {
        let environment = Environment::read(|name| {
            let value = match name {
                "CNI_COMMAND" => verb,
                "CNI_CONTAINERID" => "c1",
                "CNI_NETNS" => netns,
                "CNI_IFNAME" => "eth0",
                "CNI_PATH" => "/nowhere",
                _ => return None,
            };
            Some(OsString::from(value))
        });
        run(environment, conf.as_bytes())
    }

    fn conf(more: &str) -> String {
        format!(
            r#"{{"cniVersion":"1.0.0","name":"mesh","type":"x","agentSocket":"/nowhere/agent.sock"{more}}}"#
        )
    }

    const IPAM: &str = r#","ipam":{"type":"host-local"}"#;

    fn error(outcome: &Outcome) -> (u64, String) {
        assert!(!outcome.success);
        let json = outcome
            .output
            .as_ref()
            .expect("an error is told on standard output");
        assert!(json["cniVersion"].is_string(), "{json}");
        (
            json["code"].as_u64().expect("a number"),
            json["msg"].as_str().expect("a text").to_owned(),
        )
    }

    #[test]
    fn version_is_answered_without_reading_input() {
        struct Blocked;
        impl Read for Blocked {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                panic!("VERSION must not wait for input")
            }
        }
        let environment = Environment::read(|name| (name == "CNI_COMMAND").then(|| "VERSION".into()));
        let outcome = run(environment, Blocked);
        assert_eq!(outcome.output, Some(versions()));
        assert!(outcome.success);
    }

    #[test]
    fn a_wrong_call_is_a_json_error_of_the_callers_version() {
        let outcome = call("ADD", "/proc/thread-self/ns/net", &conf(IPAM));
        assert_eq!(error(&outcome).0, u64::from(code::ENVIRONMENT)); // the plugin's own namespace
        assert_eq!(outcome.output.expect("told")["cniVersion"], "1.0.0");
        assert_eq!(
            error(&call("ADD", "", &conf(IPAM))).0,
            u64::from(code::ENVIRONMENT)
        );
        assert_eq!(
            error(&call("ADD", "/nowhere", &conf(IPAM))).0,
            u64::from(code::UNKNOWN_CONTAINER)
        );
        assert_eq!(
            error(&call("ADD", "/dev/null", &conf(""))).0,
            u64::from(code::CONFIG)
        );
        assert_eq!(error(&call("ADD", "/dev/null", "{")).0, u64::from(code::DECODE));
        assert_eq!(
            error(&call("LIST", "/dev/null", "{}")).0,
            u64::from(code::ENVIRONMENT)
        );
        let chained = conf(&format!(r#"{IPAM},"prevResult":{{"interfaces":[]}}"#));
        assert_eq!(
            error(&call("ADD", "/dev/null", &chained)).0,
            u64::from(code::CONFIG)
        );
    }

    #[test]
    fn without_an_agent_a_pod_is_refused_to_be_tried_again() {
        let outcome = call("ADD", "/dev/null", &conf(IPAM));
        assert_eq!(error(&outcome).0, u64::from(code::TRY_AGAIN));
        let outcome = call("STATUS", "", &conf(""));
        assert_eq!(error(&outcome).0, u64::from(code::NOT_AVAILABLE));
    }

    #[test]
    fn a_check_needs_what_add_answered() {
        assert_eq!(
            error(&call("CHECK", "/dev/null", &conf(""))).0,
            u64::from(code::CONFIG)
        );
        let unknown = conf(r#","prevResult":{"interfaces":[{"name":"eth1","sandbox":"/x"}]}"#);
        assert_eq!(
            error(&call("CHECK", "/dev/null", &unknown)).0,
            u64::from(code::CONFIG)
        );
    }

    #[test]
    fn gc_without_a_list_collects_nothing() {
        assert_eq!(error(&call("GC", "", &conf(""))).0, u64::from(code::CONFIG));
    }

    #[test]
    fn two_failures_are_both_told() {
        let fail = |text: &str| Err(Error::new(1, text));
        let error = both(fail("first"), fail("second")).expect_err("both failed");
        assert!(error.msg.contains("first") && error.details.contains("second"));
        assert_eq!(both(Ok(()), fail("x")).expect_err("one failed").msg, "x");
    }
}
