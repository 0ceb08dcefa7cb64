//! [`Wire`]: two VFs that carry traffic, and frames that can be told apart.
//!
//! A frame that must *not* arrive is never waited for by the clock alone: a mark frame that is known to arrive is sent
//! behind it, and ports keep their order.

use std::net::Ipv4Addr;
use std::time::Duration;

use dpumesh_core::steering::{
    Action, Change, Cookie, EtherType, Field, IpMatch, Masked, MissPolicy, Pattern, Priority, SteeringRule,
};
use dpumesh_core::vf::{VfLease, VfRequest};
use dpumesh_core::{ActionKinds, BackendExt, FlowSteeringExt, MacAddr, MatchKinds, PortRef, VfAttributes};

use super::check::{CaseResult, Halt, ensure, ensure_eq};
use super::sample::{MINE, covers};
use super::{Probe, Rig};

/// How long a frame may take from port to port.
pub(super) const ARRIVAL: Duration = Duration::from_secs(2);

/// Leases two VFs, admits both and says which ports they are.
pub(super) struct Wire<'a> {
    /// Where frames go in.
    pub(super) from: PortRef,
    /// Where they are looked for.
    pub(super) to: PortRef,
    probe: &'a dyn Probe,
}

impl<'a> Wire<'a> {
    /// Two admitted VFs.
    pub(super) async fn new(rig: &'a dyn Rig) -> Result<Self, Halt> {
        let probe = rig
            .probe()
            .ok_or_else(|| Halt::not_supported("rig.probe", "the fixture sends no frames"))?;
        let from = admitted(rig, "probe-from").await?.port;
        let to = admitted(rig, "probe-to").await?.port;
        Ok(Self { from, to, probe })
    }

    /// Hands a frame in at `from`.
    pub(super) async fn send(&self, octets: &[u8]) -> CaseResult {
        Ok(self.probe.inject(self.from, octets).await?)
    }

    /// The next frame that left by `to` is this one.
    pub(super) async fn arrives(&self, octets: &[u8], why: &str) -> CaseResult {
        self.arrives_at(self.to, octets, why).await
    }

    /// The next frame that left by a port is this one.
    pub(super) async fn arrives_at(&self, port: PortRef, octets: &[u8], why: &str) -> CaseResult {
        let found = self.next_at(port).await?;
        match found {
            Some(found) if found == octets => Ok(()),
            Some(found) => Err(Halt::failed(format!(
                "{why}: {port} gave frame {}, expected {}",
                tag_of(&found),
                tag_of(octets)
            ))),
            None => Err(Halt::failed(format!(
                "{why}: frame {} did not arrive at {port}",
                tag_of(octets)
            ))),
        }
    }

    /// The next frame that left by a port.
    pub(super) async fn next_at(&self, port: PortRef) -> Result<Option<Vec<u8>>, Halt> {
        Ok(self.probe.observed(port, ARRIVAL).await?)
    }

    /// Nothing has left by a port.
    pub(super) async fn is_silent(&self, port: PortRef, why: &str) -> CaseResult {
        let found = self.probe.observed(port, Duration::from_millis(30)).await?;
        ensure!(
            found.is_none(),
            "{why}: frame {} came out of {port}",
            found.as_deref().map_or(0, tag_of)
        );
        Ok(())
    }
}

/// A VF leased on the host and admitted on the SoC.
pub(super) async fn admitted(rig: &dyn Rig, owner: &str) -> Result<VfLease, Halt> {
    let (host, soc) = (rig.host(), rig.soc());
    let mut request = VfRequest::new(owner);
    if host
        .capabilities()
        .vf
        .attributes
        .contains(VfAttributes::SPOOF_CHECK)
    {
        // The kit's frames come from an address of its own.
        request.config.spoof_check = Some(false);
    }
    let lease = host.require_vf()?.lease(host.fence(), &request).await?;
    if let Some(vf) = soc.vf() {
        vf.admit(soc.fence(), &lease).await?;
    }
    Ok(lease)
}

/// Sends frames of a port to software, on a card that steers; without steering they go there anyway.
pub(super) async fn to_software(rig: &dyn Rig, port: PortRef) -> CaseResult {
    let soc = rig.soc();
    if let Some(steering) = soc.steering() {
        steering
            .set_miss_policy(soc.fence(), port, MissPolicy::Software)
            .await?;
    }
    Ok(())
}

/// Address of the `tag`-th frame's destination.
pub(super) fn address(tag: u16) -> Ipv4Addr {
    let [high, low] = tag.to_be_bytes();
    Ipv4Addr::new(10, 77, high, low)
}

/// MAC of the `tag`-th frame's destination.
pub(super) fn mac(tag: u16) -> MacAddr {
    let [high, low] = tag.to_be_bytes();
    MacAddr([2, 0x77, 0, 0, high, low])
}

/// The `tag`-th frame: IPv4 and UDP with right checksums, its tag in MAC, address and payload.
pub(super) fn frame(tag: u16) -> Vec<u8> {
    frame_with(tag, 64, 18)
}

/// The `tag`-th frame with a TTL and a length of payload (at least 2 octets).
pub(super) fn frame_with(tag: u16, ttl: u8, payload: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42 + payload);
    frame.extend(mac(tag).0);
    frame.extend([2, 0x78, 0, 0, 0, 1]);
    frame.extend([0x08, 0x00]);
    let mut ip = [0; 20];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&((28 + payload) as u16).to_be_bytes());
    ip[8] = ttl;
    ip[9] = 17;
    ip[12..16].copy_from_slice(&[10, 76, 0, 1]);
    ip[16..20].copy_from_slice(&address(tag).octets());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend(7000_u16.to_be_bytes());
    frame.extend(7001_u16.to_be_bytes());
    frame.extend(((8 + payload) as u16).to_be_bytes());
    frame.extend([0, 0]); // UDP over IPv4 may go without a checksum (RFC 768)
    frame.extend(tag.to_be_bytes());
    frame.resize(42 + payload, 0x5a);
    frame
}

/// The tag of a frame made by [`frame`], wherever its headers were rewritten.
pub(super) fn tag_of(octets: &[u8]) -> u16 {
    octets
        .get(42..44)
        .map_or(u16::MAX, |tag| u16::from_be_bytes([tag[0], tag[1]]))
}

fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// A pattern that the `tag`-th frame matches and no other does, by a field that the card claims.
pub(super) fn pattern(rig: &dyn Rig, tag: u16) -> Result<Pattern, Halt> {
    let fields = rig.soc().capabilities().steering.fields;
    let has = |field| {
        let kinds = fields.get(&field).copied().unwrap_or_default();
        covers(field, kinds, MatchKinds::EXACT)
    };
    if has(Field::Ip4Dst) {
        return Ok(Pattern {
            ethertype: has(Field::Ethertype).then_some(EtherType::IPV4),
            ip_dst: Some(IpMatch::from(std::net::IpAddr::V4(address(tag)))),
            ..Pattern::default()
        });
    }
    if has(Field::EthDst) {
        return Ok(Pattern {
            eth_dst: Some(Masked {
                value: mac(tag),
                mask: MacAddr::BROADCAST,
            }),
            ..Pattern::default()
        });
    }
    Err(Halt::not_supported(
        "steering.fields",
        "neither pattern.ip_dst (IPv4) nor pattern.eth_dst can be matched exactly",
    ))
}

/// A rule about the `tag`-th frame, installed.
pub(super) async fn install(
    rig: &dyn Rig,
    tag: u16,
    priority: u32,
    actions: Vec<Action>,
) -> Result<SteeringRule, Halt> {
    let rule = SteeringRule::new(
        Cookie(u128::from(tag) << 8 | u128::from(priority)),
        MINE,
        Priority(priority),
        pattern(rig, tag)?,
        actions,
    );
    put(rig, rule).await
}

/// Installs a rule and gives it back. Where it was said to act is where `list` shows it.
pub(super) async fn put(rig: &dyn Rig, rule: SteeringRule) -> Result<SteeringRule, Halt> {
    let soc = rig.soc();
    let steering = soc.require_steering()?;
    let change = steering.add(soc.fence(), rule.clone()).await?;
    let (Change::Added(placement) | Change::Present(placement)) = change else {
        return Err(Halt::failed(format!("adding a rule ended as {change:?}")));
    };
    let listed = steering.list(rule.owner).await?;
    let listed = listed.into_iter().find(|each| each.rule.cookie == rule.cookie);
    ensure_eq!(
        listed.map(|each| each.placement),
        Some(placement),
        "place of rule {} as list shows it",
        rule.cookie
    );
    Ok(rule)
}

/// Without `kinds` of actions the case cannot be shown.
pub(super) fn needs_actions(rig: &dyn Rig, kinds: ActionKinds) -> CaseResult {
    let missing = kinds - rig.soc().capabilities().steering.actions;
    if missing.is_empty() {
        return Ok(());
    }
    Err(Halt::not_supported(
        "steering.actions",
        format!("{missing:?} is not offered"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_well_formed_and_told_apart() {
        for (tag, payload) in [(1, 18), (0x0203, 2), (u16::MAX, 1472)] {
            let frame = frame_with(tag, 64, payload);
            assert_eq!(frame.len(), 42 + payload);
            assert_eq!(checksum(&frame[14..34]), 0, "a right header sums up to nothing");
            assert_eq!(
                u16::from_be_bytes([frame[16], frame[17]]) as usize,
                frame.len() - 14
            );
            assert_eq!(tag_of(&frame), tag);
        }
        assert_ne!(frame(1), frame(2));
    }
}
