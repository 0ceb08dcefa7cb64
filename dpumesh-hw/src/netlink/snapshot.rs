//! The network configuration of a namespace at one moment, to find out what somebody left behind.

use std::collections::BTreeSet;
use std::fmt;

use super::{Netlink, NetlinkError};

/// Interfaces, addresses, routes, rules and configured neighbours, one line each, without counters and without what
/// the kernel learns by itself.
///
/// Interfaces are named by number in the other lines: one that was made anew differs from its predecessor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    lines: BTreeSet<String>,
}

/// What two snapshots do not share; prints as lines beginning with `-` and `+`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Only in the earlier one.
    pub gone: Vec<String>,
    /// Only in the later one.
    pub new: Vec<String>,
}

impl Netlink {
    /// Lists everything. The lists are taken one after the other, not at one instant.
    ///
    /// # Errors
    /// If the kernel refuses one of the questions.
    pub fn snapshot(&mut self) -> Result<Snapshot, NetlinkError> {
        let mut lines = BTreeSet::new();
        for link in self.links()? {
            let mac = link
                .mac
                .map(|mac| mac.map(|octet| format!("{octet:02x}")).join(":"));
            lines.insert(format!(
                "{} {} kind {} mac {} mtu {} up {} noarp {}",
                link.index,
                link.name,
                link.kind.as_deref().unwrap_or("none"),
                mac.as_deref().unwrap_or("none"),
                link.mtu,
                link.up,
                link.noarp,
            ));
        }
        lines.extend(self.addresses()?.iter().map(ToString::to_string));
        lines.extend(
            self.routes(None)?
                .iter()
                .map(|route| format!("{route} {:?}", route.metrics)),
        );
        lines.extend(self.rules()?.iter().map(ToString::to_string));
        lines.extend(
            self.neighbours()?
                .iter()
                .filter(|known| known.permanent)
                .map(ToString::to_string),
        );
        Ok(Snapshot { lines })
    }
}

impl Snapshot {
    /// The lines, sorted.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }

    /// What has come and gone from this one to `later`.
    pub fn difference(&self, later: &Self) -> Difference {
        let missing_in = |one: &Self, other: &Self| one.lines.difference(&other.lines).cloned().collect();
        Difference {
            gone: missing_in(self, later),
            new: missing_in(later, self),
        }
    }
}

impl Difference {
    /// Both snapshots say the same.
    pub fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.new.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.gone.iter().try_for_each(|line| writeln!(f, "- {line}"))?;
        self.new.iter().try_for_each(|line| writeln!(f, "+ {line}"))
    }
}
