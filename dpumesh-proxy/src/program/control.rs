//! The control thread: files, the stream, health, names, operators and signals, one after the other.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use dpumesh_xds::discovery::ResourceType;
use tokio::sync::mpsc;

use super::apply::{commit, open, take};
use super::give::Giver;
use super::{Ads, Error, LOOK, Refused, Running, Shared, State, lock, stream};
use crate::admin;
use crate::closing::Which;
use crate::config::ConfigError;
use crate::config::dns::Resolved;
use crate::config::files::Files;
use crate::config::model::Config;
use crate::dns::{self, Resolver};
use crate::hand_over;
use crate::health::Report;
use crate::health::keeper::Keeper;
use crate::overload::Manager;
use crate::worker::Command;

/// What the control thread is told: to end, to stop listening, what there is to judge of endpoints, what names were found to be.
pub(super) type Orders = (
    mpsc::UnboundedReceiver<()>,
    mpsc::UnboundedReceiver<Which>,
    mpsc::UnboundedReceiver<Report>,
    mpsc::UnboundedReceiver<Resolved>,
);

/// The control thread's own.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) shared: Arc<Shared>,
    pub(super) files: Files,
    pub(super) workers: Vec<Running>,
    pub(super) keeper: Keeper,
    pub(super) names: Names,
    /// What is done when there is too much of something.
    pub(super) overload: Option<Manager>,
}

/// Who looks names up, once there are any.
#[derive(Debug)]
pub(super) struct Names {
    netns: Option<PathBuf>,
    found: dns::Reports,
    resolver: Option<Resolver>,
    /// The configuration whose names they are.
    generation: u64,
}

impl Names {
    pub(super) fn new(netns: Option<PathBuf>, found: dns::Reports) -> Self {
        Self {
            netns,
            found,
            resolver: None,
            generation: 0,
        }
    }

    /// Begins with the names of `config`; what was found of them in a moment.
    pub(super) fn start(&mut self, config: &Config) -> std::io::Result<Vec<Resolved>> {
        self.generation = config.generation;
        if config.lookups.is_empty() {
            return Ok(Vec::new());
        }
        let (resolver, first) =
            Resolver::start(self.netns.clone(), config.lookups.clone(), self.found.clone())?;
        self.resolver = Some(resolver);
        Ok(first)
    }

    /// Goes on with those of another configuration.
    fn follow(&mut self, config: &Config) {
        if self.generation == config.generation {
            return;
        }
        self.generation = config.generation;
        if self.resolver.is_none() && !config.lookups.is_empty() {
            match Resolver::start(self.netns.clone(), Vec::new(), self.found.clone()) {
                Ok((resolver, _)) => self.resolver = Some(resolver),
                Err(error) => tracing::error!(%error, "names are not looked up"),
            }
        }
        if let Some(resolver) = &self.resolver {
            resolver.follow(config.lookups.clone());
        }
    }
}

async fn until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

impl Control {
    pub(super) fn apply_first(&self) -> Result<(), Error> {
        let config = self.shared.config.load_full();
        let opened = open(&self.shared, &config)?;
        commit(&self.shared, &self.workers, None, opened);
        Ok(())
    }

    pub(super) fn run(self, admin: Option<TcpListener>, ads: Option<Ads>, orders: Orders) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "the control thread has no runtime");
                return;
            }
        };
        tokio::task::LocalSet::new().block_on(&runtime, self.serve(admin, ads, orders));
    }

    async fn serve(
        mut self,
        admin: Option<TcpListener>,
        ads: Option<Ads>,
        (mut quits, mut stops, mut reports, mut resolved): Orders,
    ) {
        let admin_copy = admin.as_ref().and_then(|admin| admin.try_clone().ok());
        let mut giver = Some(self.giver(admin_copy));
        let admin = admin.map(|admin| {
            tokio::task::spawn_local(admin::serve(admin, Arc::clone(&self.shared))).abort_handle()
        });
        let (sender, mut updates) = mpsc::channel(1);
        if let Some((server, stored)) = ads {
            stream::begin(&self.shared, server, &stored, sender);
        }
        let mut signals = self.shared.options.signals.then(Signals::new).flatten();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.keep_health();
        loop {
            let due = self.keeper.due();
            tokio::select! {
                _ = quits.recv() => break,
                Some(which) = stops.recv() => {
                    for worker in &self.workers {
                        // A worker that is gone listens no more.
                        let _ = worker.commands.send(Command::StopListening(which));
                    }
                }
                () = Signals::next(&mut signals) => break,
                _ = look.tick() => {
                    self.look();
                    self.take_over(&mut giver);
                    if let Some(overload) = &mut self.overload {
                        overload.tick(Instant::now());
                    }
                }
                Some(update) = updates.recv() => self.update(update),
                Some(found) = resolved.recv() => self.place(found),
                Some(report) = reports.recv() => self.keeper.take(&report, tokio::time::Instant::now()),
                () = until(due) => self.keeper.tick(tokio::time::Instant::now()),
            }
        }
        if self.shared.handed_over.load(Ordering::Acquire)
            && let Some(admin) = admin
        {
            // Whoever asks from now on asks the newer process.
            admin.abort();
        }
        self.drain(quits, signals).await;
    }

    /// Who gives this process's sockets away.
    fn giver(&self, admin: Option<TcpListener>) -> Giver {
        Giver {
            shared: Arc::clone(&self.shared),
            workers: self.workers.iter().map(|w| w.commands.clone()).collect(),
            admin,
        }
    }

    /// Once everything is in force: lets an older process go, and serves newer ones.
    fn take_over(&self, giver: &mut Option<Giver>) {
        let Some(path) = &self.shared.options.hand_over else {
            return;
        };
        if self.shared.state() != State::Live {
            return;
        }
        let Some(giver) = giver.take() else {
            return;
        };
        if let Err(error) = hand_over::serve(path, giver) {
            tracing::error!(path = %path.display(), %error, "no newer process can take over");
        }
        if let Some(inherited) = lock(&self.shared.inherited).take() {
            inherited.ready();
        }
    }

    /// Takes up whose health is to be kept and which names are looked up, where the configuration is another.
    fn keep_health(&mut self) {
        let config = self.shared.config.load();
        self.keeper.follow(&config, tokio::time::Instant::now());
        self.names.follow(&config);
    }

    /// Takes what names were found to be.
    fn place(&mut self, found: Resolved) {
        let Self {
            shared,
            files,
            workers,
            ..
        } = self;
        let mut accept = |config: Config| take(shared, workers, config);
        let placed = files.take_resolved(vec![found], &shared.registry, &shared.sinks, &mut accept);
        if let Err(error) = placed {
            tracing::warn!(%error, "what names were found to be is not taken");
        }
        self.keep_health();
    }

    fn look(&mut self) {
        let Self {
            shared,
            files,
            workers,
            ..
        } = self;
        let current = shared.config.load_full();
        let mut accept = |config: Config| take(shared, workers, config);
        let mut refused = lock(&shared.refused).clone();
        let mut tell = |file: &str, outcome| note(&mut refused, file, outcome);
        files.reload(&shared.registry, &shared.sinks, &current, &mut accept, &mut tell);
        shared.secrets.look(&mut tell);
        refused.retain(|file, _| files.reads(file) || shared.secrets.reads(file));
        *lock(&shared.refused) = refused;
        self.keep_health();
    }

    /// A change from the aggregated stream.
    fn update(&mut self, update: stream::Arrived) {
        let Self {
            shared,
            files,
            workers,
            ..
        } = self;
        let mut accept = |config: Config| take(shared, workers, config);
        let applied = files.apply_ads(&update.update, &shared.registry, &shared.sinks, &mut accept);
        if update.update.kind == ResourceType::Listener && shared.state() == State::Initializing {
            shared.state.store(State::Live as u8, Ordering::Release);
        }
        // The stream is gone where this fails; what was taken stays.
        let _ = update.answer.send(applied);
        self.keep_health();
    }

    async fn drain(self, mut quits: mpsc::UnboundedReceiver<()>, mut signals: Option<Signals>) {
        let Self { shared, workers, .. } = self;
        shared.state.store(State::Draining as u8, Ordering::Release);
        let limit = shared.options.drain_time;
        tracing::info!(seconds = limit.as_secs_f32(), "draining");
        let now = tokio::time::Instant::now();
        let (idle, deadline) = (now + limit / 4, now + limit);
        for worker in &workers {
            // A worker that is gone has nothing left to drain.
            let _ = worker.commands.send(Command::Drain { idle, deadline });
        }
        let ended = async {
            while workers.iter().any(|w| !w.thread.is_finished()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = ended => {}
            () = tokio::time::sleep_until(deadline + Duration::from_secs(1)) => {}
            _ = quits.recv() => {}
            () = Signals::next(&mut signals) => {}
        }
        for worker in workers {
            drop(worker.commands);
            if worker.thread.is_finished() && worker.thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
        shared.sinks.settle();
    }
}

/// Remembers why a file was refused, or that it is not any more.
pub(super) fn note(refused: &mut BTreeMap<String, Refused>, file: &str, outcome: Result<(), ConfigError>) {
    match outcome {
        Ok(()) => drop(refused.remove(file)),
        Err(error) => {
            tracing::warn!(%error, "update refused; the last good one stays");
            let at = SystemTime::now();
            refused.insert(file.to_owned(), Refused { at, error });
        }
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Option<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => Some(Self { terminate, interrupt }),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, "signals are not handled");
                None
            }
        }
    }

    async fn next(signals: &mut Option<Self>) {
        match signals {
            None => std::future::pending().await,
            Some(Self { terminate, interrupt }) => {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            }
        }
    }
}
