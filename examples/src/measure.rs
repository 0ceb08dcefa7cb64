//! CPU time and memory of processes, pinning, percentiles and medians.
//!
//! The unit of cost is CPU microseconds (user + system, all threads) for one unit of work, as `/proc/PID/stat` tells
//! them. The kernel counts there in ticks of usually 10 ms: a measurement should burn at least a second of CPU to
//! be good to one percent. A latency figure is worth something only with the pinning beside it, because waking a
//! thread on another core can cost more than the work: [`Environment`] and [`pin`] are for saying and choosing it.

use std::fmt;
use std::fs;
use std::io;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use procfs::process::Process;
use serde::{Deserialize, Serialize};

/// CPU time that a process has used so far, all threads, user and system. The kernel's resolution is a tick.
///
/// # Errors
/// If there is no such process.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let stat = process(pid)?.stat().map_err(io::Error::other)?;
    let ticks = stat.utime + stat.stime;
    Ok(Duration::from_micros(
        ticks * 1_000_000 / procfs::ticks_per_second(),
    ))
}

/// Resident memory of a process, KiB.
///
/// # Errors
/// If there is no such process, or it has no memory any more (a zombie).
pub fn resident_kib(pid: u32) -> io::Result<u64> {
    let status = process(pid)?.status().map_err(io::Error::other)?;
    status
        .vmrss
        .ok_or_else(|| io::Error::other(format!("process {pid} has no memory")))
}

/// When a process started, ticks since boot. Together with its id it names a process for good: an id is used again,
/// but not with the same start.
///
/// # Errors
/// If there is no such process.
pub fn start_time(pid: u32) -> io::Result<u64> {
    Ok(process(pid)?.stat().map_err(io::Error::other)?.starttime)
}

fn process(pid: u32) -> io::Result<Process> {
    let id = i32::try_from(pid).map_err(|_| io::Error::other(format!("{pid} is no process id")))?;
    Process::new(id).map_err(io::Error::other)
}

/// What processes spend while something is done: [`start`](Self::start), do it, [`per_unit`](Self::per_unit).
#[derive(Debug)]
pub struct CpuMeter {
    processes: Vec<(String, u32, Duration)>,
}

impl CpuMeter {
    /// Notes what each process has used so far. Each is a name for the result and a process id.
    ///
    /// # Errors
    /// If one of them is not there.
    pub fn start<'a>(processes: impl IntoIterator<Item = (&'a str, u32)>) -> io::Result<Self> {
        let noted = processes
            .into_iter()
            .map(|(name, pid)| Ok((name.to_owned(), pid, cpu_time(pid)?)));
        Ok(Self {
            processes: noted.collect::<io::Result<_>>()?,
        })
    }

    /// CPU microseconds of each process since the start for each of `units`, in the order given there.
    ///
    /// # Errors
    /// If one of them has ended, or nothing was done.
    pub fn per_unit(&self, units: u64) -> io::Result<Vec<(String, f64)>> {
        if units == 0 {
            return Err(io::Error::other("nothing was done, so that it cost nothing each"));
        }
        let spent = self.processes.iter().map(|(name, pid, before)| {
            let spent = cpu_time(*pid)?.saturating_sub(*before);
            Ok((name.clone(), spent.as_secs_f64() * 1e6 / units as f64))
        });
        spent.collect()
    }
}

/// Binds all present threads of a process to `cpus`; threads that they start later inherit it.
///
/// # Errors
/// If there is no such process or CPU, or it belongs to somebody else.
pub fn pin(pid: u32, cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    for task in process(pid)?.tasks().map_err(io::Error::other)? {
        let task = task.map_err(io::Error::other)?;
        sched_setaffinity(Pid::from_raw(task.tid), &set)?;
    }
    Ok(())
}

/// The CPUs that this process may use.
///
/// # Errors
/// If the kernel does not tell.
pub fn cpus() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect())
}

/// What every figure should say about the machine it comes from; printed as one line.
#[derive(Clone, Debug)]
pub struct Environment {
    kernel: String,
    processor: String,
    cores: usize,
    congestion_control: String,
    build: &'static str,
}

impl Environment {
    /// Looks at this machine. What cannot be read is called unknown.
    pub fn read() -> Self {
        let line = |path| fs::read_to_string(path).map_or_else(|_| unknown(), |text| text.trim().to_owned());
        let processor = fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
            let (_, name) = text
                .lines()
                .find(|line| line.starts_with("model name"))?
                .split_once(':')?;
            Some(name.trim().to_owned())
        });
        Self {
            kernel: line("/proc/sys/kernel/osrelease"),
            processor: processor.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: cpus().map_or(0, |cpus| cpus.len()),
            congestion_control: line("/proc/sys/net/ipv4/tcp_congestion_control"),
            build: if cfg!(debug_assertions) {
                "debug build"
            } else {
                "release build"
            },
        }
    }
}

fn unknown() -> String {
    "unknown".to_owned()
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kernel,
            processor,
            cores,
            congestion_control,
            build,
        } = self;
        write!(
            f,
            "Linux {kernel}, {cores} cores of {processor}, TCP {congestion_control}, {build}"
        )
    }
}

/// The distribution of a set of measurements. All zero if there were none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Half are not above this.
    pub p50: f64,
    /// Nine of ten are not above this.
    pub p90: f64,
    /// Ninety-nine of a hundred are not above this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// By nearest rank; sorts `samples`.
    pub fn of(samples: &mut [u64]) -> Self {
        samples.sort_unstable();
        let rank = |percent: usize| {
            let index = (samples.len() * percent).div_ceil(100).saturating_sub(1);
            samples.get(index).map_or(0.0, |sample| *sample as f64)
        };
        Self {
            p50: rank(50),
            p90: rank(90),
            p99: rank(99),
            max: rank(100),
        }
    }
}

/// The middle of repeated measurements, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The median; of an even number of measurements, the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of `samples`; `None` if there are none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} ({:.1} to {:.1})", self.median, self.min, self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn work_shows_as_cpu_time() {
        let me = std::process::id();
        let meter = CpuMeter::start([("me", me)]).expect("started");
        let deadline = Instant::now() + Duration::from_secs(20);
        let before = cpu_time(me).expect("read");
        // One unit of work is a fifth of a second of this thread; other tests may add theirs.
        while cpu_time(me).expect("read") - before < Duration::from_millis(200) {
            assert!(Instant::now() < deadline, "no CPU time passes");
            std::hint::black_box((0..10_000_u64).sum::<u64>());
        }
        let spent = meter.per_unit(2).expect("measured");
        assert!(spent[0].1 >= 100_000.0, "{spent:?}");
        assert!(meter.per_unit(0).is_err());
    }

    #[test]
    fn memory_is_seen() {
        let before = resident_kib(std::process::id()).expect("read");
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = resident_kib(std::process::id()).expect("read");
        assert!(after > before + 32 * 1024, "{before} {after}");
        drop(block);
    }

    #[test]
    fn a_missing_process_is_an_error() {
        // Above the kernel's largest possible id.
        let none = 1 << 23;
        assert!(cpu_time(none).is_err() && resident_kib(none).is_err() && start_time(none).is_err());
        assert!(pin(none, &[0]).is_err() && cpu_time(u32::MAX).is_err());
    }

    #[test]
    fn a_child_is_pinned() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("started");
        let cpu = cpus().expect("read")[0];
        pin(child.id(), &[cpu]).expect("pinned");
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("read");
        child.kill().expect("ours");
        child.wait().expect("ended");
        let allowed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        assert_eq!(allowed.map(str::trim), Some(cpu.to_string().as_str()));
    }

    #[test]
    fn percentiles_are_ranks() {
        let mut samples: Vec<u64> = (1..=1000).rev().collect();
        let found = Percentiles::of(&mut samples);
        assert_eq!(
            (found.p50, found.p90, found.p99, found.max),
            (500.0, 900.0, 990.0, 1000.0)
        );
        assert_eq!(Percentiles::of(&mut [7]).p99, 7.0);
        assert_eq!(Percentiles::of(&mut []), Percentiles::default());
    }

    #[test]
    fn medians() {
        assert_eq!(
            Spread::of(&[3.0, 1.0, 2.0]).map(|spread| spread.median),
            Some(2.0)
        );
        let even = Spread::of(&[4.0, 1.0, 2.0, 3.0]).expect("some");
        assert_eq!((even.median, even.min, even.max), (2.5, 1.0, 4.0));
        assert_eq!(Spread::of(&[]), None);
    }
}
