//! What the tables do with a frame: groups from 0 upwards, in each the tables by priority, in a table the whole key.
//!
//! A frame that a group misses is handed to the SoC as it arrived, and what it passed on the way counted nothing: that is
//! what the header promises, so that software can start from the beginning.

use std::net::IpAddr;
use std::time::Instant;

use dpumesh_core::{Frame, Vni};
use dpumesh_hw::wire::encap::{self, Endpoints, OuterChecksum};
use dpumesh_hw::wire::{Fragment, Headers, L3, vxlan};
use dpumesh_yusur::table::{self, Key, Tunnel};

use crate::card::{Bucket, State, steps};

/// What became of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It leaves by a port.
    Forwarded(u64, Vec<u8>),
    /// It goes to the shared proxy.
    Punted(Vec<u8>),
    /// It goes to the SoC as it arrived.
    Missed,
    /// It is gone.
    Dropped(&'static str),
}

impl State {
    /// Takes a frame in by a port.
    pub fn switch(&mut self, port: u64, octets: &[u8]) -> Fate {
        if !self.alive {
            return Fate::Dropped("the processor is being reset");
        }
        if self.limits().entries == 0 {
            return Fate::Missed;
        }
        let mut frame = Frame::copy_of(octets);
        let (mut group, mut counts) = (0, Vec::new());
        loop {
            let Ok(headers) = Headers::parse(frame.octets()) else {
                return Fate::Dropped("malformed");
            };
            let Some((table, key)) = self.find(group, port, &headers, frame.octets()) else {
                return self.miss(port);
            };
            let Some(held) = self
                .steering
                .tables
                .get_mut(&table)
                .and_then(|content| content.entries.get_mut(&key))
            else {
                return self.miss(port);
            };
            held.hit = Instant::now();
            held.told = false;
            let entry = held.entry;
            if entry.counter > 0 {
                counts.push((entry.counter, frame.len() as u64));
            }
            let mut outcome = None;
            for step in steps(&entry) {
                outcome = match step.kind {
                    table::STEP_DROP => Some(Fate::Dropped("a rule")),
                    table::STEP_FORWARD => Some(Fate::Forwarded(step.arg, frame.octets().to_vec())),
                    table::STEP_PUNT => Some(Fate::Punted(frame.octets().to_vec())),
                    table::STEP_JUMP => {
                        group = step.arg as u32;
                        None
                    }
                    table::STEP_SET_ETH_SRC => {
                        frame.octets_mut()[6..12].copy_from_slice(&step.mac);
                        None
                    }
                    table::STEP_SET_ETH_DST => {
                        frame.octets_mut()[..6].copy_from_slice(&step.mac);
                        None
                    }
                    table::STEP_TTL => count_down(&mut frame).err().map(Fate::Dropped),
                    table::STEP_METER => self.meter(step.arg as u32, frame.len()).err().map(Fate::Dropped),
                    table::STEP_ENCAPSULATE => {
                        let tunnel = self.steering.tunnels.get(&(step.arg as u32));
                        encapsulate(&mut frame, tunnel).err().map(Fate::Dropped)
                    }
                    table::STEP_DECAPSULATE => decapsulate(&mut frame).err().map(Fate::Dropped),
                    _ => Some(Fate::Dropped("an unknown step")),
                };
                if outcome.is_some() {
                    break;
                }
            }
            if let Some(fate) = outcome {
                for (counter, octets) in counts {
                    let counter = self.steering.counters.entry(counter).or_default();
                    counter.packets += 1;
                    counter.octets += octets;
                }
                return fate;
            }
        }
    }

    /// Table and key of the first entry that the frame has in a group.
    fn find(&self, group: u32, port: u64, headers: &Headers, octets: &[u8]) -> Option<(u32, Key)> {
        let mut tables: Vec<_> = self
            .steering
            .tables
            .iter()
            .filter(|(_, content)| content.table.group == group)
            .collect();
        tables.sort_unstable_by_key(|(id, content)| (content.table.priority, **id));
        tables.into_iter().find_map(|(id, content)| {
            let key = key(content.table.fields, port, headers, octets)?;
            content.entries.contains_key(&key).then_some((*id, key))
        })
    }

    fn miss(&self, port: u64) -> Fate {
        let steering = &self.steering;
        match steering.misses.get(&port).copied().unwrap_or(steering.miss) {
            table::MISS_SOC => Fate::Missed,
            _ => Fate::Dropped("no entry"),
        }
    }

    fn meter(&mut self, id: u32, octets: usize) -> Result<(), &'static str> {
        let bucket: &mut Bucket = self.steering.meters.get_mut(&id).ok_or("no such meter")?;
        let now = Instant::now();
        let passed = now.duration_since(bucket.filled).as_micros() as u64;
        let more = bucket.meter.octets_per_second.saturating_mul(passed) / 1_000_000;
        if more > 0 {
            bucket.octets = bucket.octets.saturating_add(more).min(bucket.meter.burst_octets);
            bucket.filled = now;
        }
        bucket.octets = bucket.octets.checked_sub(octets as u64).ok_or("a meter")?;
        Ok(())
    }
}

/// The key that a frame has in a table that looks at these fields; `None` when it lacks one of them.
fn key(fields: u64, port: u64, headers: &Headers, octets: &[u8]) -> Option<Key> {
    let mut key = Key::default();
    let looks = |field: u64| fields & field != 0;
    if looks(table::FIELD_PORT) {
        key.port = port;
    }
    if looks(table::FIELD_ETH_SRC) {
        key.eth_src = headers.eth_src.0;
    }
    if looks(table::FIELD_ETH_DST) {
        key.eth_dst = headers.eth_dst.0;
    }
    if looks(table::FIELD_ETHERTYPE) {
        key.ethertype = headers.ethertype;
    }
    if looks(table::FIELD_VLAN) {
        key.vlan = match headers.vlan {
            None => table::UNTAGGED,
            Some(tag) => tag.id().map_or(0, |id| id.get()), // 0: a priority tag, which no pattern means
        };
    }
    let is = |version: L3| (headers.l3 == version).then_some(());
    let four = |address: IpAddr| {
        let mut octets = [0; 16];
        if let IpAddr::V4(v4) = address {
            octets[..4].copy_from_slice(&v4.octets());
        }
        octets
    };
    if looks(table::FIELD_IP4_SRC) {
        is(L3::Ipv4)?;
        key.ip_src = four(headers.source());
    }
    if looks(table::FIELD_IP4_DST) {
        is(L3::Ipv4)?;
        key.ip_dst = four(headers.destination());
    }
    if looks(table::FIELD_IP6_SRC) {
        is(L3::Ipv6)?;
        key.ip_src = headers.src;
    }
    if looks(table::FIELD_IP6_DST) {
        is(L3::Ipv6)?;
        key.ip_dst = headers.dst;
    }
    if looks(table::FIELD_IP_PROTO) {
        if !headers.is_ip() {
            return None;
        }
        key.ip_proto = headers.protocol;
    }
    if looks(table::FIELD_L4_SRC) || looks(table::FIELD_L4_DST) {
        let (src, dst) = l4_ports(headers, octets)?;
        if looks(table::FIELD_L4_SRC) {
            key.l4_src = src;
        }
        if looks(table::FIELD_L4_DST) {
            key.l4_dst = dst;
        }
    }
    Some(key)
}

/// Ports of TCP, UDP and SCTP, which have them in the same place; later fragments have none.
fn l4_ports(headers: &Headers, octets: &[u8]) -> Option<(u16, u16)> {
    if !headers.is_ip()
        || !matches!(headers.protocol, 6 | 17 | 132)
        || matches!(headers.fragment, Fragment::Later { .. })
    {
        return None;
    }
    let ports = octets.get(headers.l4_range())?.get(..4)?;
    Some((
        u16::from_be_bytes([ports[0], ports[1]]),
        u16::from_be_bytes([ports[2], ports[3]]),
    ))
}

fn count_down(frame: &mut Frame) -> Result<(), &'static str> {
    let headers = Headers::parse(frame.octets()).map_err(|_| "malformed")?;
    if !headers.is_ip() {
        return Err("no IP packet to count down");
    }
    let at = usize::from(headers.l3_offset);
    let packet = &mut frame.octets_mut()[at..];
    let ttl = &mut packet[if headers.l3 == L3::Ipv4 { 8 } else { 7 }];
    if *ttl <= 1 {
        return Err("its TTL is used up");
    }
    *ttl -= 1;
    if headers.l3 == L3::Ipv4 {
        // The TTL is the high octet of its word: one less there is 0x0100 more in the complement sum (RFC 1624).
        let sum = u32::from(u16::from_be_bytes([packet[10], packet[11]])) + 0x0100;
        let folded = (sum & 0xffff) + (sum >> 16);
        packet[10..12].copy_from_slice(&(folded as u16).to_be_bytes());
    }
    Ok(())
}

fn encapsulate(frame: &mut Frame, tunnel: Option<&Tunnel>) -> Result<(), &'static str> {
    let tunnel = tunnel.ok_or("no such tunnel")?;
    let inner = Headers::parse(frame.octets()).map_err(|_| "malformed")?;
    let four = |octets: [u8; 16]| std::net::Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]);
    let endpoints = match tunnel.ip_version {
        4 => Endpoints::V4 {
            local: four(tunnel.local),
            remote: four(tunnel.remote),
        },
        _ => Endpoints::V6 {
            local: tunnel.local.into(),
            remote: tunnel.remote.into(),
        },
    };
    let outer = encap::Tunnel {
        eth_src: dpumesh_core::MacAddr(tunnel.eth_src),
        eth_dst: dpumesh_core::MacAddr(tunnel.eth_dst),
        endpoints,
        ttl: 64,
        port: vxlan::PORT,
        vni: Vni::try_from(tunnel.vni).map_err(|_| "no such network")?,
        checksum: OuterChecksum::Complete,
    };
    encap::encapsulate(frame, &inner, &outer).map_err(|_| "it cannot be encapsulated")
}

fn decapsulate(frame: &mut Frame) -> Result<(), &'static str> {
    let outer = Headers::parse(frame.octets()).map_err(|_| "malformed")?;
    match encap::decapsulate(frame, &outer) {
        Ok(Some(_)) => Ok(()),
        _ => Err("no VXLAN packet"),
    }
}
