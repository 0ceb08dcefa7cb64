//! Attributes of a leased VF, each alone and as a transaction.

use dpumesh_core::vf::{LinkState, RateMbps, VfConfig, VfRequest, VfVlan};
use dpumesh_core::{ErrorKind, VfAttributes, VlanId};

use super::{Host, mac, mtu};
use crate::conformance::Rig;
use crate::conformance::check::{CaseResult, Halt, ensure, ensure_eq, refused};

pub(in crate::conformance) async fn a_lease_starts_with_its_attributes(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let request = VfRequest::new("pod").with_config(mac(1));
    let lease = host.vf()?.lease(host.fence(), &request).await?;
    let state = host.state(lease.port).await?;
    ensure_eq!(Some(state.admin_mac), mac(1).mac, "administrative MAC");
    Ok(())
}

pub(in crate::conformance) async fn a_mac_in_use_on_the_card_is_a_conflict(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    host.vf()?
        .lease(host.fence(), &VfRequest::new("first").with_config(mac(1)))
        .await?;
    let second = VfRequest::new("second").with_config(mac(1));
    refused(
        host.vf()?.lease(host.fence(), &second).await,
        "vf.lease",
        ErrorKind::Conflict,
    )?;
    ensure_eq!(host.leases().await?.len(), 1, "leases after the refusal");
    Ok(())
}

pub(in crate::conformance) async fn configuring_a_mac_in_use_is_a_conflict(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let (first, second) = (host.lease("first").await?, host.lease("second").await?);
    host.configure(&first, mac(1)).await?;
    host.configure(&second, mac(2)).await?;
    let answer = host.vf()?.configure(host.fence(), &second, &mac(1)).await;
    refused(answer, "vf.configure", ErrorKind::Conflict)?;
    let found = host.state(second.port).await?.admin_mac;
    ensure_eq!(Some(found), mac(2).mac, "MAC after the refusal");
    host.configure(&first, mac(1)).await
}

pub(super) fn sample(attribute: VfAttributes) -> VfConfig {
    let mut config = VfConfig::default();
    match attribute {
        VfAttributes::MAC => config = mac(9),
        VfAttributes::VLAN => {
            config.vlan = Some(VfVlan {
                id: VlanId::try_from(100).ok(),
                qos: 3,
                service_tag: false,
            });
        }
        VfAttributes::TRUST => config.trust = Some(true),
        VfAttributes::SPOOF_CHECK => config.spoof_check = Some(true),
        VfAttributes::LINK_STATE => config.link_state = Some(LinkState::Enable),
        VfAttributes::MIN_RATE => config.min_rate = Some(RateMbps(10)),
        VfAttributes::MAX_RATE => config.max_rate = Some(RateMbps(1000)),
        _ => config = mtu(1400),
    }
    config
}

fn field_of(attribute: VfAttributes) -> &'static str {
    match attribute {
        VfAttributes::MAC => "mac",
        VfAttributes::VLAN => "vlan",
        VfAttributes::TRUST => "trust",
        VfAttributes::SPOOF_CHECK => "spoof_check",
        VfAttributes::LINK_STATE => "link_state",
        VfAttributes::MIN_RATE => "min_rate",
        VfAttributes::MAX_RATE => "max_rate",
        _ => "mtu",
    }
}

pub(in crate::conformance) async fn each_claimed_attribute_can_be_set(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    for attribute in host.backend.capabilities().vf.attributes.iter() {
        let answer = host
            .vf()?
            .configure(host.fence(), &lease, &sample(attribute))
            .await;
        if let Err(error) = answer {
            return Err(Halt::failed(format!(
                "vf.attributes claims {attribute:?}: {error}"
            )));
        }
        let state = host.state(lease.port).await?;
        match attribute {
            VfAttributes::MAC => ensure_eq!(Some(state.admin_mac), sample(attribute).mac, "MAC listed"),
            VfAttributes::MTU => ensure_eq!(Some(state.mtu), sample(attribute).mtu, "MTU listed"),
            _ => {}
        }
    }
    Ok(())
}

pub(in crate::conformance) async fn an_unclaimed_attribute_is_unsupported_by_name_and_touches_nothing(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let claimed = host.backend.capabilities().vf.attributes;
    let lease = host.lease("pod").await?;
    let before = host.state(lease.port).await?;
    for attribute in (VfAttributes::all() - claimed).iter() {
        let mut config = sample(attribute);
        if claimed.contains(VfAttributes::MAC) {
            config.mac = mac(5).mac;
        }
        let answer = host.vf()?.configure(host.fence(), &lease, &config).await;
        let error = refused(answer, "vf.configure", ErrorKind::Unsupported)?;
        let field = error.object.as_ref().map_or("", |object| &object.field);
        ensure!(
            field.ends_with(field_of(attribute)),
            "the error names field `{field}`, not {}",
            field_of(attribute)
        );
        ensure_eq!(host.state(lease.port).await?, before, "state after the refusal");
    }
    Ok(())
}

pub(in crate::conformance) async fn an_attribute_left_none_stays(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    host.configure(&lease, mac(1)).await?;
    host.configure(&lease, mtu(1400)).await?;
    host.configure(&lease, VfConfig::default()).await?;
    let state = host.state(lease.port).await?;
    ensure_eq!(Some(state.admin_mac), mac(1).mac, "MAC");
    ensure_eq!(state.mtu.get(), 1400, "MTU");
    Ok(())
}

pub(in crate::conformance) async fn a_failed_configure_leaves_everything_as_before(
    rig: &dyn Rig,
) -> CaseResult {
    let host = Host::of(rig);
    let (first, second) = (host.lease("first").await?, host.lease("second").await?);
    host.configure(&first, mac(1)).await?;
    let before = host.state(second.port).await?;
    let config = VfConfig {
        mac: mac(1).mac,
        ..mtu(1300)
    };
    let answer = host.vf()?.configure(host.fence(), &second, &config).await;
    refused(answer, "vf.configure", ErrorKind::Conflict)?;
    ensure_eq!(host.state(second.port).await?, before, "state after the failure");
    Ok(())
}

pub(in crate::conformance) async fn an_mtu_up_to_the_claimed_one_is_taken(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let Some(limit) = host.backend.capabilities().vf.max_mtu else {
        return Err(Halt::not_supported("vf.max_mtu", "no largest MTU is claimed"));
    };
    let lease = host.lease("pod").await?;
    host.configure(&lease, mtu(limit.get())).await?;
    ensure_eq!(host.state(lease.port).await?.mtu, limit, "MTU");
    if let Some(above) = limit.get().checked_add(1) {
        let answer = host.vf()?.configure(host.fence(), &lease, &mtu(above)).await;
        refused(answer, "vf.configure", ErrorKind::Invalid)?;
        ensure_eq!(host.state(lease.port).await?.mtu, limit, "MTU after the refusal");
    }
    Ok(())
}

pub(in crate::conformance) async fn a_vlan_priority_above_7_is_invalid(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let mut config = sample(VfAttributes::VLAN);
    if let Some(vlan) = &mut config.vlan {
        vlan.qos = 8;
    }
    let answer = host.vf()?.configure(host.fence(), &lease, &config).await;
    refused(answer, "vf.configure", ErrorKind::Invalid)?;
    Ok(())
}

pub(in crate::conformance) async fn the_function_uses_the_mac_that_it_was_given(rig: &dyn Rig) -> CaseResult {
    let host = Host::of(rig);
    let lease = host.lease("pod").await?;
    let clean = host.state(lease.port).await?;
    for given in [mac(7), mac(8)] {
        host.configure(&lease, given.clone()).await?;
        let state = host.state(lease.port).await?;
        ensure_eq!(Some(state.admin_mac), given.mac, "administrative MAC");
        ensure_eq!(Some(state.effective_mac), given.mac, "effective MAC");
    }
    host.release(&lease).await?;
    let after = host.state(lease.port).await?;
    ensure_eq!(
        (after.admin_mac, after.effective_mac),
        (clean.admin_mac, clean.effective_mac),
        "administrative and effective MAC after the release"
    );
    Ok(())
}
