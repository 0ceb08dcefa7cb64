//! Commands of other threads, carried out by the worker between two batches: ports, policies, rules, readings.

use dpumesh_core::steering::SteeringRule;
use dpumesh_core::{PortIo, PortRef, Vni};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::engine::{Engine, TICK};
use super::handle::{Command, Readings, RuleChange, RuleReading, RulesChanged};
use super::key::Tunnels;
use super::port::{PortIndex, PortPolicy, Ports};
use super::rules::{CompiledRule, Numbering, Refused, compile};
use super::stats::{EngineStats, PortStats};
use crate::flow::{RuleCount, RuleIndex, Tick};

impl Engine {
    /// Carries out waiting commands; false when one of them was to stop.
    pub(super) fn commands(&mut self, now: Tick) -> bool {
        while let Ok(command) = self.mailbox.commands.try_recv() {
            match command {
                Command::Stop => return false,
                // A caller that no longer waits for its answer is no error.
                Command::OpenPort { io, done } => {
                    let _ = done.send(self.open(io));
                }
                Command::ClosePort { port, done } => {
                    if let Some(index) = self.ports.index(port) {
                        self.close(index);
                    }
                    let _ = done.send(());
                }
                Command::SetPolicy { port, policy, done } => {
                    let _ = done.send(self.set_policy(port, policy));
                }
                Command::Rules { changes, done } => {
                    let _ = done.send(self.change_rules(changes, now));
                }
                Command::Counters { slots, done } => {
                    let _ = done.send(self.read(&slots, now));
                }
                Command::Stats { done } => {
                    let _ = done.send(self.stats());
                }
            }
        }
        true
    }

    fn open(&mut self, io: Box<dyn PortIo>) -> bool {
        let Some(index) = self.ports.intern(io.port()) else {
            return false;
        };
        self.close(index);
        match io.poll_fd() {
            None => self.polled.push(index),
            Some(fd) => {
                let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::from(index.0));
                if let Err(error) = self.epoll.add(fd, event) {
                    tracing::warn!(port = %io.port(), %error, "port not opened: its descriptor cannot be polled");
                    return false;
                }
            }
        }
        let port = self.ports.get_mut(index);
        port.limits = io.limits();
        port.io = Some(io);
        true
    }

    fn set_policy(&mut self, port: PortRef, policy: Option<PortPolicy>) -> bool {
        self.ports
            .intern(port)
            .is_some_and(|index| self.ports.set_policy(index, policy))
    }

    /// All or none.
    fn change_rules(&mut self, changes: Vec<RuleChange>, now: Tick) -> RulesChanged {
        let mut readings = Readings::new();
        let mut done: Vec<Undo> = Vec::with_capacity(changes.len());
        let mut refused = None;
        for (at, change) in changes.into_iter().enumerate() {
            match change {
                RuleChange::Install { slot, rule } => match self.install(RuleIndex(slot), &rule, now) {
                    Ok(()) => done.push(Undo::Uninstall(RuleIndex(slot))),
                    Err(refusal) => {
                        refused = Some((at, refusal));
                        break;
                    }
                },
                RuleChange::Uninstall { slot } => {
                    let removed = self.uninstall(RuleIndex(slot));
                    let count = removed.as_ref().map(|(_, count)| *count).unwrap_or_default();
                    readings.push((slot, reading(count, now)));
                    done.extend(removed.map(|(rule, count)| Undo::Reinstall(RuleIndex(slot), rule, count)));
                }
            }
        }
        if refused.is_some() {
            self.undo(done);
        }
        self.tables.forget_flows();
        self.offload.clear();
        self.tunnels.sweep();
        refused.map_or(Ok(readings), Err)
    }

    fn undo(&mut self, done: Vec<Undo>) {
        for step in done.into_iter().rev() {
            match step {
                Undo::Uninstall(slot) => drop(self.uninstall(slot)),
                Undo::Reinstall(slot, rule, count) => {
                    let held = rule.vni;
                    match self.tables.reinstall(slot, rule, count) {
                        Ok(()) => held.into_iter().for_each(|vni| self.tunnels.hold(vni)),
                        Err(refused) => {
                            tracing::error!(slot = slot.0, %refused, "a rule that was installed is refused")
                        }
                    }
                }
            }
        }
    }

    fn install(&mut self, slot: RuleIndex, rule: &SteeringRule, now: Tick) -> Result<(), Refused> {
        let mut numbers = Numbers {
            ports: &mut self.ports,
            tunnels: &mut self.tunnels,
        };
        let compiled = compile(rule, slot, &mut numbers)?;
        self.tables.install(slot, compiled, now)?;
        rule.pattern
            .vni
            .into_iter()
            .for_each(|vni| self.tunnels.hold(vni));
        Ok(())
    }

    fn uninstall(&mut self, slot: RuleIndex) -> Option<(CompiledRule, RuleCount)> {
        let removed = self.tables.uninstall(slot);
        removed
            .iter()
            .filter_map(|(rule, _)| rule.vni)
            .for_each(|vni| self.tunnels.release(vni));
        removed
    }

    fn read(&self, slots: &[u32], now: Tick) -> Readings {
        let counted = slots
            .iter()
            .filter_map(|slot| Some((*slot, self.tables.counter(RuleIndex(*slot))?)));
        counted.map(|(slot, count)| (slot, reading(count, now))).collect()
    }

    fn stats(&self) -> EngineStats {
        let mut stats = self.tally.snapshot();
        stats.ports = self
            .ports
            .iter()
            .map(|(_, port)| {
                let open = port.io.is_some();
                (port.port, PortStats { open, ..port.stats })
            })
            .collect();
        stats.flows = self.tables.flows() as u64;
        stats.flows_offloaded = u64::from(self.offload.used());
        stats
    }
}

/// How one change of the rules is taken back.
enum Undo {
    Uninstall(RuleIndex),
    /// With the count that it had.
    Reinstall(RuleIndex, CompiledRule, RuleCount),
}

fn reading(count: RuleCount, now: Tick) -> RuleReading {
    let idle_ms = count
        .last_hit
        .map(|last| u64::from(now.since(last)) * TICK.as_millis() as u64);
    RuleReading {
        packets: count.packets,
        octets: count.octets,
        idle_ms,
    }
}

/// Numbers that rules need, from the engine's tables.
struct Numbers<'a> {
    ports: &'a mut Ports,
    tunnels: &'a mut Tunnels,
}

impl Numbering for Numbers<'_> {
    fn port(&mut self, port: PortRef) -> Option<PortIndex> {
        self.ports.intern(port)
    }

    fn tunnel(&mut self, vni: Vni) -> Option<u16> {
        self.tunnels.intern(vni)
    }
}
