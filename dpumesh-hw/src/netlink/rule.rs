//! Policy rules: which routing table a packet is looked up in.

use std::fmt;

use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL, Parseable};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Netlink, NetlinkError, PROTOCOL, attributes};

/// Packets that came in by an interface, or bear a mark, are looked up in a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For IPv6 packets; IPv4 otherwise.
    pub ipv6: bool,
    /// Lower numbers are asked first.
    pub priority: u32,
    /// Name of the interface the packet came in by; `None`: any.
    pub incoming: Option<String>,
    /// The packet's whole mark; `None`: any.
    pub mark: Option<u32>,
    /// The table.
    pub table: u32,
    /// Who made it (`RTPROT_*`); [`super::PROTOCOL`] for ours.
    pub protocol: u8,
}

impl Rule {
    /// Looks packets from the interface `incoming` up in `table`.
    pub fn incoming(ipv6: bool, incoming: &str, table: u32, priority: u32) -> Self {
        Self {
            ipv6,
            priority,
            incoming: Some(incoming.to_owned()),
            mark: None,
            table,
            protocol: PROTOCOL,
        }
    }

    /// Looks packets that bear exactly `mark` up in `table`.
    pub fn marked(ipv6: bool, mark: u32, table: u32, priority: u32) -> Self {
        Self {
            ipv6,
            priority,
            incoming: None,
            mark: Some(mark),
            table,
            protocol: PROTOCOL,
        }
    }

    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = if self.ipv6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![
            RuleAttribute::Priority(self.priority),
            RuleAttribute::Table(self.table),
            RuleAttribute::Protocol(RouteProtocol::from(self.protocol)),
        ];
        message
            .attributes
            .extend(self.incoming.clone().map(RuleAttribute::Iifname));
        if let Some(mark) = self.mark {
            let whole = [RuleAttribute::FwMark(mark), RuleAttribute::FwMask(u32::MAX)];
            message.attributes.extend(whole);
        }
        message
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv6 { "IPv6" } else { "IPv4" };
        write!(f, "{family} rule {}", self.priority)?;
        match &self.incoming {
            Some(incoming) => write!(f, " from interface {incoming}")?,
            None => f.write_str(" from any interface")?,
        }
        if let Some(mark) = self.mark {
            write!(f, " with mark {mark:#x}")?;
        }
        write!(f, " to table {}", self.table)
    }
}

impl Netlink {
    /// Adds a rule.
    ///
    /// # Errors
    /// `is_exists` if the same one is there.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewRule(rule.message());
        self.change("add", rule, message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes a rule.
    ///
    /// # Errors
    /// `is_missing` if it is not there.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<(), NetlinkError> {
        self.change("delete", rule, RouteNetlinkMessage::DelRule(rule.message()), 0)
    }

    /// All rules of both families that lead to a table, in the order they are asked.
    ///
    /// # Errors
    /// If the kernel refuses the question.
    pub fn rules(&mut self) -> Result<Vec<Rule>, NetlinkError> {
        let mut rules = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut question = RuleMessage::default();
            question.header.family = family;
            match self.dump("list", "rules", &RouteNetlinkMessage::GetRule(question)) {
                Ok(replies) => rules.extend(replies.iter().filter_map(|reply| parse(reply))),
                // A kernel without this family has no rules for it.
                Err(error) if error.errno() == Some(libc::EAFNOSUPPORT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(rules)
    }
}

pub(super) fn parse(payload: &[u8]) -> Option<Rule> {
    let header = RuleHeader::parse(payload).ok()?;
    if header.action != RuleAction::ToTable {
        return None;
    }
    let ipv6 = header.family == AddressFamily::Inet6;
    let mut rule = Rule {
        ipv6,
        priority: 0,
        incoming: None,
        mark: None,
        table: header.table.into(),
        protocol: 0,
    };
    for attribute in attributes(payload, header.buffer_len()) {
        match RuleAttribute::parse(&attribute) {
            Ok(RuleAttribute::Priority(priority)) => rule.priority = priority,
            Ok(RuleAttribute::Table(table)) => rule.table = table,
            Ok(RuleAttribute::Iifname(name)) => rule.incoming = Some(name),
            Ok(RuleAttribute::FwMark(mark)) => rule.mark = Some(mark),
            Ok(RuleAttribute::Protocol(protocol)) => rule.protocol = protocol.into(),
            _ => {}
        }
    }
    Some(rule)
}
