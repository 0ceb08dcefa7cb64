//! Which requests may become tunnels: `upgrade_configs` of connection managers and routes.

/// `upgrade_configs`; the default allows none.
#[derive(Debug, Clone, Default)]
pub struct Upgrades(pub Vec<Upgrade>);

/// One kind of tunnel.
#[derive(Debug, Clone)]
pub struct Upgrade {
    /// What the `upgrade` header says, or `connect`; lower case.
    pub kind: Vec<u8>,
    /// Whether it is allowed.
    pub enabled: bool,
    /// The tunnel of CONNECT ends here (`connect_config`): what it carries goes to the endpoint as it is.
    pub terminated: bool,
}

/// How a tunnel goes on to the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tunnel {
    /// The endpoint is asked to upgrade and opens it with 101.
    Upgrade,
    /// The endpoint is asked with CONNECT and opens it with 2xx.
    Connect,
    /// It ends here; a connection to the endpoint opens it.
    Terminated,
}

impl Upgrades {
    fn find(&self, kind: &[u8]) -> Option<&Upgrade> {
        self.0.iter().find(|u| u.kind.eq_ignore_ascii_case(kind))
    }

    /// Whether a tunnel of this kind may be opened, `self` being the connection manager's word. A route's word goes
    /// before it, either way.
    pub fn allow(&self, route: Option<&Self>, kind: &[u8]) -> Option<Tunnel> {
        let of_route = route.and_then(|r| r.find(kind));
        let enabled = match of_route {
            Some(of_route) => of_route.enabled,
            None => self.find(kind).is_some_and(|own| own.enabled),
        };
        let how = match of_route {
            _ if !kind.eq_ignore_ascii_case(CONNECT) => Tunnel::Upgrade,
            Some(of_route) if of_route.terminated => Tunnel::Terminated,
            _ => Tunnel::Connect,
        };
        enabled.then_some(how)
    }
}

/// The kind of a CONNECT request.
pub const CONNECT: &[u8] = b"connect";

#[cfg(test)]
mod tests {
    use super::*;

    fn upgrades(list: &[(&str, bool, bool)]) -> Upgrades {
        let upgrade = |(kind, enabled, terminated): &(&str, bool, bool)| Upgrade {
            kind: kind.as_bytes().to_vec(),
            enabled: *enabled,
            terminated: *terminated,
        };
        Upgrades(list.iter().map(upgrade).collect())
    }

    #[test]
    fn a_route_goes_before_its_connection_manager() {
        let manager = upgrades(&[("websocket", true, false), ("connect", false, false)]);
        let none = Upgrades::default();
        let route = upgrades(&[
            ("websocket", false, false),
            ("connect", true, true),
            ("foo", true, false),
        ]);
        for (manager, route, kind, wanted) in [
            (&none, None, "websocket", None),
            (&manager, None, "WebSocket", Some(Tunnel::Upgrade)),
            (&manager, Some(&none), "websocket", Some(Tunnel::Upgrade)),
            (&manager, Some(&route), "websocket", None),
            (&manager, None, "CONNECT", None),
            (&manager, Some(&route), "CONNECT", Some(Tunnel::Terminated)),
            (&none, Some(&route), "FOO", Some(Tunnel::Upgrade)),
            (
                &upgrades(&[("connect", true, false)]),
                None,
                "CONNECT",
                Some(Tunnel::Connect),
            ),
            (&manager, None, "websocket, foo", None),
        ] {
            assert_eq!(manager.allow(route, kind.as_bytes()), wanted, "{kind}");
        }
    }
}
