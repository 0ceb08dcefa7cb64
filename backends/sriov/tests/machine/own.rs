//! The backend's own tests on the real card: what its leases do to frames, to MACs, to drivers.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dpumesh_core::vf::{Attachment, Released, ResetLevel, VfConfig, VfLease, VfLocation, VfRequest};
use dpumesh_core::{Backend, BackendExt, MacAddr, Mtu, PortRef, VfAllocator};
use dpumesh_hw::netns::Namespace;
use dpumesh_sriov::{Card, Isolation, Protect};

use crate::wire::{End, ip};
use crate::{PF_NETDEV, WIRE_NETDEV, fresh};

const SILENCE: Duration = Duration::from_millis(400);

pub(crate) fn run() -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let mut failures = Vec::new();
    let mut check = |name: &str, done: Result<(), String>| {
        println!(
            "own: {name}: {}",
            done.as_ref().err().map_or("passed", String::as_str)
        );
        failures.extend(done.err().map(|reason| format!("{name}: {reason}")));
    };
    check(
        "leased VFs never talk past the PF",
        runtime.block_on(leased_vfs_never_talk_past_the_pf()),
    );
    check(
        "both MACs are set and restored",
        runtime.block_on(both_macs_are_set_and_restored()),
    );
    check(
        "a VF goes to vfio-pci and comes home",
        runtime.block_on(a_vf_goes_to_vfio_and_comes_home()),
    );
    check(
        "a dead pod's VF comes home",
        runtime.block_on(a_dead_pods_vf_comes_home()),
    );
    check(
        "without VLANs nothing is leased",
        runtime.block_on(without_vlans_nothing_is_leased()),
    );
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; "))
    }
}

/// A card with its VFs, fresh.
pub(crate) fn card() -> Result<Arc<Card>, String> {
    Card::open(fresh()?).map_err(text)
}

pub(crate) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn vf(card: &Card) -> Result<&dyn VfAllocator, String> {
    card.require_vf().map_err(text)
}

fn config(last: u8) -> VfConfig {
    VfConfig {
        mac: Some(MacAddr([2, 0xee, 0, 0, 0, last])),
        mtu: Mtu::try_from(1400).ok(),
        ..VfConfig::default()
    }
}

async fn lease(card: &Card, owner: &str, config: VfConfig) -> Result<VfLease, String> {
    let request = VfRequest::new(owner).with_config(config);
    vf(card)?.lease(card.fence(), &request).await.map_err(text)
}

async fn attach(card: &Card, lease: &VfLease, pod: &Namespace) -> Result<(), String> {
    let place = Attachment::Netns {
        path: pod.path(),
        ifname: "net1".into(),
    };
    let attached = vf(card)?.attach(card.fence(), lease, &place).await;
    attached.map(drop).map_err(text)
}

async fn release(card: &Card, lease: &VfLease) -> Result<(), String> {
    let released = vf(card)?
        .release(card.fence(), lease, ResetLevel::Config)
        .await
        .map_err(text)?;
    (released == Released::Freed)
        .then_some(())
        .ok_or_else(|| format!("{released:?}"))
}

async fn leased_vfs_never_talk_past_the_pf() -> Result<(), String> {
    let card = card()?;
    if card.isolation() != Isolation::VlanPerVf {
        return Err(format!("isolation is {:?}", card.isolation()));
    }
    let host = Namespace::current().map_err(text)?;
    ip(&host, "link set eth1 up promisc on")?;
    let (mut pods, mut leases, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for (last, name) in [(1, "VF 0"), (2, "VF 1")] {
        let pod = Namespace::create().map_err(text)?;
        let lease = lease(&card, name, config(last)).await?;
        attach(&card, &lease, &pod).await?;
        ends.push(End::open(name, &pod, "net1")?);
        pods.push(pod);
        leases.push(lease);
    }
    ends.push(End::open("PF", &host, PF_NETDEV)?);
    ends.push(End::open("wire", &host, WIRE_NETDEV)?);
    thread::sleep(Duration::from_millis(1500)); // the links come up
    let macs: Vec<[u8; 6]> = ends.iter().map(|end| end.mac).collect();
    let strangers = [macs[0], macs[1], [2, 0xdd, 0, 0, 0, 1]];
    let mut mark = 0x0100;
    for to in [macs[1], [0xff; 6], [2, 0xaa, 0, 0, 0, 1]] {
        for (from, tag) in strangers
            .iter()
            .flat_map(|from| [None, Some(3000), Some(3001), Some(3)].map(|tag| (*from, tag)))
        {
            mark += 1;
            ends[0].send(to, from, tag, mark)?;
        }
    }
    mark += 1;
    let to_pf = mark;
    ends[0].send(macs[2], macs[0], None, to_pf)?;
    thread::sleep(SILENCE);
    let passed = ends[1].seen();
    if !passed.is_empty() {
        return Err(format!("VF 1 has seen {passed:x?}"));
    }
    let seen = ends[2].seen();
    if !seen.contains(&(to_pf, Some(3000))) {
        return Err(format!(
            "the PF has not seen the frame for it with the tag of VF 0, but {seen:x?}"
        ));
    }
    if seen.iter().any(|(_, tag)| *tag != Some(3000)) {
        return Err(format!("a frame of VF 0 came without its tag: {seen:x?}"));
    }
    drop(ends);
    for lease in &leases {
        release(&card, lease).await?;
    }
    drop(pods);
    Ok(())
}

async fn both_macs_are_set_and_restored() -> Result<(), String> {
    let card = card()?;
    let clean = vf(&card)?.list().await.map_err(text)?;
    for level in [ResetLevel::Config, ResetLevel::Function] {
        let pod = Namespace::create().map_err(text)?;
        let lease = lease(&card, "pod", config(9)).await?;
        attach(&card, &lease, &pod).await?;
        let state = vf(&card)?.list().await.map_err(text)?.swap_remove(0);
        let wanted = config(9).mac;
        if (Some(state.admin_mac), Some(state.effective_mac), Some(state.mtu))
            != (wanted, wanted, config(9).mtu)
        {
            return Err(format!("found {state:?}"));
        }
        vf(&card)?
            .release(card.fence(), &lease, level)
            .await
            .map_err(text)?;
        let now = vf(&card)?.list().await.map_err(text)?;
        if now != clean {
            return Err(format!("after a release at {level:?}: {now:?}, before {clean:?}"));
        }
    }
    Ok(())
}

async fn a_vf_goes_to_vfio_and_comes_home() -> Result<(), String> {
    let card = card()?;
    let lease = lease(&card, "vm", VfConfig::default()).await?;
    let attached = vf(&card)?.attach(card.fence(), &lease, &Attachment::Vfio).await;
    attached.map_err(text)?;
    let location = vf(&card)?.list().await.map_err(text)?.swap_remove(0).location;
    if location != VfLocation::Driver("vfio-pci".into()) {
        return Err(format!("it is at {location:?}"));
    }
    release(&card, &lease).await?;
    let location = vf(&card)?.list().await.map_err(text)?.swap_remove(0).location;
    (location == VfLocation::Host)
        .then_some(())
        .ok_or_else(|| format!("it came to {location:?}"))
}

/// Released at once, while the kernel is still taking the namespace apart, and after it has.
async fn a_dead_pods_vf_comes_home() -> Result<(), String> {
    let card = card()?;
    for pause in [Duration::ZERO, Duration::from_secs(1)] {
        let pod = Namespace::create().map_err(text)?;
        let lease = lease(&card, "pod", VfConfig::default()).await?;
        attach(&card, &lease, &pod).await?;
        drop(pod);
        thread::sleep(pause);
        release(&card, &lease)
            .await
            .map_err(|reason| format!("after {pause:?}: {reason}"))?;
        let state = vf(&card)?.list().await.map_err(text)?.swap_remove(0);
        if (state.port, state.location) != (PortRef::vf(0), VfLocation::Host) {
            return Err(format!("after {pause:?}: not at home"));
        }
    }
    Ok(())
}

async fn without_vlans_nothing_is_leased() -> Result<(), String> {
    let mut options = fresh()?;
    options.vlans = None;
    let card = Card::open(options.clone()).map_err(text)?;
    let refused = lease(&card, "pod", VfConfig::default()).await;
    println!("own: refusal: {refused:?}");
    if !refused
        .as_ref()
        .is_err_and(|reason| reason.contains("cannot be protected"))
    {
        return Err(format!("{refused:?}"));
    }
    drop(card);
    options.protect = Protect::Waived;
    options.journal.push("waived");
    let card = Card::open(options).map_err(text)?;
    let lease = lease(&card, "pod", VfConfig::default()).await?;
    println!("own: abilities: {:?}", card.capabilities().vf);
    release(&card, &lease).await
}
