//! A VF leased, configured and attached, beside the same work done by iproute2's `ip` (given to the machine as `/test/ip`): one program
//! per step, as scripts do it, and all steps in one (`ip -batch`).

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use dpumesh_core::vf::{Attachment, ResetLevel, VfConfig, VfRequest};
use dpumesh_core::{BackendExt, Mtu};

use crate::own::{card, text};
use crate::{PF, PF_NETDEV};

const ROUNDS: usize = 12;
const POD: &str = "bench";

pub(crate) fn run() -> Result<(), String> {
    let ip = Ip::find()?;
    ip.run("netns add bench")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(text)?;
    let card = card()?;
    let (mut ours, mut batch, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(runtime.block_on(lease_and_attach(&card))?);
        batch.push(ip.attach(true)?);
        steps.push(ip.attach(false)?);
    }
    let [ours, batch, steps] = [ours, batch, steps].map(median);
    println!(
        "bench: lease + configure + attach: {ours:?}; ip -batch: {batch:?} ({:.2}x); ip, a program per step: {steps:?} ({:.2}x)",
        ours.as_secs_f64() / batch.as_secs_f64(),
        ours.as_secs_f64() / steps.as_secs_f64()
    );
    let limit = batch.mul_f64(1.2);
    (ours <= limit)
        .then_some(())
        .ok_or_else(|| format!("{ours:?} is more than 1.2 times {batch:?}"))
}

async fn lease_and_attach(card: &dpumesh_sriov::Card) -> Result<Duration, String> {
    let vf = card.require_vf().map_err(text)?;
    let config = VfConfig {
        mtu: Mtu::try_from(1400).ok(),
        trust: Some(true),
        ..VfConfig::default()
    };
    let request = VfRequest::new("pod").with_config(config);
    let place = Attachment::Netns {
        path: Path::new("/run/netns").join(POD),
        ifname: "net1".into(),
    };
    let begun = Instant::now();
    let lease = vf.lease(card.fence(), &request).await.map_err(text)?;
    vf.attach(card.fence(), &lease, &place).await.map_err(text)?;
    let taken = begun.elapsed();
    vf.release(card.fence(), &lease, ResetLevel::Config)
        .await
        .map_err(text)?;
    Ok(taken)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// iproute2.
struct Ip {
    program: Vec<String>,
    netdev: String,
}

impl Ip {
    fn find() -> Result<Self, String> {
        let loader = "/test/lib/ld-linux-x86-64.so.2";
        if !Path::new(loader).exists() {
            return Err("iproute2 was not given to the machine (see the crate's README)".into());
        }
        let program = [loader, "--library-path", "/test/lib", "/test/ip"]
            .map(str::to_owned)
            .into();
        crate::fresh()?;
        let net = format!("/sys/bus/pci/devices/{PF}/virtfn0/net");
        let mut entries = std::fs::read_dir(net).map_err(text)?.flatten();
        let netdev = entries
            .next()
            .ok_or("VF 0 has no device")?
            .file_name()
            .to_string_lossy()
            .into_owned();
        Ok(Self { program, netdev })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]);
        command
    }

    fn run(&self, line: &str) -> Result<(), String> {
        let status = self.command().args(line.split(' ')).status().map_err(text)?;
        status
            .success()
            .then_some(())
            .ok_or_else(|| format!("ip {line}: {status}"))
    }

    /// The same changes as [`lease_and_attach`] makes, timed; undone untimed.
    fn attach(&self, in_one: bool) -> Result<Duration, String> {
        let vf = &self.netdev;
        let here = [
            format!("link set {PF_NETDEV} vf 0 vlan 3000"),
            format!("link set {PF_NETDEV} vf 0 trust on"),
            format!("link set {vf} mtu 1400"),
            format!("link set {vf} down netns {POD} name net1"),
        ];
        let there = "link set net1 up".to_owned();
        let begun = Instant::now();
        if in_one {
            std::fs::write("/tmp/here", here.join("\n") + "\n").map_err(text)?;
            std::fs::write("/tmp/there", there + "\n").map_err(text)?;
            self.run("-batch /tmp/here")?;
            self.run(&format!("-n {POD} -batch /tmp/there"))?;
        } else {
            here.iter().try_for_each(|line| self.run(line))?;
            self.run(&format!("-n {POD} {there}"))?;
        }
        let taken = begun.elapsed();
        self.run(&format!("-n {POD} link set net1 down netns 1 name {vf}"))?;
        self.run(&format!("link set {vf} mtu 1500"))?;
        self.run(&format!("link set {PF_NETDEV} vf 0 vlan 0"))?;
        self.run(&format!("link set {PF_NETDEV} vf 0 trust off"))?;
        Ok(taken)
    }
}
