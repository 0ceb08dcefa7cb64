//! [`AddResult`]: what ADD answers; also what a delegated IPAM plugin answers, and what comes back as `prevResult`.

use std::net::IpAddr;

use dpumesh_core::MacAddr;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Version;

/// Interfaces, addresses and routes of one attachment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AddResult {
    /// Made interfaces. Those of an IPAM plugin: none.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub ips: Vec<AssignedIp>,
    /// Routes.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub routes: Vec<Route>,
    /// Name service, handed on as it is.
    #[serde(
        default,
        skip_serializing_if = "Map::is_empty",
        deserialize_with = "null_is_default"
    )]
    pub dns: Map<String, Value>,
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name where it is.
    #[serde(default)]
    pub name: String,
    /// Its MAC. Runtimes refuse a sandbox's interface without one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Path of the namespace it is in; empty: the host's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Largest L3 packet; since 1.1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// PCI address of the device; since 1.1.0.
    #[serde(rename = "pciID", default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
}

/// An address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssignedIp {
    /// Address and length of its network's prefix.
    pub address: IpNet,
    /// The router to everywhere else.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "empty_is_none"
    )]
    pub gateway: Option<IpAddr>,
    /// On which of the interfaces. An IPAM plugin does not know; a runtime must be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// By which router.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "empty_is_none"
    )]
    pub gw: Option<IpAddr>,
    /// Largest L3 packet on the way; since 1.1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

impl AddResult {
    /// As it is written to standard output: without what the version does not know.
    pub fn to_json(&self, version: Version) -> Value {
        let mut result = self.clone();
        if version < Version::V1_1 {
            for interface in &mut result.interfaces {
                interface.mtu = None;
                interface.pci = None;
            }
            for route in &mut result.routes {
                route.mtu = None;
            }
        }
        // A struct of texts, numbers and maps with text keys cannot fail to become JSON.
        let mut json = serde_json::to_value(&result).unwrap_or_default();
        json["cniVersion"] = version.as_str().into();
        json
    }

    /// The interface called `name` in a sandbox, and its addresses.
    pub fn sandboxed(&self, name: &str) -> Option<(&Interface, Vec<IpNet>)> {
        let of_sandbox = |interface: &Interface| interface.name == name && !interface.sandbox.is_empty();
        let index = self.interfaces.iter().position(of_sandbox)?;
        let ips = self.ips.iter().filter(|ip| ip.interface == Some(index));
        Some((&self.interfaces[index], ips.map(|ip| ip.address).collect()))
    }

    /// The interface with this MAC as IPAM left it to the caller: sets every address' interface to the first.
    #[must_use]
    pub fn on_interface(mut self, interface: Interface) -> Self {
        self.interfaces = vec![interface];
        for ip in &mut self.ips {
            ip.interface = Some(0);
        }
        self
    }
}

impl Interface {
    /// An interface in a sandbox.
    pub fn in_sandbox(name: &str, mac: MacAddr, sandbox: &str) -> Self {
        Self {
            name: name.to_owned(),
            mac: mac.to_string(),
            sandbox: sandbox.to_owned(),
            ..Self::default()
        }
    }
}

/// Go writes an empty list or map as `null`.
fn null_is_default<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::deserialize(from).map(Option::unwrap_or_default)
}

/// Go writes an address that is not there as an empty text.
fn empty_is_none<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<IpAddr>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    let text = text.filter(|text| !text.is_empty());
    text.map(|text| text.parse().map_err(serde::de::Error::custom))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Debian's host-local answers, with a null and an old field.
    const HOST_LOCAL: &str = r#"{"cniVersion":"1.0.0","interfaces":null,
        "ips":[{"version":"4","address":"10.244.1.2/24","gateway":"10.244.1.1"},
               {"address":"fd00::2/64","gateway":""}],
        "routes":[{"dst":"0.0.0.0/0"},{"dst":"fd00::/8","gw":"fd00::1"}],"dns":{}}"#;

    fn result() -> AddResult {
        let ipam: AddResult = serde_json::from_str(HOST_LOCAL).expect("read");
        let mut interface = Interface::in_sandbox("eth0", MacAddr([2, 0, 0, 0, 0, 1]), "/run/netns/c1");
        interface.pci = Some("0000:3b:00.2".to_owned());
        interface.mtu = Some(1450);
        ipam.on_interface(interface)
    }

    #[test]
    fn every_address_has_an_interface_with_mac_and_sandbox() {
        let json = result().to_json(Version::V1_1);
        assert_eq!(json["interfaces"][0]["mac"], "02:00:00:00:00:01");
        assert_eq!(json["interfaces"][0]["sandbox"], "/run/netns/c1");
        assert_eq!(json["interfaces"][0]["pciID"], "0000:3b:00.2");
        for ip in json["ips"].as_array().expect("addresses") {
            assert_eq!(ip["interface"], 0);
        }
        assert_eq!(json["ips"][0]["address"], "10.244.1.2/24");
        assert_eq!(json["routes"][1]["gw"], "fd00::1");
    }

    #[test]
    fn version_1_0_is_not_told_what_1_1_brought() {
        let json = result().to_json(Version::V1_0);
        assert_eq!(json["cniVersion"], "1.0.0");
        assert!(json["interfaces"][0].get("pciID").is_none());
        assert!(json["interfaces"][0].get("mtu").is_none());
    }

    #[test]
    fn a_result_comes_back_as_previous_result() {
        let back: AddResult = serde_json::from_value(result().to_json(Version::V1_1)).expect("read");
        assert_eq!(back, result());
        let (interface, addresses) = back.sandboxed("eth0").expect("found");
        assert_eq!(interface.mtu, Some(1450));
        assert_eq!(addresses.len(), 2);
        assert!(back.sandboxed("net1").is_none());
    }
}
