//! The interface in the pod: MTU, addresses and routes by netlink, and whether they are still there.
//!
//! The router behind every VF is the dataplane, which answers for whatever address it is asked for. So a gateway need not be
//! in the address' own network: routes by it are `onlink`. Where IPAM names none, it is 169.254.1.1 or fe80::1.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use dpumesh_core::MacAddr;
use dpumesh_hw::netlink::{self, Address, LinkChange, LinkIndex, Netlink, NetlinkError};
use dpumesh_hw::netns::Namespace;
use ipnet::IpNet;

use crate::protocol::{AddResult, ConfRoute, Error, Interface, NetConf, Route, code};
use crate::talk::Attached;

const ROUTER_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
const ROUTER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// The routes by the interface: those of the configuration and those that IPAM names, each with its router.
pub(super) fn routes(configured: &[ConfRoute], ipam: &AddResult) -> Vec<Route> {
    let wanted = configured.iter().map(|route| (route.dst, route.gw, None));
    let given = ipam.routes.iter().map(|route| (route.dst, route.gw, route.mtu));
    let mut routes: Vec<Route> = Vec::new();
    for (dst, gw, mtu) in wanted.chain(given) {
        let gw = Some(gw.unwrap_or_else(|| router(dst.addr().is_ipv4(), ipam)));
        if routes.iter().all(|route| route.dst != dst.trunc()) {
            let dst = dst.trunc();
            routes.push(Route { dst, gw, mtu });
        }
    }
    routes
}

fn router(ipv4: bool, ipam: &AddResult) -> IpAddr {
    let of_family = ipam.ips.iter().filter(|ip| ip.address.addr().is_ipv4() == ipv4);
    let gateway = of_family.filter_map(|ip| ip.gateway).next();
    gateway.unwrap_or(if ipv4 { ROUTER_V4 } else { ROUTER_V6 })
}

/// Sets MTU, addresses and routes. Returns the routes that were set, default ones included.
pub(super) fn furnish(
    netns: &Path,
    ifname: &str,
    attached: &Attached,
    ipam: &AddResult,
    routes: &[Route],
    conf: &NetConf,
) -> Result<Vec<Route>, Error> {
    let mut pod = open(netns)?;
    let link = pod.link(ifname).map_err(refused)?;
    let change = LinkChange::new().mtu(u32::from(attached.mtu.get())).up();
    pod.change_link(link.index, &change).map_err(refused)?;
    for ip in &ipam.ips {
        pod.add_address(&Address {
            link: link.index,
            net: ip.address,
        })
        .map_err(refused)?;
    }
    let mut set = routes.to_vec();
    if conf.default_route == Some(false) {
        set.retain(|route| route.dst.prefix_len() != 0);
    } else {
        let always = conf.default_route == Some(true);
        set.extend(missing_defaults(&mut pod, ipam, routes, always)?);
    }
    for route in &set {
        pod.replace_route(&onto(link.index, route)).map_err(refused)?;
    }
    Ok(set)
}

/// The default routes that nobody names, for each family with an address, unless the pod has one by another interface.
fn missing_defaults(
    pod: &mut Netlink,
    ipam: &AddResult,
    named: &[Route],
    always: bool,
) -> Result<Vec<Route>, Error> {
    let there = pod.routes(Some(netlink::Route::MAIN)).map_err(refused)?;
    let mut missing = Vec::new();
    for ipv4 in [true, false] {
        let is_default = |net: &IpNet| net.prefix_len() == 0 && net.addr().is_ipv4() == ipv4;
        let has_address = ipam.ips.iter().any(|ip| ip.address.addr().is_ipv4() == ipv4);
        let named = named.iter().any(|route| is_default(&route.dst));
        let other = there.iter().any(|route| is_default(&route.destination));
        // Routes that are named without a default one mean that there shall be none.
        let wanted = always || (ipam.routes.is_empty() && !other);
        if has_address && wanted && !named {
            missing.push(Route {
                dst: default(ipv4),
                gw: Some(router(ipv4, ipam)),
                mtu: None,
            });
        }
    }
    Ok(missing)
}

fn default(ipv4: bool) -> IpNet {
    if ipv4 {
        IpNet::V4(ipnet::Ipv4Net::default())
    } else {
        IpNet::V6(ipnet::Ipv6Net::default())
    }
}

fn onto(link: LinkIndex, route: &Route) -> netlink::Route {
    let mut onto = netlink::Route::new(route.dst).on(link).onlink();
    onto.gateway = route.gw;
    onto.metrics.mtu = route.mtu;
    onto
}

/// Looks whether the interface is there with its MAC and addresses.
pub(super) fn check(netns: &Path, interface: &Interface, nets: &[IpNet]) -> Result<(), Error> {
    let changed = |message: String| Error::new(code::CHANGED, message);
    let mut pod = open(netns)?;
    let link = match pod.link(&interface.name) {
        Ok(link) => link,
        Err(error) if error.is_missing() => {
            return Err(changed(format!("the pod has no interface {}", interface.name)));
        }
        Err(error) => return Err(refused(error)),
    };
    let mac = link.mac.map(|mac| MacAddr(mac).to_string()).unwrap_or_default();
    if !interface.mac.is_empty() && !interface.mac.eq_ignore_ascii_case(&mac) {
        let message = format!("{} has MAC {mac} instead of {}", interface.name, interface.mac);
        return Err(changed(message).details("the dataplane drops what it sends"));
    }
    if !link.up {
        return Err(changed(format!("{} is switched off", interface.name)));
    }
    let there = pod.addresses().map_err(refused)?;
    for net in nets {
        let found = there
            .iter()
            .any(|found| found.link == link.index && found.net == *net);
        if !found {
            return Err(changed(format!("{} has lost address {net}", interface.name)));
        }
    }
    Ok(())
}

fn open(netns: &Path) -> Result<Netlink, Error> {
    let namespace = Namespace::open(netns)
        .map_err(|error| Error::new(code::UNKNOWN_CONTAINER, format!("CNI_NETNS: {error}")))?;
    Netlink::open_in(&namespace).map_err(refused)
}

fn refused(error: NetlinkError) -> Error {
    Error::new(code::NETWORK, format!("in the pod: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_has_a_router() {
        let ipam: AddResult = serde_json::from_str(
            r#"{"ips":[{"address":"10.244.1.2/24","gateway":"10.244.1.1"},{"address":"fd00::2/64"}],
                "routes":[{"dst":"0.0.0.0/0"},{"dst":"fd00::/8"},{"dst":"10.0.0.0/8","gw":"10.244.1.9"}]}"#,
        )
        .expect("a result");
        let configured = [ConfRoute {
            dst: "10.96.0.7/16".parse().expect("a prefix"),
            gw: None,
        }];
        let routes = routes(&configured, &ipam);
        let text: Vec<String> = routes
            .iter()
            .map(|route| format!("{} {}", route.dst, route.gw.expect("a router")))
            .collect();
        assert_eq!(
            text,
            [
                "10.96.0.0/16 10.244.1.1",
                "0.0.0.0/0 10.244.1.1",
                "fd00::/8 fe80::1",
                "10.0.0.0/8 10.244.1.9"
            ]
        );
    }
}
