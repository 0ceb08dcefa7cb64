//! What does the card do with frames between its VFs? Each experiment prints who saw what; nothing is judged here.

use std::thread;
use std::time::Duration;

use dpumesh_hw::netlink::{BridgeMode, LinkChange, LinkIndex, Netlink, VfSetting};
use dpumesh_hw::netns::Namespace;

use crate::wire::{End, ip};
use crate::{PF, PF_NETDEV, WIRE_NETDEV};

const SILENCE: Duration = Duration::from_millis(400);

struct Lab {
    host: Namespace,
    pods: Vec<Namespace>,
    netlink: Netlink,
    pf: LinkIndex,
    /// VF 0 to 2, the PF, the wire.
    ends: Vec<End>,
    mark: u32,
}

pub(crate) fn run() -> Result<(), String> {
    let mut lab = Lab::build()?;
    lab.experiment("nothing set", &[])?;
    for mode in [BridgeMode::Vepa, BridgeMode::Veb] {
        let answer = lab.netlink.set_bridge_mode(lab.pf, mode);
        println!(
            "lab: set hwmode {mode:?}: {:?}",
            answer.map_err(|error| error.to_string())
        );
    }
    println!(
        "lab: get hwmode: {:?}",
        lab.netlink.bridge_mode(lab.pf).map_err(|error| error.to_string())
    );
    lab.experiment("one VLAN for all: 101 101 101", &[101, 101, 101])?;
    lab.experiment("a VLAN each: 101 102 103", &[101, 102, 103])?;
    for vid in [101, 102] {
        ip(
            &lab.host,
            &format!("link add link eth0 name eth0.{vid} type vlan id {vid}"),
        )?;
        ip(&lab.host, &format!("link set eth0.{vid} up"))?;
    }
    lab.experiment("a VLAN each, the PF in 101 and 102", &[101, 102, 103])?;
    ip(&lab.host, "link set eth0 promisc on")?;
    lab.experiment(
        "a VLAN each, the PF in 101 and 102 and promiscuous",
        &[101, 102, 103],
    )?;
    for vid in [101, 102] {
        ip(&lab.host, &format!("link del eth0.{vid}"))?;
    }
    lab.experiment("a VLAN each, the PF promiscuous only", &[101, 102, 103])?;
    for vf in 0..3 {
        let answer = lab.netlink.set_vf(lab.pf, vf, &VfSetting::Trust(true));
        println!("lab: trust {vf}: {:?}", answer.map_err(|error| error.to_string()));
    }
    ip(&lab.pods[1], "link set net1 promisc on")?;
    lab.experiment(
        "a VLAN each, VF 1 trusted and promiscuous, the PF promiscuous",
        &[101, 102, 103],
    )?;
    lab.netlink
        .change_link(lab.pf, &LinkChange::new().down())
        .map_err(|error| error.to_string())?;
    thread::sleep(SILENCE);
    lab.experiment("the PF down", &[101, 102, 103])?;
    Ok(())
}

impl Lab {
    fn build() -> Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let host = Namespace::current().map_err(|error| text(&error))?;
        ip(&host, "link set eth0 up")?;
        ip(&host, "link set eth1 up promisc on")?;
        std::fs::write(format!("/sys/bus/pci/devices/{PF}/sriov_numvfs"), "3")
            .map_err(|error| text(&error))?;
        let mut netlink = Netlink::open().map_err(|error| text(&error))?;
        let pf = netlink.link(PF_NETDEV).map_err(|error| text(&error))?.index;
        let vfs = netlink.vfs(pf).map_err(|error| text(&error))?;
        println!("lab: VFs as the PF has them: {vfs:#?}");
        let mut pods = Vec::new();
        let mut ends = Vec::new();
        for (vf, name) in ["VF 0", "VF 1", "VF 2"].into_iter().enumerate() {
            let target = std::fs::read_link(format!("/sys/bus/pci/devices/{PF}/virtfn{vf}"));
            let pci = target.map_err(|error| text(&error))?;
            let pci = pci
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default()
                .to_owned();
            let links = netlink.links().map_err(|error| text(&error))?;
            let link = links
                .iter()
                .find(|link| link.parent.as_deref() == Some(&pci))
                .ok_or("no netdev")?;
            println!("lab: {name} {pci} {link:?}");
            let pod = Namespace::create().map_err(|error| text(&error))?;
            let change = LinkChange::new().down().namespace(&pod).name("net1");
            netlink
                .change_link(link.index, &change)
                .map_err(|error| text(&error))?;
            ends.push(End::open(name, &pod, "net1")?);
            pods.push(pod);
        }
        ends.push(End::open("PF", &host, PF_NETDEV)?);
        ends.push(End::open("wire", &host, WIRE_NETDEV)?);
        Ok(Self {
            host,
            pods,
            netlink,
            pf,
            ends,
            mark: 0,
        })
    }

    fn experiment(&mut self, what: &str, vlans: &[u16]) -> Result<(), String> {
        println!("\nlab: == {what}");
        for (vf, id) in (0..).zip(vlans) {
            let setting = VfSetting::Vlan {
                id: *id,
                qos: 0,
                protocol: 0x8100,
            };
            let answer = self.netlink.set_vf(self.pf, vf, &setting);
            if let Err(error) = answer {
                println!("lab: VLAN {id} of VF {vf}: {error}");
            }
        }
        thread::sleep(Duration::from_millis(1500));
        let macs: Vec<[u8; 6]> = self.ends.iter().map(|end| end.mac).collect();
        let broadcast = [0xff; 6];
        let unknown = [2, 0xaa, 0, 0, 0, 1];
        for (sender, to, name, from, vlan) in [
            (0, macs[1], "VF 1", macs[0], None),
            (0, broadcast, "everybody", macs[0], None),
            (0, unknown, "an unknown station", macs[0], None),
            (0, macs[3], "the PF", macs[0], None),
            (0, macs[4], "the wire's end", macs[0], None),
            (0, macs[1], "VF 1 in the name of VF 2", macs[2], None),
            (0, macs[1], "VF 1 with a tag of 102", macs[0], Some(102)),
            (3, macs[0], "VF 0 without tag", macs[3], None),
            (3, macs[0], "VF 0 with tag 101", macs[3], Some(101)),
            (3, macs[0], "VF 0 with tag 102", macs[3], Some(102)),
            (4, macs[0], "VF 0 without tag", macs[4], None),
            (4, macs[0], "VF 0 with tag 101", macs[4], Some(101)),
        ] {
            self.ask(sender, to, name, from, vlan)?;
        }
        Ok(())
    }

    fn ask(
        &mut self,
        sender: usize,
        to: [u8; 6],
        name: &str,
        from: [u8; 6],
        vlan: Option<u16>,
    ) -> Result<(), String> {
        for end in &mut self.ends {
            end.seen();
        }
        self.mark += 1;
        let mark = self.mark;
        let sent = self.ends[sender].send(to, from, vlan, mark);
        thread::sleep(SILENCE);
        let mut witnesses = Vec::new();
        for (index, end) in self.ends.iter_mut().enumerate() {
            for (_, vlan) in end
                .seen()
                .into_iter()
                .filter(|(seen, _)| index != sender && *seen == mark)
            {
                witnesses.push(match vlan {
                    Some(vlan) => format!("{} (tag {vlan})", end.name),
                    None => end.name.to_owned(),
                });
            }
        }
        let sender = self.ends[sender].name;
        println!(
            "lab: {sender} to {name}: seen by [{}]{}",
            witnesses.join(", "),
            sent.err().map_or_else(String::new, |error| format!(" ({error})"))
        );
        Ok(())
    }
}
