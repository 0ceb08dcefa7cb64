//! [`SteeringRule`] and the sanity that every backend may rely on ([`SteeringRule::check`]).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Action, FragmentMatch, IpMatch, Pattern, RewriteField};

/// A rule of the eswitch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SteeringRule {
    /// The caller's name for it; unique on the card.
    pub cookie: Cookie,
    /// Who may see and remove it.
    pub owner: Owner,
    /// Where it is looked for.
    #[serde(default)]
    pub group: Group,
    /// Lower numbers win.
    pub priority: Priority,
    /// What it looks at.
    #[serde(default)]
    pub pattern: Pattern,
    /// What it does; the last one is final and no other is.
    pub actions: Vec<Action>,
    /// Where it may act.
    #[serde(default)]
    pub placement: PlacementRequest,
    /// Removed after so many milliseconds without a hit, with [`crate::Event::Aged`]; `None` keeps it.
    #[serde(default)]
    pub idle_timeout_ms: Option<u32>,
}

/// The caller's name for a rule: 128 bits of its own choice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Cookie(pub u128);

impl fmt::Display for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Cookie> for String {
    fn from(cookie: Cookie) -> Self {
        cookie.to_string()
    }
}

impl TryFrom<String> for Cookie {
    type Error = crate::addr::InvalidValue;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digits = (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        digits
            .then(|| u128::from_str_radix(&text, 16).ok().map(Self))
            .flatten()
            .ok_or_else(|| crate::addr::InvalidValue::new("cookie", &text, "1 to 32 hex digits"))
    }
}

/// Who installed a rule. Owners are fenced apart: each sees, replaces and removes only its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Owner {
    /// The node agent: forwarding and interception.
    Agent,
    /// The shared proxy: entries of its own connections.
    Proxy,
    /// The dataplane itself: flows it offloads.
    Dataplane,
    /// Rules that users gave, in numbered sets.
    User(u16),
}

/// A set of rules that a frame is matched against; matching begins in group 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Group(pub u32);

/// Rank of a rule within its group: **lower number = higher priority**, 0 first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Priority(pub u32);

/// Where a rule may act.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlacementRequest {
    /// In the card if it can, in software else.
    #[default]
    Any,
    /// In the card only; refused when it cannot (tc `skip_sw`).
    Hardware,
    /// In software only (tc `skip_hw`).
    Software,
}

/// Why a rule makes no sense on any backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct RuleError {
    /// Path of the field within the rule.
    pub field: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl SteeringRule {
    /// A rule in group 0 that may act anywhere and does not age.
    pub fn new(
        cookie: Cookie,
        owner: Owner,
        priority: Priority,
        pattern: Pattern,
        actions: Vec<Action>,
    ) -> Self {
        Self {
            cookie,
            owner,
            group: Group::default(),
            priority,
            pattern,
            actions,
            placement: PlacementRequest::default(),
            idle_timeout_ms: None,
        }
    }

    /// Puts the rule into a group.
    pub fn in_group(mut self, group: Group) -> Self {
        self.group = group;
        self
    }

    /// Checks what no backend could give a meaning: every backend calls this first and may rely on it afterwards.
    ///
    /// # Errors
    /// The first field that makes no sense.
    pub fn check(&self) -> Result<(), RuleError> {
        self.check_actions()?;
        self.pattern.check()?;
        match self.idle_timeout_ms {
            Some(0) => refuse("idle_timeout_ms", "must be at least 1"),
            _ => Ok(()),
        }
    }

    fn check_actions(&self) -> Result<(), RuleError> {
        let Some((last, steps)) = self.actions.split_last() else {
            return refuse("actions", "must not be empty");
        };
        if let Some(index) = steps.iter().position(Action::is_final) {
            return refuse(
                format!("actions[{index}]"),
                "ends the rule but is not the last action",
            );
        }
        if !last.is_final() {
            return refuse(
                format!("actions[{}]", steps.len()),
                "must end the rule: nothing says where the frame goes",
            );
        }
        for (index, action) in self.actions.iter().enumerate() {
            if let Err(reason) = check_action(action, self.group) {
                return refuse(format!("actions[{index}]"), reason);
            }
        }
        Ok(())
    }
}

fn check_action(action: &Action, group: Group) -> Result<(), &'static str> {
    match action {
        Action::Jump(target) if *target <= group => Err("may jump only to a group of a higher number"),
        Action::Rss(queues) if queues.is_empty() => Err("needs at least one queue"),
        Action::Encapsulate(outer) if outer.local.is_ipv4() != outer.remote.is_ipv4() => {
            Err("local and remote must be of one address family")
        }
        Action::Rewrite(RewriteField::Dscp(64..)) => Err("a DSCP is 0 to 63"),
        _ => Ok(()),
    }
}

impl Pattern {
    fn check(&self) -> Result<(), RuleError> {
        let families = [("pattern.ip_src", self.ip_src), ("pattern.ip_dst", self.ip_dst)];
        for (field, address) in families {
            match address {
                Some(IpMatch::Prefix(prefix)) if prefix != prefix.trunc() => {
                    return refuse(field, "has bits set behind its prefix length");
                }
                Some(IpMatch::Masked(m)) if m.value.is_ipv4() != m.mask.is_ipv4() => {
                    return refuse(field, "value and mask are of different address families");
                }
                _ => {}
            }
        }
        if let (Some(src), Some(dst)) = (self.ip_src, self.ip_dst)
            && src.is_ipv4() != dst.is_ipv4()
        {
            return refuse(
                "pattern.ip_dst",
                "is of another address family than pattern.ip_src",
            );
        }
        for (field, range) in [("pattern.l4_src", self.l4_src), ("pattern.l4_dst", self.l4_dst)] {
            let Some(range) = range else { continue };
            if range.first > range.last {
                return refuse(field, "range ends before it begins");
            }
            if !self.ip_proto.is_some_and(|proto| proto.has_ports()) {
                return refuse(field, "needs pattern.ip_proto to be TCP, UDP or SCTP");
            }
            if self.fragment == Some(FragmentMatch::Later) {
                return refuse(field, "later fragments carry no ports");
            }
        }
        if self.tcp_flags.is_some() && self.ip_proto != Some(super::IpProtocol::TCP) {
            return refuse("pattern.tcp_flags", "needs pattern.ip_proto to be TCP");
        }
        if self.dscp.is_some_and(|dscp| dscp.0 > 63) {
            return refuse("pattern.dscp", "a DSCP is 0 to 63");
        }
        Ok(())
    }
}

impl IpMatch {
    /// True for an IPv4 pattern.
    pub const fn is_ipv4(&self) -> bool {
        match self {
            Self::Prefix(prefix) => matches!(prefix, ipnet::IpNet::V4(_)),
            Self::Masked(masked) => masked.value.is_ipv4(),
        }
    }
}

fn refuse(field: impl Into<String>, reason: &'static str) -> Result<(), RuleError> {
    Err(RuleError {
        field: field.into(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::PortRef;
    use crate::steering::{IpProtocol, PortRange};

    fn rule(pattern: Pattern, actions: Vec<Action>) -> SteeringRule {
        SteeringRule::new(Cookie(1), Owner::Agent, Priority(1), pattern, actions)
    }

    #[test]
    fn senseless_rules_are_refused_with_the_field() {
        let tcp = Pattern {
            ip_proto: Some(IpProtocol::TCP),
            ..Pattern::default()
        };
        let ports = |range| Pattern {
            l4_dst: Some(range),
            ..tcp.clone()
        };
        let cases = [
            (rule(Pattern::default(), vec![]), "actions"),
            (
                rule(Pattern::default(), vec![Action::Drop, Action::Drop]),
                "actions[0]",
            ),
            (rule(Pattern::default(), vec![Action::Count]), "actions[0]"),
            (
                rule(Pattern::default(), vec![Action::Jump(Group(0))]),
                "actions[0]",
            ),
            (
                rule(ports(PortRange { first: 2, last: 1 }), vec![Action::Drop]),
                "pattern.l4_dst",
            ),
            (
                rule(
                    Pattern {
                        l4_src: Some(80.into()),
                        ..Pattern::default()
                    },
                    vec![Action::Drop],
                ),
                "pattern.l4_src",
            ),
            (
                rule(
                    Pattern {
                        ip_src: Some(IpMatch::Prefix("10.0.0.1/8".parse().expect("prefix"))),
                        ..Pattern::default()
                    },
                    vec![Action::Drop],
                ),
                "pattern.ip_src",
            ),
        ];
        for (rule, field) in cases {
            assert_eq!(rule.check().expect_err(field).field, field);
        }
        assert_eq!(
            rule(ports(80.into()), vec![Action::Count, Action::Punt]).check(),
            Ok(())
        );
    }

    #[test]
    fn a_rule_travels_as_json_and_unknown_fields_do_not() {
        let original = rule(
            Pattern {
                port: Some(PortRef::vf(3)),
                ip_dst: Some(IpMatch::from(
                    "10.1.0.0/16".parse::<ipnet::IpNet>().expect("prefix"),
                )),
                ..Pattern::default()
            },
            vec![Action::Count, Action::Forward(PortRef::Uplink(0))],
        );
        let json = serde_json::to_string(&original).expect("serialises");
        assert_eq!(
            serde_json::from_str::<SteeringRule>(&json).expect("reads back"),
            original
        );
        let foreign = json.replacen("\"pattern\":{", "\"pattern\":{\"moon\":1,", 1);
        assert!(
            serde_json::from_str::<SteeringRule>(&foreign)
                .expect_err("refused")
                .to_string()
                .contains("moon")
        );
    }
}
