//! What the rows need of the machine: processes that end with their owner, processors, CPU time, memory, medians.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::Result;

/// Which processor the load runs on and which the proxy and the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pinning {
    /// The load on processor 0, everything else on processor 1
    Across,
    /// All on processor 1
    Same,
}

impl Pinning {
    pub(crate) fn load(self) -> usize {
        match self {
            Self::Across => 0,
            Self::Same => 1,
        }
    }
}

/// How long a program may take to listen.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// Where the proxies and the endpoint run.
pub(crate) const SERVING: usize = 1;

/// A child that ends with its owner.
pub(crate) struct Process(Child);

impl Process {
    /// Starts a program and waits until it listens on all of these.
    pub(crate) fn start(name: &str, mut command: Command, addresses: &[SocketAddr]) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let mut process = Self(child.map_err(|error| format!("{name}: {error}"))?);
        let end = Instant::now() + STARTS_WITHIN;
        for address in addresses {
            while TcpStream::connect(address).is_err() {
                if let Some(status) = process.0.try_wait()? {
                    return Err(format!("{name} ended before it listened on {address}: {status}").into());
                }
                if Instant::now() > end {
                    return Err(format!("{name} does not listen on {address}").into());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(process)
    }

    /// User and system time so far, microseconds; the kernel counts it in hundredths of a second.
    pub(crate) fn cpu_micros(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let after_name = stat.rsplit_once(')').ok_or("no name in stat")?.1;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(ticks as f64 * 1e4)
    }

    pub(crate) fn resident_kib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number.ok_or("no VmRSS in status")?.parse()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command on one processor, where there are several and taskset is there.
pub(crate) fn pinned(processor: usize, program: &Path) -> Command {
    match find("taskset").filter(|_| several()) {
        Some(taskset) => {
            let mut command = Command::new(taskset);
            command.args(["-c", &processor.to_string()]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Binds this thread to a processor, where there are several.
pub(crate) fn pin_here(processor: usize) -> Result<()> {
    if several() {
        let mut set = CpuSet::new();
        set.set(processor)?;
        sched_setaffinity(Pid::from_raw(0), &set)?;
    }
    Ok(())
}

fn several() -> bool {
    std::fs::read_to_string("/sys/devices/system/cpu/online").is_ok_and(|online| online.trim() != "0")
}

pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
    folders
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(free_addresses(1)?[0])
}

/// So many that differ.
pub(crate) fn free_addresses(count: usize) -> Result<Vec<SocketAddr>> {
    let open = |_| TcpListener::bind("127.0.0.1:0");
    let held: Vec<TcpListener> = (0..count).map(open).collect::<std::io::Result<_>>()?;
    let addresses = held.iter().map(TcpListener::local_addr);
    Ok(addresses.collect::<std::io::Result<_>>()?)
}

/// What has to be said beside a figure of this machine.
pub(crate) fn description() -> String {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!(
        "kernel {}, {cpus} processors, congestion control {}",
        read("/proc/sys/kernel/osrelease"),
        read("/proc/sys/net/ipv4/tcp_congestion_control")
    )
}

pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Median absolute deviation.
pub(crate) fn spread(values: &[f64]) -> f64 {
    let middle = median(values);
    median(
        &values
            .iter()
            .map(|value| (value - middle).abs())
            .collect::<Vec<_>>(),
    )
}

/// The value that this share of the values does not exceed.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}
