//! Leases, attributes, places and states of VFs.

use dpumesh_core::vf::{
    AttachedVf, Attachment, Disruption, LeaseId, LeaseOwner, LinkState, RateMbps, Released, ResetLevel,
    VfConfig, VfCount, VfLease, VfLocation, VfRequest, VfSelector, VfState, VfVlan,
};
use dpumesh_core::{DpuId, Epoch, MacAddr, PfIndex, PortRef};

use super::{NO_PORT, get_flag, get_mtu, get_pci, get_port, put_pci, put_port, small};
use crate::loader::abi::*;
use crate::loader::arena::{Arena, Broken, Reader, Sized32};
use crate::loader::codec::codes;

codes! { put_disruption, get_disruption, Disruption, u32,
    Disruption::None => Disruption::None, DM_DISRUPTION_NONE;
    Disruption::Drain => Disruption::Drain, DM_DISRUPTION_DRAIN;
    Disruption::Reboot => Disruption::Reboot, DM_DISRUPTION_REBOOT;
}

codes! { put_link_state, get_link_state, LinkState, u32,
    LinkState::Auto => LinkState::Auto, DM_LINK_AUTO;
    LinkState::Enable => LinkState::Enable, DM_LINK_ENABLE;
    LinkState::Disable => LinkState::Disable, DM_LINK_DISABLE;
}

codes! { put_level, get_level, ResetLevel, u32,
    ResetLevel::Config => ResetLevel::Config, DM_RESET_CONFIG;
    ResetLevel::Function => ResetLevel::Function, DM_RESET_FUNCTION;
    ResetLevel::Device => ResetLevel::Device, DM_RESET_DEVICE;
}

codes! { put_released, get_released, Released, u32,
    Released::Freed => Released::Freed, DM_RELEASED;
    Released::NotCurrent => Released::NotCurrent, DM_NOT_CURRENT;
}

/// An answer of one number that is a code.
pub(crate) fn code(raw: &dm_number, what: &str) -> Result<u32, Broken> {
    u32::try_from(raw.value).map_err(|_| format!("{what} is {}, which means nothing", raw.value))
}

pub(crate) fn put_number(value: u64) -> dm_number {
    dm_number {
        value,
        ..dm_number::empty()
    }
}

pub(crate) fn put_vf_count(pf: PfIndex, count: u16, needs: Disruption) -> dm_vf_count {
    let mut raw = dm_vf_count::empty();
    raw.pf = pf.0.into();
    raw.count = count.into();
    raw.needs = put_disruption(needs);
    raw
}

pub(crate) fn get_vf_count(raw: &dm_vf_count) -> Result<VfCount, Broken> {
    Ok(VfCount {
        actual: small(raw.count, "vf_count.count")?,
        needs: get_disruption(raw.needs, "vf_count.needs")?,
    })
}

pub(crate) fn put_config(config: &VfConfig) -> dm_vf_config {
    let mut raw = dm_vf_config::empty();
    let mut has = |bit, given: bool| raw.has |= if given { bit } else { 0 };
    has(DM_VF_MAC, config.mac.is_some());
    has(DM_VF_VLAN, config.vlan.is_some());
    has(DM_VF_TRUST, config.trust.is_some());
    has(DM_VF_SPOOF_CHECK, config.spoof_check.is_some());
    has(DM_VF_LINK_STATE, config.link_state.is_some());
    has(DM_VF_MIN_RATE, config.min_rate.is_some());
    has(DM_VF_MAX_RATE, config.max_rate.is_some());
    has(DM_VF_MTU, config.mtu.is_some());
    raw.mac = config.mac.unwrap_or_default().0;
    if let Some(vlan) = config.vlan {
        raw.vlan = vlan.id.map_or(0, dpumesh_core::VlanId::get);
        raw.vlan_qos = vlan.qos.into();
        raw.vlan_service_tag = vlan.service_tag.into();
    }
    raw.trust = config.trust.unwrap_or_default().into();
    raw.spoof_check = config.spoof_check.unwrap_or_default().into();
    raw.link_state = config.link_state.map_or(0, put_link_state);
    raw.min_rate = config.min_rate.map_or(0, |rate| rate.0);
    raw.max_rate = config.max_rate.map_or(0, |rate| rate.0);
    raw.mtu = config.mtu.map_or(0, |mtu| mtu.get().into());
    raw
}

pub(crate) fn get_config(raw: &dm_vf_config) -> Result<VfConfig, Broken> {
    let known = DM_VF_MTU | (DM_VF_MTU - 1);
    super::set((raw.has & !known == 0).then_some(()), raw.has, "config.has")?;
    let has = |bit| raw.has & bit != 0;
    let flag = |bit, raw, what| {
        if has(bit) {
            get_flag(raw, what).map(Some)
        } else {
            Ok(None)
        }
    };
    let mut config = VfConfig {
        mac: has(DM_VF_MAC).then_some(MacAddr(raw.mac)),
        min_rate: has(DM_VF_MIN_RATE).then_some(RateMbps(raw.min_rate)),
        max_rate: has(DM_VF_MAX_RATE).then_some(RateMbps(raw.max_rate)),
        ..VfConfig::default()
    };
    if has(DM_VF_VLAN) {
        let id = match raw.vlan {
            0 => None,
            id => Some(small(id.into(), "config.vlan")?),
        };
        let qos = u8::try_from(raw.vlan_qos).map_err(|_| format!("config.vlan_qos is {}", raw.vlan_qos))?;
        let service_tag = get_flag(raw.vlan_service_tag, "config.vlan_service_tag")?;
        config.vlan = Some(VfVlan { id, qos, service_tag });
    }
    config.trust = flag(DM_VF_TRUST, raw.trust, "config.trust")?;
    config.spoof_check = flag(DM_VF_SPOOF_CHECK, raw.spoof_check, "config.spoof_check")?;
    if has(DM_VF_LINK_STATE) {
        config.link_state = Some(get_link_state(raw.link_state, "config.link_state")?);
    }
    if has(DM_VF_MTU) {
        config.mtu = Some(get_mtu(raw.mtu, "config.mtu")?);
    }
    Ok(config)
}

pub(crate) fn put_request(request: &VfRequest, arena: &mut Arena) -> dm_vf_request {
    let mut raw = dm_vf_request::empty();
    raw.owner = arena.text(&request.owner.0);
    raw.port = NO_PORT;
    let selector = &request.selector;
    if let Some(port) = selector.port {
        raw.has |= DM_SELECT_PORT;
        raw.port = put_port(port);
    }
    if let Some(pf) = selector.pf {
        raw.has |= DM_SELECT_PF;
        raw.pf = pf.0.into();
    }
    if let Some(pci) = selector.pci {
        raw.has |= DM_SELECT_PCI;
        raw.pci = put_pci(pci);
    }
    if let Some(node) = selector.numa_node {
        raw.has |= DM_SELECT_NUMA;
        raw.numa_node = node.into();
    }
    if let Some(driver) = &selector.driver {
        raw.has |= DM_SELECT_DRIVER;
        raw.driver = arena.text(driver);
    }
    raw.config = arena.one(put_config(&request.config));
    raw
}

pub(crate) fn get_request(raw: &dm_vf_request, reader: &Reader) -> Result<VfRequest, Broken> {
    let known = DM_SELECT_DRIVER | (DM_SELECT_DRIVER - 1);
    super::set((raw.has & !known == 0).then_some(()), raw.has, "request.has")?;
    let has = |bit| raw.has & bit != 0;
    let mut selector = VfSelector::default();
    if has(DM_SELECT_PORT) {
        selector.port = Some(get_port(raw.port, "request.port")?);
    }
    if has(DM_SELECT_PF) {
        selector.pf = Some(PfIndex(small(raw.pf, "request.pf")?));
    }
    if has(DM_SELECT_PCI) {
        selector.pci = Some(get_pci(raw.pci, "request.pci")?);
    }
    if has(DM_SELECT_NUMA) {
        selector.numa_node = Some(small(raw.numa_node, "request.numa_node")?);
    }
    if has(DM_SELECT_DRIVER) {
        selector.driver = Some(reader.text(raw.driver, "request.driver")?);
    }
    let mut request = VfRequest::new(reader.text(raw.owner, "request.owner")?);
    request.selector = selector;
    request.config = get_config(&reader.one(raw.config, "request.config")?)?;
    Ok(request)
}

pub(crate) fn put_lease(lease: &VfLease, arena: &mut Arena) -> dm_vf_lease {
    let mut raw = dm_vf_lease::empty();
    (raw.id, raw.epoch) = (lease.id.0, lease.epoch.0);
    raw.port = put_port(lease.port);
    raw.dpu = arena.text(&lease.dpu.0);
    raw.owner = arena.text(&lease.owner.0);
    raw
}

pub(crate) fn get_lease(raw: &dm_vf_lease, reader: &Reader) -> Result<VfLease, Broken> {
    Ok(VfLease::new(
        LeaseId(raw.id),
        DpuId(reader.text(raw.dpu, "lease.dpu")?),
        get_port(raw.port, "lease.port")?,
        LeaseOwner(reader.text(raw.owner, "lease.owner")?),
        Epoch(raw.epoch),
    ))
}

/// An order without attributes, place or level.
pub(crate) fn put_order(lease: Option<&VfLease>, arena: &mut Arena) -> dm_vf_order {
    let mut raw = dm_vf_order::empty();
    if let Some(lease) = lease {
        let lease = put_lease(lease, arena);
        raw.lease = arena.one(lease);
    }
    raw
}

pub(crate) fn get_order_lease(raw: &dm_vf_order, reader: &Reader) -> Result<VfLease, Broken> {
    get_lease(&reader.one(raw.lease, "order.lease")?, reader)
}

pub(crate) fn put_owners(owners: &[LeaseOwner], arena: &mut Arena) -> dm_list {
    let texts: Vec<_> = owners.iter().map(|owner| arena.text(&owner.0)).collect();
    arena.list(&texts)
}

pub(crate) fn get_owners(list: dm_list, reader: &Reader) -> Result<Vec<LeaseOwner>, Broken> {
    let texts = reader.frozen::<dm_str>(list, "order.live")?;
    texts
        .iter()
        .map(|text| reader.text(*text, "order.live").map(LeaseOwner))
        .collect()
}

/// A place; `None` for one that cannot be said (a path that is not UTF-8, a kind of a later version).
pub(crate) fn put_attachment(attachment: &Attachment, arena: &mut Arena) -> Option<dm_attachment> {
    let mut raw = dm_attachment::empty();
    match attachment {
        Attachment::Netns { path, ifname } => {
            raw.kind = DM_ATTACH_NETNS;
            raw.path = arena.text(path.to_str()?);
            raw.ifname = arena.text(ifname);
        }
        Attachment::Vfio => raw.kind = DM_ATTACH_VFIO,
        Attachment::VhostUser { socket } => {
            raw.kind = DM_ATTACH_VHOST_USER;
            raw.path = arena.text(socket.to_str()?);
        }
        _ => return None,
    }
    Some(raw)
}

pub(crate) fn get_attachment(raw: &dm_attachment, reader: &Reader) -> Result<Attachment, Broken> {
    let path = || reader.text(raw.path, "attachment.path").map(Into::into);
    Ok(match raw.kind {
        DM_ATTACH_NETNS => Attachment::Netns {
            path: path()?,
            ifname: reader.text(raw.ifname, "attachment.ifname")?,
        },
        DM_ATTACH_VFIO => Attachment::Vfio,
        DM_ATTACH_VHOST_USER => Attachment::VhostUser { socket: path()? },
        kind => return Err(format!("attachment.kind is {kind}, which means nothing")),
    })
}

pub(crate) fn put_attached(attached: &AttachedVf) -> dm_attached {
    let mut raw = dm_attached::empty();
    raw.mtu = attached.mtu.get().into();
    raw.ifindex = attached.ifindex.unwrap_or(0);
    raw.mac = attached.mac.0;
    raw
}

pub(crate) fn get_attached(raw: &dm_attached) -> Result<AttachedVf, Broken> {
    let ifindex = (raw.ifindex != 0).then_some(raw.ifindex);
    Ok(AttachedVf::new(
        MacAddr(raw.mac),
        get_mtu(raw.mtu, "attached.mtu")?,
        ifindex,
    ))
}

pub(crate) fn put_state(state: &VfState, arena: &mut Arena) -> dm_vf_state {
    let mut raw = dm_vf_state::empty();
    raw.port = put_port(state.port);
    if let Some(pci) = state.pci {
        raw.has_pci = 1;
        raw.pci = put_pci(pci);
    }
    raw.mtu = state.mtu.get().into();
    (raw.admin_mac, raw.effective_mac) = (state.admin_mac.0, state.effective_mac.0);
    raw.location = match &state.location {
        VfLocation::Host => DM_AT_HOST,
        VfLocation::Netns { path } => {
            raw.place = arena.text(&path.to_string_lossy());
            DM_AT_NETNS
        }
        VfLocation::Driver(driver) => {
            raw.place = arena.text(driver);
            DM_AT_DRIVER
        }
        _ => DM_AT_NOWHERE,
    };
    if let Some(lease) = &state.lease {
        let lease = put_lease(lease, arena);
        raw.lease = arena.one(lease);
    }
    raw
}

pub(crate) fn get_state(raw: &dm_vf_state, reader: &Reader) -> Result<VfState, Broken> {
    let port: PortRef = get_port(raw.port, "vf.port")?;
    let mut state = VfState::new(port, MacAddr(raw.admin_mac), get_mtu(raw.mtu, "vf.mtu")?);
    if get_flag(raw.has_pci, "vf.has_pci")? {
        state.pci = Some(get_pci(raw.pci, "vf.pci")?);
    }
    state.effective_mac = MacAddr(raw.effective_mac);
    let place = || reader.text(raw.place, "vf.place");
    state.location = match raw.location {
        DM_AT_HOST => VfLocation::Host,
        DM_AT_NETNS => VfLocation::Netns {
            path: place()?.into(),
        },
        DM_AT_DRIVER => VfLocation::Driver(place()?),
        DM_AT_NOWHERE => VfLocation::Missing,
        location => return Err(format!("vf.location is {location}, which means nothing")),
    };
    if !raw.lease.is_null() {
        state.lease = Some(get_lease(&reader.one(raw.lease, "vf.lease")?, reader)?);
    }
    Ok(state)
}
