//! [`Steering`]: the contract's async face of a [`Table`], which works on a thread of its own.
//!
//! Calls are handed over in the order in which their futures are first polled, and carried out one after another: two calls about
//! one cookie cannot overtake one another, and a dropped future leaves its batch done or not begun.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{PoisonError, RwLock};
use std::thread;

use async_trait::async_trait;
use dpumesh_core::steering::{
    Batch, BatchOutcome, Cookie, Counters, InstalledRule, MissPolicy, Occupancy, Owner, SteeringRule,
    TunnelKind, Verdict,
};
use dpumesh_core::{Epoch, Error, ErrorKind, Fence, FlowSteering, PortRef, Result, SteeringCapabilities};
use tokio::sync::oneshot;

use super::block::{self, BindError};
use super::kernel::Kernel;
use super::probe;
use super::table::Table;
use super::translate::{Names, tunnel_number};

/// What a [`Steering`] stands on.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the backend in errors.
    pub backend: String,
    /// Number of the tc block that the card's netdevs share; another card of the namespace has another.
    pub block: u32,
    /// Network device (interface index) of each port: representors of VFs, uplinks, and `stack0` for frames to the proxy.
    pub ports: BTreeMap<PortRef, u32>,
    /// Network devices of tunnels in external ("collect metadata") mode; without one its kind is not on offer.
    pub tunnels: Vec<(TunnelKind, u32)>,
    /// Meters that rules can name, 0 to 65,535.
    pub meters: BTreeMap<u32, Meter>,
    /// Most rules, software included.
    pub rules: u64,
    /// Most rules in hardware, when the driver takes any at all; 0 keeps everything in software.
    pub hardware_rules: u64,
}

/// Rate of a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meter {
    /// Octets per second.
    pub rate: u32,
    /// Octets at once.
    pub burst: u32,
}

impl Options {
    /// Software and hardware up to 65,536 rules, on these ports.
    pub fn new(backend: impl Into<String>, block: u32, ports: BTreeMap<PortRef, u32>) -> Self {
        Self {
            backend: backend.into(),
            block,
            ports,
            tunnels: Vec::new(),
            meters: BTreeMap::new(),
            rules: 65_536,
            hardware_rules: 65_536,
        }
    }
}

/// Which life of the card it is, and whether it is there: shared with whoever watches the card.
#[derive(Debug, Default)]
pub struct Life {
    epoch: AtomicU64,
    lost: AtomicBool,
}

impl Life {
    /// A card that is there.
    pub fn new(epoch: Epoch) -> Self {
        Self {
            epoch: AtomicU64::new(epoch.0),
            lost: AtomicBool::new(false),
        }
    }

    /// The present life; while the card is away, the last one.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// The card went: every call fails with `DeviceLost`.
    pub fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// The card is back; [`Steering::renew`] comes first.
    pub fn return_with(&self, epoch: Epoch) {
        self.epoch.store(epoch.0, Ordering::Release);
        self.lost.store(false, Ordering::Release);
    }

    fn check(&self, backend: &str, operation: &'static str, fence: Option<Fence>) -> Result<()> {
        if self.lost.load(Ordering::Acquire) {
            let error = Error::new(ErrorKind::DeviceLost, operation, "the card is away");
            return Err(error.backend(backend.to_owned()));
        }
        match fence {
            Some(Fence(epoch)) if epoch != self.epoch() => {
                let message = format!(
                    "the fence is of epoch {}, the card in epoch {}",
                    epoch.0,
                    self.epoch().0
                );
                Err(Error::new(ErrorKind::Stale, operation, message).backend(backend.to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// Rules of a card by tc flower.
///
/// Dropping it leaves the rules in the kernel, for the next process to find; [`Steering::remove`] takes everything away.
#[derive(Debug)]
pub struct Steering {
    backend: String,
    life: Arc<Life>,
    jobs: mpsc::Sender<Job>,
    capabilities: RwLock<SteeringCapabilities>,
    options: RwLock<Options>,
}

type Job = Box<dyn FnOnce(&mut Table) + Send>;

impl Steering {
    /// Binds the ports to the block, finds out what they can do, and takes up the rules that are there.
    ///
    /// Blocks the calling thread while the kernel works: some milliseconds.
    ///
    /// # Errors
    /// `NotFound` (a port's netdev), `Busy` (a netdev has somebody else's ingress qdisc), `Denied` (no `CAP_NET_ADMIN`), `Unsupported`
    /// (a kernel without tc flower), `Io`.
    pub fn open(mut kernel: Box<dyn Kernel>, options: Options, life: Arc<Life>) -> Result<Self> {
        let names = prepare(&mut *kernel, &options)?;
        let limits = probe(&mut *kernel, &names, &options)?;
        let mut table = Table::open(
            kernel,
            options.backend.clone(),
            options.block,
            names,
            limits.clone(),
            life.epoch(),
        )?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let worker = move || {
            for job in queue {
                job(&mut table);
            }
        };
        thread::Builder::new()
            .name("tc-flower".into())
            .spawn(worker)
            .map_err(|error| io_error(&options.backend, "steering.open", error))?;
        Ok(Self {
            backend: options.backend.clone(),
            life,
            jobs,
            capabilities: RwLock::new(limits),
            options: RwLock::new(options),
        })
    }

    /// What kernel and driver can do.
    pub fn capabilities(&self) -> SteeringCapabilities {
        self.capabilities
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Replaces the ports: new netdevs are bound to the block, those that went are released. Rules stay. Limits stay too: they
    /// belong to the epoch.
    ///
    /// # Errors
    /// As [`Steering::open`].
    pub async fn set_ports(&self, ports: BTreeMap<PortRef, u32>) -> Result<()> {
        let options = {
            let mut options = self.options.write().unwrap_or_else(PoisonError::into_inner);
            options.ports = ports;
            options.clone()
        };
        self.run("steering.set_ports", None, move |table| {
            let names = prepare(table.kernel(), &options)?;
            let gone: Vec<u32> = table
                .names
                .ports
                .values()
                .copied()
                .filter(|link| !names.ports.values().any(|l| l == link))
                .collect();
            for link in gone {
                table
                    .unbind(link)
                    .map_err(|error| io_error(&options.backend, "steering.set_ports", error))?;
            }
            table.names = names;
            Ok(())
        })
        .await
    }

    /// Begins the next life of the card on these ports: finds out again what it can do, and which rules survived. The caller ends
    /// the former life with [`Life::return_with`] afterwards.
    ///
    /// # Errors
    /// As [`Steering::open`].
    pub async fn renew(&self, epoch: Epoch, ports: BTreeMap<PortRef, u32>) -> Result<()> {
        let options = {
            let mut options = self.options.write().unwrap_or_else(PoisonError::into_inner);
            options.ports = ports;
            options.clone()
        };
        let limits = self
            .hand_over("steering.renew", move |table| {
                let names = prepare(table.kernel(), &options)?;
                let limits = probe(table.kernel(), &names, &options)?;
                table.renew(names, limits.clone(), epoch)?;
                Ok(limits)
            })
            .await?;
        *self.capabilities.write().unwrap_or_else(PoisonError::into_inner) = limits;
        Ok(())
    }

    /// Takes the block off every port, and with it all rules of all owners.
    ///
    /// # Errors
    /// `Io`, after trying every port.
    pub async fn remove(self) -> Result<()> {
        let backend = self.backend.clone();
        self.hand_over("steering.remove", move |table| {
            let links: Vec<u32> = table.names.links.keys().copied().collect();
            let failed = links
                .into_iter()
                .filter_map(|link| table.unbind(link).err())
                .last();
            failed.map_or(Ok(()), |error| Err(io_error(&backend, "steering.remove", error)))
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        fence: Option<Fence>,
        work: impl FnOnce(&mut Table) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (life, backend) = (Arc::clone(&self.life), self.backend.clone());
        self.hand_over(operation, move |table| {
            life.check(&backend, operation, fence)?;
            work(table)
        })
        .await
    }

    async fn hand_over<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Table) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let ended = || {
            Error::new(ErrorKind::Fault, operation, "the steering thread ended").backend(self.backend.clone())
        };
        let (sender, answer) = oneshot::channel();
        let job: Job = Box::new(move |table| {
            let _ = sender.send(work(table)); // nobody listens any more when the future was dropped
        });
        self.jobs.send(job).map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

/// Names and bound netdevs of the ports.
fn prepare(kernel: &mut dyn Kernel, options: &Options) -> Result<Names> {
    const OPEN: &str = "steering.open";
    let all = block::links(kernel).map_err(|error| io_error(&options.backend, OPEN, error))?;
    let mut names = Names {
        ports: options.ports.clone(),
        meters: options.meters.clone(),
        ..Names::default()
    };
    names.tunnels = options
        .tunnels
        .iter()
        .map(|(kind, link)| (tunnel_number(*kind), *link))
        .collect();
    for link in names.ports.values().chain(names.tunnels.values()) {
        let Some(name) = all.get(link) else {
            let message = format!("there is no network device {link}");
            return Err(Error::new(ErrorKind::NotFound, OPEN, message).backend(options.backend.clone()));
        };
        names.links.insert(*link, name.clone());
    }
    // Frames come out of the tap to the proxy by another way than rules.
    let stacks: Vec<u32> = names
        .ports
        .iter()
        .filter(|(port, _)| matches!(port, PortRef::Stack(_)))
        .map(|(_, link)| *link)
        .collect();
    for (link, name) in names.links.iter().filter(|(link, _)| !stacks.contains(link)) {
        block::bind(kernel, *link, name, options.block)
            .map_err(|error| bind_error(&options.backend, error))?;
    }
    Ok(names)
}

fn probe(kernel: &mut dyn Kernel, names: &Names, options: &Options) -> Result<SteeringCapabilities> {
    let limits = probe::limits(kernel, names, options)
        .map_err(|error| io_error(&options.backend, "steering.open", error))?;
    if limits.actions.is_empty() {
        let message = "the kernel takes no flower filter: it needs cls_flower and act_gact";
        return Err(
            Error::new(ErrorKind::Unsupported, "steering.open", message).backend(options.backend.clone())
        );
    }
    Ok(limits)
}

fn bind_error(backend: &str, error: BindError) -> Error {
    let kind = match &error {
        BindError::Taken { .. } => ErrorKind::Busy,
        BindError::Refused { refusal, .. } => match refusal.errno {
            libc::EPERM | libc::EACCES => ErrorKind::Denied,
            libc::ENOENT | libc::EOPNOTSUPP => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        },
        BindError::Io(_) => ErrorKind::Io,
    };
    Error::new(kind, "steering.open", error.to_string()).backend(backend.to_owned())
}

fn io_error(backend: &str, operation: &'static str, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, operation, format!("netlink: {error}"))
        .backend(backend.to_owned())
        .source(error)
}

#[async_trait]
impl FlowSteering for Steering {
    async fn validate(&self, rules: &[SteeringRule]) -> Result<Vec<Verdict>> {
        let rules = rules.to_vec();
        self.run("steering.validate", None, move |table| Ok(table.validate(&rules)))
            .await
    }

    async fn apply(&self, fence: Fence, batch: &Batch) -> Result<BatchOutcome> {
        let batch = batch.clone();
        self.run("steering.apply", Some(fence), move |table| table.apply(&batch))
            .await
    }

    async fn list(&self, owner: Owner) -> Result<Vec<InstalledRule>> {
        self.run("steering.list", None, move |table| table.list(owner))
            .await
    }

    async fn counters(&self, owner: Owner, cookies: &[Cookie]) -> Result<Vec<Option<Counters>>> {
        let cookies = cookies.to_vec();
        self.run("steering.counters", None, move |table| {
            table.counters(owner, &cookies)
        })
        .await
    }

    async fn flush(&self, fence: Fence, owner: Owner) -> Result<u64> {
        self.run("steering.flush", Some(fence), move |table| table.flush(owner))
            .await
    }

    async fn set_miss_policy(&self, fence: Fence, port: PortRef, policy: MissPolicy) -> Result<()> {
        let work = move |table: &mut Table| table.set_miss_policy(port, policy);
        self.run("steering.set_miss_policy", Some(fence), work).await
    }

    async fn occupancy(&self) -> Result<Vec<Occupancy>> {
        self.run("steering.occupancy", None, |table| Ok(table.occupancy()))
            .await
    }
}
