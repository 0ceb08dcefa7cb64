//! [`Step`]: one tc action, as octets and back.
//!
//! ```text
//! TCA_FLOWER_ACT { 1: { KIND, COOKIE, OPTIONS { struct tc_gen…, … }, STATS }, 2: … }
//! ```
//! `struct tc_gen` is index, capabilities, what happens next, two reference counts: five words. The first action of a filter
//! that no other filter shares carries the rule's cookie (`TCA_ACT_COOKIE`) and counts for the rule. Layouts: `include/uapi/linux/tc_act/*.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dpumesh_core::{MacAddr, Vni};

use super::octets::{Writer, attributes, find, text, u16_at, u32_at, u64_at};

/// One tc action. What the contract's actions become; see [`super::translate`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// gact: the frame is gone.
    Drop,
    /// gact: the frame goes on into the stack of its netdev.
    Pass,
    /// gact: nothing happens; counts frames before a policer does away with some.
    Note,
    /// gact: matching goes on in a chain.
    Goto(u32),
    /// mirred: the frame leaves by a netdev.
    Redirect(u32),
    /// mirred: a copy leaves by a netdev.
    Mirror(u32),
    /// vlan: an 802.1Q tag comes on.
    PushVlan(u16),
    /// vlan: the tag goes off.
    PopVlan,
    /// pedit: a field is written.
    Edit(Edit),
    /// csum: IPv4 header, TCP, UDP, ICMP and SCTP checksums are made anew.
    Checksums,
    /// tunnel_key: outer headers for the tunnel netdev that a redirect names.
    Tunnel {
        /// Network identifier.
        vni: Vni,
        /// Outer source.
        local: IpAddr,
        /// Outer destination.
        remote: IpAddr,
        /// Outer destination port.
        port: u16,
    },
    /// tunnel_key: the outer headers are forgotten.
    Untunnel,
    /// ct: the connection is looked up.
    Conntrack {
        /// Which table.
        zone: u16,
        /// Enter it if it is new.
        commit: bool,
    },
    /// police: what exceeds a rate is dropped. An index names a policer that several rules share.
    Police {
        /// Which.
        index: u32,
        /// Octets per second.
        rate: u32,
        /// Octets at once.
        burst: u32,
    },
}

/// What pedit writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Edit {
    EthSrc(MacAddr),
    EthDst(MacAddr),
    Ip4Src(Ipv4Addr),
    Ip4Dst(Ipv4Addr),
    Ip6Src(Ipv6Addr),
    Ip6Dst(Ipv6Addr),
    /// Port of TCP.
    TcpSrc(u16),
    TcpDst(u16),
    /// Port of UDP.
    UdpSrc(u16),
    UdpDst(u16),
    /// Upper six bits of the TOS octet.
    Dscp4(u8),
    /// Upper six bits of the traffic class.
    Dscp6(u8),
    /// TTL less one.
    Ttl4,
    /// Hop limit less one.
    Ttl6,
}

/// What the kernel tells about an action beside what it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Observed {
    /// Frames and octets, hardware and software together.
    pub(super) packets: u64,
    pub(super) octets: u64,
    /// Milliseconds since the last frame; `None` when there was none or the action does not tell.
    pub(super) idle_ms: Option<u64>,
}

const ACT_KIND: u16 = 1;
const ACT_OPTIONS: u16 = 2;
const ACT_STATS: u16 = 4;
const ACT_COOKIE: u16 = 6;

const STATS_BASIC: u16 = 1;
const STATS_PKT64: u16 = 8;

// What happens next.
const OK: u32 = 0;
const SHOT: u32 = 2;
const PIPE: u32 = 3;
const STOLEN: u32 = 4;
const GOTO_CHAIN: u32 = 2 << 28;
/// The bits of a verdict that number a chain.
pub(super) const CHAIN_MASK: u32 = (1 << 28) - 1;

const GACT_TM: u16 = 1;
const PARMS: u16 = 2; // of gact, mirred, vlan, tunnel_key
const VLAN_PUSH_ID: u16 = 3;
const VLAN_PUSH_PROTOCOL: u16 = 4;
const CSUM_PARMS: u16 = 1;
const PEDIT_PARMS_EX: u16 = 4;
const PEDIT_KEYS_EX: u16 = 5;
const PEDIT_KEY_EX: u16 = 6;
const PEDIT_KEY_EX_HTYPE: u16 = 1;
const PEDIT_KEY_EX_CMD: u16 = 2;
const TUNNEL_IP4_SRC: u16 = 3;
const TUNNEL_IP4_DST: u16 = 4;
const TUNNEL_IP6_SRC: u16 = 5;
const TUNNEL_IP6_DST: u16 = 6;
const TUNNEL_KEY_ID: u16 = 7;
const TUNNEL_DST_PORT: u16 = 9;
const CT_PARMS: u16 = 1;
const CT_ACTION: u16 = 3;
const CT_ZONE: u16 = 4;
const CT_COMMIT: u16 = 1;
const POLICE_TBF: u16 = 1;
const POLICE_RATE: u16 = 2;
const POLICE_RESULT: u16 = 5;
/// Octets of a rate table, which the kernel asks for and does not read.
const RATE_TABLE: usize = 1024;

/// IPv4 header, ICMP, TCP, UDP, SCTP.
const EVERY_CHECKSUM: u32 = 1 | 2 | 8 | 16 | 64;

/// The value of `TCA_FLOWER_ACT`.
pub(super) fn encode(steps: &[Step], cookie: u128) -> Vec<u8> {
    let mut all = Writer::default();
    let own = steps.iter().position(|step| !step.is_shared()).unwrap_or(0);
    for (index, step) in steps.iter().enumerate() {
        let mut action = Writer::default().text(ACT_KIND, step.kind());
        if index == own {
            action = action.put(ACT_COOKIE, &cookie.to_be_bytes());
        }
        let order = u16::try_from(index + 1).unwrap_or(u16::MAX); // the kernel takes 32 at most
        all = all.nest(order, action.nest(ACT_OPTIONS, step.options()));
    }
    all.finish()
}

/// Reads the value of `TCA_FLOWER_ACT`: what is done, the cookie and the counters of the first action. `None` for anything
/// that [`encode`] would not write.
pub(super) fn decode(octets: &[u8]) -> Option<(Vec<Step>, u128, Observed)> {
    let mut steps = Vec::new();
    let (mut cookie, mut observed) = (None, Observed::default());
    for (_, action) in attributes(octets) {
        let options = find(action, ACT_OPTIONS)?;
        let kind = text(find(action, ACT_KIND)?)?;
        let step = Step::read(kind, options)?;
        if cookie.is_none() && !step.is_shared() {
            cookie = Some(<[u8; 16]>::try_from(find(action, ACT_COOKIE)?).ok()?);
            observed = counters(find(action, ACT_STATS).unwrap_or_default());
        }
        if let Some(idle_ms) = idle_ms(kind, options) {
            observed.idle_ms = Some(idle_ms);
        }
        steps.push(step);
    }
    Some((steps, u128::from_be_bytes(cookie?), observed))
}

impl Step {
    /// A policer belongs to every rule that names it: it has one cookie and one count for all of them.
    fn is_shared(&self) -> bool {
        matches!(self, Self::Police { .. })
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Drop | Self::Pass | Self::Note | Self::Goto(_) => "gact",
            Self::Redirect(_) | Self::Mirror(_) => "mirred",
            Self::PushVlan(_) | Self::PopVlan => "vlan",
            Self::Edit(_) => "pedit",
            Self::Checksums => "csum",
            Self::Tunnel { .. } | Self::Untunnel => "tunnel_key",
            Self::Conntrack { .. } => "ct",
            Self::Police { .. } => "police",
        }
    }

    fn options(&self) -> Writer {
        let options = Writer::default();
        match self {
            Self::Drop => options.put(PARMS, &general(SHOT)),
            Self::Pass => options.put(PARMS, &general(OK)),
            Self::Note => options.put(PARMS, &general(PIPE)),
            Self::Goto(chain) => options.put(PARMS, &general(GOTO_CHAIN | (chain & CHAIN_MASK))),
            Self::Redirect(link) => options.put(PARMS, &with(STOLEN, &[1, *link])),
            Self::Mirror(link) => options.put(PARMS, &with(PIPE, &[2, *link])),
            Self::PopVlan => options.put(PARMS, &with(PIPE, &[1])),
            Self::PushVlan(id) => options
                .put(PARMS, &with(PIPE, &[2]))
                .u16(VLAN_PUSH_ID, *id)
                .put(VLAN_PUSH_PROTOCOL, &[0x81, 0x00]),
            Self::Edit(edit) => edit.options(),
            Self::Checksums => options.put(CSUM_PARMS, &with(PIPE, &[EVERY_CHECKSUM])),
            Self::Tunnel {
                vni,
                local,
                remote,
                port,
            } => {
                let options = options.put(PARMS, &with(PIPE, &[1]));
                let options = match (local, remote) {
                    (IpAddr::V6(local), IpAddr::V6(remote)) => options
                        .put(TUNNEL_IP6_SRC, &local.octets())
                        .put(TUNNEL_IP6_DST, &remote.octets()),
                    (local, remote) => options
                        .put(TUNNEL_IP4_SRC, &four(*local))
                        .put(TUNNEL_IP4_DST, &four(*remote)),
                };
                options
                    .put(TUNNEL_KEY_ID, &vni.get().to_be_bytes())
                    .put(TUNNEL_DST_PORT, &port.to_be_bytes())
            }
            Self::Untunnel => options.put(PARMS, &with(PIPE, &[2])),
            Self::Conntrack { zone, commit } => options
                .put(CT_PARMS, &general(PIPE))
                .u16(CT_ACTION, if *commit { CT_COMMIT } else { 0 })
                .u16(CT_ZONE, *zone),
            Self::Police { index, rate, burst } => options
                .put(POLICE_TBF, &policer(*index, *rate, *burst))
                .put(POLICE_RATE, &[0; RATE_TABLE])
                .u32(POLICE_RESULT, PIPE),
        }
    }

    fn read(kind: &str, options: &[u8]) -> Option<Self> {
        let parms = || find(options, PARMS);
        let general = match kind {
            "csum" | "ct" => find(options, CSUM_PARMS),
            "pedit" => find(options, PEDIT_PARMS_EX),
            _ => parms(),
        };
        // Whatever does not end the list goes on to the next action, in ours.
        let goes_on = matches!(kind, "vlan" | "pedit" | "csum" | "tunnel_key" | "ct");
        if goes_on && u32_at(general?, 8)? != PIPE {
            return None;
        }
        Some(match kind {
            "gact" => match u32_at(parms()?, 8)? {
                SHOT => Self::Drop,
                OK => Self::Pass,
                PIPE => Self::Note,
                other if other & !CHAIN_MASK == GOTO_CHAIN => Self::Goto(other & CHAIN_MASK),
                _ => return None,
            },
            "mirred" => match (u32_at(parms()?, 8)?, u32_at(parms()?, 20)?) {
                (STOLEN, 1) => Self::Redirect(u32_at(parms()?, 24)?),
                (PIPE, 2) => Self::Mirror(u32_at(parms()?, 24)?),
                _ => return None,
            },
            "vlan" => match u32_at(parms()?, 20)? {
                1 => Self::PopVlan,
                2 => Self::PushVlan(u16_at(find(options, VLAN_PUSH_ID)?, 0)?),
                _ => return None,
            },
            "pedit" => Self::Edit(Edit::read(options)?),
            "csum" => Self::Checksums,
            "tunnel_key" => match u32_at(parms()?, 20)? {
                1 => Self::read_tunnel(options)?,
                2 => Self::Untunnel,
                _ => return None,
            },
            "ct" => Self::Conntrack {
                zone: find(options, CT_ZONE)
                    .and_then(|zone| u16_at(zone, 0))
                    .unwrap_or(0),
                commit: u16_at(find(options, CT_ACTION)?, 0)? & CT_COMMIT != 0,
            },
            "police" => {
                let policer = find(options, POLICE_TBF)?;
                Self::Police {
                    index: u32_at(policer, 0)?,
                    rate: u32_at(policer, 28)?,
                    burst: ticks_to_octets(u32_at(policer, 12)?, u32_at(policer, 28)?),
                }
            }
            _ => return None,
        })
    }

    fn read_tunnel(options: &[u8]) -> Option<Self> {
        let four = |kind| Some(IpAddr::from(<[u8; 4]>::try_from(find(options, kind)?).ok()?));
        let six = |kind| Some(IpAddr::from(<[u8; 16]>::try_from(find(options, kind)?).ok()?));
        let vni = <[u8; 4]>::try_from(find(options, TUNNEL_KEY_ID)?).ok()?;
        let port = <[u8; 2]>::try_from(find(options, TUNNEL_DST_PORT)?).ok()?;
        Some(Self::Tunnel {
            vni: Vni::try_from(u32::from_be_bytes(vni)).ok()?,
            local: four(TUNNEL_IP4_SRC).or_else(|| six(TUNNEL_IP6_SRC))?,
            remote: four(TUNNEL_IP4_DST).or_else(|| six(TUNNEL_IP6_DST))?,
            port: u16::from_be_bytes(port),
        })
    }
}

/// `struct tc_gen` with what happens next.
fn general(next: u32) -> Vec<u8> {
    with(next, &[])
}

/// `struct tc_gen` and the words behind it.
fn with(next: u32, words: &[u32]) -> Vec<u8> {
    [0, 0, next, 0, 0]
        .iter()
        .chain(words)
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

fn four(address: IpAddr) -> [u8; 4] {
    match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => [0; 4], // a rule whose families differ is refused by `SteeringRule::check`
    }
}

/// Scheduler ticks are 64 ns (`/proc/net/psched`).
const TICK_NS: u64 = 64;

/// `struct tc_police`: the burst is the time that it takes at this rate.
fn policer(index: u32, rate: u32, burst: u32) -> Vec<u8> {
    let ticks = u64::from(burst) * 1_000_000_000 / u64::from(rate.max(1)) / TICK_NS;
    let burst = u32::try_from(ticks).unwrap_or(u32::MAX);
    // index, on exceeding, limit, burst, mtu (0: any); rate: cell_log, link layer Ethernet; peak rate; counts, capabilities
    let mut octets: Vec<u8> = [index, SHOT, 0, burst, 0]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    octets.extend([8, 1, 0, 0, 0xff, 0xff, 0, 0]);
    octets.extend(rate.to_ne_bytes());
    octets.extend([0; 12 + 12]);
    octets
}

fn ticks_to_octets(ticks: u32, rate: u32) -> u32 {
    let octets = u64::from(ticks) * TICK_NS * u64::from(rate) / 1_000_000_000;
    u32::try_from(octets).unwrap_or(u32::MAX)
}

fn counters(stats: &[u8]) -> Observed {
    let basic = find(stats, STATS_BASIC).unwrap_or_default();
    let packets = find(stats, STATS_PKT64)
        .and_then(|packets| u64_at(packets, 0))
        .or_else(|| u32_at(basic, 8).map(u64::from));
    Observed {
        packets: packets.unwrap_or(0),
        octets: u64_at(basic, 0).unwrap_or(0),
        idle_ms: None,
    }
}

/// `struct tcf_t` of the actions that end a rule: installed, last used, expires, first used, in hundredths of a second ago.
fn idle_ms(kind: &str, options: &[u8]) -> Option<u64> {
    if !matches!(kind, "gact" | "mirred") {
        return None;
    }
    let times = find(options, GACT_TM)?;
    (u64_at(times, 24)? != 0).then_some(u64_at(times, 8)? * 10)
}

/// A word that pedit writes: what it keeps and what it puts in, in network order, at an offset of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    header: Header,
    add: bool,
    keep: [u8; 4],
    value: [u8; 4],
    offset: u32,
}

/// `enum pedit_header_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Header {
    Eth = 1,
    Ip4 = 2,
    Ip6 = 3,
    Tcp = 4,
    Udp = 5,
}

impl Header {
    fn read(number: u16) -> Option<Self> {
        [Self::Eth, Self::Ip4, Self::Ip6, Self::Tcp, Self::Udp]
            .into_iter()
            .find(|header| *header as u16 == number)
    }
}

const ALL: [u8; 4] = [0; 4];

impl Edit {
    fn words(self) -> Vec<Word> {
        let set = |header, offset, keep, value| Word {
            header,
            add: false,
            keep,
            value,
            offset,
        };
        let add = |header, offset, keep, value| Word {
            header,
            add: true,
            keep,
            value,
            offset,
        };
        let six = |offset: u32, address: Ipv6Addr| {
            let octets = address.octets();
            let word = |i: usize| [octets[i], octets[i + 1], octets[i + 2], octets[i + 3]];
            (0..4)
                .map(|i| set(Header::Ip6, offset + 4 * i, ALL, word(4 * i as usize)))
                .collect()
        };
        let port = |header, source: bool, port: u16| {
            let [a, b] = port.to_be_bytes();
            vec![match source {
                true => set(header, 0, [0, 0, 0xff, 0xff], [a, b, 0, 0]),
                false => set(header, 0, [0xff, 0xff, 0, 0], [0, 0, a, b]),
            }]
        };
        match self {
            Self::EthDst(MacAddr([a, b, c, d, e, f])) => vec![
                set(Header::Eth, 0, ALL, [a, b, c, d]),
                set(Header::Eth, 4, [0, 0, 0xff, 0xff], [e, f, 0, 0]),
            ],
            Self::EthSrc(MacAddr([a, b, c, d, e, f])) => vec![
                set(Header::Eth, 4, [0xff, 0xff, 0, 0], [0, 0, a, b]),
                set(Header::Eth, 8, ALL, [c, d, e, f]),
            ],
            Self::Ip4Src(address) => vec![set(Header::Ip4, 12, ALL, address.octets())],
            Self::Ip4Dst(address) => vec![set(Header::Ip4, 16, ALL, address.octets())],
            Self::Ip6Src(address) => six(8, address),
            Self::Ip6Dst(address) => six(24, address),
            Self::TcpSrc(number) => port(Header::Tcp, true, number),
            Self::TcpDst(number) => port(Header::Tcp, false, number),
            Self::UdpSrc(number) => port(Header::Udp, true, number),
            Self::UdpDst(number) => port(Header::Udp, false, number),
            Self::Dscp4(dscp) => vec![set(
                Header::Ip4,
                0,
                [0xff, 0x03, 0xff, 0xff],
                [0, dscp << 2, 0, 0],
            )],
            Self::Dscp6(dscp) => vec![set(
                Header::Ip6,
                0,
                [0xf0, 0x3f, 0xff, 0xff],
                [dscp >> 2, dscp << 6, 0, 0],
            )],
            Self::Ttl4 => vec![add(Header::Ip4, 8, [0, 0xff, 0xff, 0xff], [0xff, 0, 0, 0])],
            Self::Ttl6 => vec![add(Header::Ip6, 4, [0xff, 0xff, 0xff, 0], [0, 0, 0, 0xff])],
        }
    }

    /// `struct tc_pedit_sel` with its keys, and which header and command each is for.
    fn options(self) -> Writer {
        let words = self.words();
        let mut select = general(PIPE);
        select.extend([words.len() as u8, 0, 0, 0]); // four words at most
        let mut extended = Writer::default();
        for word in &words {
            select.extend(word.keep);
            select.extend(word.value);
            select.extend(word.offset.to_ne_bytes());
            select.extend([0; 12]); // an offset read from the packet: unused
            let key = Writer::default()
                .u16(PEDIT_KEY_EX_HTYPE, word.header as u16)
                .u16(PEDIT_KEY_EX_CMD, u16::from(word.add));
            extended = extended.nest(PEDIT_KEY_EX, key);
        }
        Writer::default()
            .put(PEDIT_PARMS_EX, &select)
            .nest(PEDIT_KEYS_EX, extended)
    }

    fn read(options: &[u8]) -> Option<Self> {
        let select = find(options, PEDIT_PARMS_EX)?;
        let kinds = attributes(find(options, PEDIT_KEYS_EX)?);
        let keys = select
            .get(24..)?
            .chunks_exact(24)
            .take(usize::from(*select.get(20)?));
        let words: Option<Vec<Word>> = keys
            .zip(kinds)
            .map(|(key, (_, kind))| {
                Some(Word {
                    header: Header::read(u16_at(find(kind, PEDIT_KEY_EX_HTYPE)?, 0)?)?,
                    add: u16_at(find(kind, PEDIT_KEY_EX_CMD)?, 0)? == 1,
                    keep: key[..4].try_into().ok()?,
                    value: key[4..8].try_into().ok()?,
                    offset: u32_at(key, 8)?,
                })
            })
            .collect();
        let words = words?;
        let edit = Self::guess(&words)?;
        (edit.words() == words).then_some(edit)
    }

    /// The only edit that could have these words.
    fn guess(words: &[Word]) -> Option<Self> {
        let first = words.first()?;
        let value = |i: usize| words.get(i).map(|word| word.value);
        let six = || {
            let octets: Vec<u8> = words.iter().flat_map(|word| word.value).collect();
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?))
        };
        let v = first.value;
        let source = first.keep[0] == 0;
        let port = if source {
            u16::from_be_bytes([v[0], v[1]])
        } else {
            u16::from_be_bytes([v[2], v[3]])
        };
        Some(match (first.header, first.offset, first.add) {
            (Header::Eth, 0, false) => {
                let w = value(1)?;
                Self::EthDst(MacAddr([v[0], v[1], v[2], v[3], w[0], w[1]]))
            }
            (Header::Eth, 4, false) => {
                let w = value(1)?;
                Self::EthSrc(MacAddr([v[2], v[3], w[0], w[1], w[2], w[3]]))
            }
            (Header::Ip4, 12, false) => Self::Ip4Src(v.into()),
            (Header::Ip4, 16, false) => Self::Ip4Dst(v.into()),
            (Header::Ip6, 8, false) => Self::Ip6Src(six()?),
            (Header::Ip6, 24, false) => Self::Ip6Dst(six()?),
            (Header::Tcp, 0, false) if source => Self::TcpSrc(port),
            (Header::Tcp, 0, false) => Self::TcpDst(port),
            (Header::Udp, 0, false) if source => Self::UdpSrc(port),
            (Header::Udp, 0, false) => Self::UdpDst(port),
            (Header::Ip4, 0, false) => Self::Dscp4(v[1] >> 2),
            (Header::Ip6, 0, false) => Self::Dscp6(((v[0] & 0x0f) << 2) | (v[1] >> 6)),
            (Header::Ip4, 8, true) => Self::Ttl4,
            (Header::Ip6, 4, true) => Self::Ttl6,
            _ => return None,
        })
    }
}
