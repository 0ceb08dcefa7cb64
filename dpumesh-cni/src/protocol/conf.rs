//! [`NetConf`]: what a plugin reads from standard input.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use dpumesh_core::{MacAddr, Mtu};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AddResult, Args, Error, Version, code, is_name};

/// Where the node agent listens unless the configuration says otherwise.
const SOCKET: &str = "/run/dpumesh/agent.sock";
/// Longest wait for one answer of the agent unless the configuration says otherwise, seconds.
const TIMEOUT: u64 = 60;

/// The configuration of one call. Fields that are not known here are somebody else's and ignored.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConf {
    /// The version in which it is to be answered.
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// Who gives addresses.
    pub ipam: Option<IpamConf>,
    /// What the runtime knows of this one container.
    pub runtime: RuntimeConfig,
    /// `deviceID`: the device that a device plugin chose.
    pub device: Option<String>,
    /// `mtu`: largest L3 packet of the interface.
    pub mtu: Option<Mtu>,
    /// `routes`: ways that go by the interface besides those that IPAM names.
    pub routes: Vec<ConfRoute>,
    /// `defaultRoute`: whether the default route goes by the interface. Not said: where the pod has none yet.
    pub default_route: Option<bool>,
    /// `agentSocket`: where the node agent listens.
    pub socket: PathBuf,
    /// `agentTimeout`: longest wait for one answer of the agent, in seconds.
    pub timeout: Duration,
    /// `prevResult`, unread: what ADD answered, on CHECK and DEL; what an earlier plugin answered, on ADD.
    pub previous: Option<Value>,
    /// GC: the attachments that are to stay.
    pub valid: Option<Vec<ValidAttachment>>,
}

/// Who gives addresses: a plugin of this name, found by `CNI_PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct IpamConf {
    /// Name of the program.
    #[serde(rename = "type", default)]
    pub kind: String,
}

/// `runtimeConfig`, as far as it is of use here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct RuntimeConfig {
    /// The MAC that the interface shall have.
    #[serde(default)]
    pub mac: Option<String>,
    /// The device that a device plugin chose.
    #[serde(rename = "deviceID", default)]
    pub device: Option<String>,
}

/// A route that the configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct ConfRoute {
    /// Where to.
    pub dst: IpNet,
    /// By which router; the interface's own where none is named.
    #[serde(default)]
    pub gw: Option<IpAddr>,
}

/// An attachment that GC leaves alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ValidAttachment {
    /// The container.
    #[serde(rename = "containerID")]
    pub container: String,
    /// The interface in it.
    pub ifname: String,
}

/// The form on the wire, before anything is checked.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ipam: Option<IpamConf>,
    #[serde(default)]
    runtime_config: Option<RuntimeConfig>,
    #[serde(rename = "deviceID", default)]
    device: Option<String>,
    #[serde(default)]
    mtu: Option<Mtu>,
    #[serde(default)]
    routes: Option<Vec<ConfRoute>>,
    #[serde(default)]
    default_route: Option<bool>,
    #[serde(default)]
    agent_socket: Option<PathBuf>,
    #[serde(default)]
    agent_timeout: Option<u64>,
    #[serde(default)]
    prev_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    valid: Option<Vec<ValidAttachment>>,
    #[serde(rename = "cni.dev/attachments", default)]
    valid_by_its_old_name: Option<Vec<ValidAttachment>>,
    #[serde(flatten)]
    _others: BTreeMap<String, Value>,
}

impl NetConf {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`code::DECODE`] (no JSON of this form), [`code::VERSION`], [`code::CONFIG`] (a value that cannot be).
    pub fn parse(octets: &[u8]) -> Result<Self, Error> {
        let wire: Wire = serde_json::from_slice(octets)
            .map_err(|error| Error::new(code::DECODE, format!("network configuration: {error}")))?;
        let version = Version::parse(&wire.cni_version)?;
        if !is_name(&wire.name) {
            let message = format!("name: {:?} is no network name", wire.name);
            return Err(Error::new(code::CONFIG, message)
                .details("a letter or digit, then letters, digits, `_`, `.` and `-`"));
        }
        Ok(Self {
            version,
            name: wire.name,
            ipam: wire.ipam.filter(|ipam| !ipam.kind.is_empty()),
            runtime: wire.runtime_config.unwrap_or_default(),
            device: wire.device.filter(|device| !device.is_empty()),
            mtu: wire.mtu,
            routes: wire.routes.unwrap_or_default(),
            default_route: wire.default_route,
            socket: wire.agent_socket.unwrap_or_else(|| SOCKET.into()),
            timeout: Duration::from_secs(wire.agent_timeout.unwrap_or(TIMEOUT).max(1)),
            previous: wire.prev_result.filter(|previous| !previous.is_null()),
            valid: wire.valid.or(wire.valid_by_its_old_name),
        })
    }

    /// The MAC that was asked for: the runtime's own word first, then `CNI_ARGS`.
    ///
    /// # Errors
    /// [`code::CONFIG`]: it is no MAC.
    pub fn mac(&self, args: &Args) -> Result<Option<MacAddr>, Error> {
        let places = [
            ("runtimeConfig.mac", &self.runtime.mac),
            ("CNI_ARGS MAC", &args.mac),
        ];
        let given = places
            .into_iter()
            .find_map(|(place, mac)| mac.as_ref().filter(|mac| !mac.is_empty()).map(|mac| (place, mac)));
        let Some((place, mac)) = given else {
            return Ok(None);
        };
        let parsed = mac.parse().ok();
        let usable = parsed.filter(|mac: &MacAddr| !mac.is_multicast() && !mac.is_zero());
        usable.map(Some).ok_or_else(|| {
            Error::new(code::CONFIG, format!("{place}: {mac:?} is no unicast MAC"))
                .details("six octets in hex digits between colons")
        })
    }

    /// What ADD answered. DEL does not ask: a result that cannot be read keeps no pod from ending.
    ///
    /// # Errors
    /// [`code::DECODE`].
    pub fn previous_result(&self) -> Result<Option<AddResult>, Error> {
        let read = self.previous.clone().map(serde_json::from_value).transpose();
        read.map_err(|error| Error::new(code::DECODE, format!("prevResult: {error}")))
    }

    /// The device that was asked for, by its PCI address.
    pub fn device(&self) -> Option<&str> {
        self.device.as_deref().or(self.runtime.device.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINIMAL: &str = r#"{"cniVersion":"1.0.0","name":"mesh","type":"istio-dpu-cni"}"#;

    fn code_of(text: &str) -> u32 {
        NetConf::parse(text.as_bytes()).expect_err("refused").code
    }

    #[test]
    fn unknown_fields_and_capabilities_are_somebody_elses() {
        let text = r#"{"cniVersion":"1.1.0","name":"mesh","type":"x","moon":{"a":[1]},"capabilities":{"mac":true},
            "runtimeConfig":{"mac":"02:00:00:00:00:01","io.kubernetes.cri.pod-annotations":{"a":"b"}},
            "args":{"cni":{"labels":[]}},"ipam":{"type":"host-local","ranges":[[]]},"dns":{},"prevResult":null}"#;
        let conf = NetConf::parse(text.as_bytes()).expect("taken");
        assert_eq!(conf.version, Version::V1_1);
        assert_eq!(
            conf.ipam.as_ref().map(|ipam| ipam.kind.as_str()),
            Some("host-local")
        );
        let mac = conf.mac(&Args::parse("MAC=02:00:00:00:00:02")).expect("a MAC");
        assert_eq!(
            mac.map(|mac| mac.to_string()).as_deref(),
            Some("02:00:00:00:00:01")
        );
    }

    #[test]
    fn what_is_left_out_has_a_usual_value() {
        let conf = NetConf::parse(MINIMAL.as_bytes()).expect("taken");
        assert_eq!(conf.socket, PathBuf::from(SOCKET));
        assert_eq!((conf.ipam, conf.previous, conf.default_route), (None, None, None));
    }

    #[test]
    fn errors_have_the_numbers_of_the_specification() {
        assert_eq!(code_of("{"), code::DECODE);
        assert_eq!(code_of(r#"{"name":"mesh"}"#), code::VERSION);
        assert_eq!(code_of(&MINIMAL.replace("1.0.0", "0.3.1")), code::VERSION);
        assert_eq!(code_of(&MINIMAL.replace("\"mesh\"", "\"../mesh\"")), code::CONFIG);
        assert_eq!(code_of(&MINIMAL.replace('}', r#","mtu":3}"#)), code::DECODE);
        let conf = NetConf::parse(MINIMAL.replace('}', r#","prevResult":7}"#).as_bytes()).expect("taken");
        assert_eq!(conf.previous_result().expect_err("a number").code, code::DECODE);
        let conf = NetConf::parse(MINIMAL.as_bytes()).expect("taken");
        let error = conf
            .mac(&Args::parse("MAC=ff:ff:ff:ff:ff:ff"))
            .expect_err("no unicast");
        assert_eq!(error.code, code::CONFIG);
    }

    #[test]
    fn both_names_of_the_list_of_valid_attachments_are_read() {
        for name in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            let list = format!(r#","{name}":[{{"containerID":"c1","ifname":"eth0"}}]}}"#);
            let conf = NetConf::parse(MINIMAL.replace('}', &list).as_bytes()).expect("taken");
            assert_eq!(conf.valid.expect("a list")[0].container, "c1");
        }
    }

    proptest! {
        #[test]
        fn every_prefix_of_a_configuration_is_refused_and_none_panics(cut in 0..MINIMAL.len()) {
            prop_assert_eq!(NetConf::parse(&MINIMAL.as_bytes()[..cut]).expect_err("cut off").code, code::DECODE);
        }
    }
}
