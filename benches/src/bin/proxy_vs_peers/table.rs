//! A row's figures, of each program, and whether the bars are met.

use std::fmt;

use serde_json::{Value, json};

use crate::machine::{median, spread};

pub(crate) struct Table {
    pub(crate) name: String,
    /// What `Line::values` are.
    pub(crate) unit: &'static str,
    pub(crate) lines: Vec<Line>,
    pub(crate) verdicts: Vec<Verdict>,
}

/// One program's figures, a value for each round.
pub(crate) struct Line {
    pub(crate) who: String,
    pub(crate) values: Vec<f64>,
    /// Of each round as well, where it is of use: units per second.
    pub(crate) rates: Vec<f64>,
    /// Octets of memory at the end, KiB.
    pub(crate) resident_kib: Option<f64>,
}

impl Line {
    pub(crate) fn new(who: impl Into<String>) -> Self {
        Self {
            who: who.into(),
            values: Vec::new(),
            rates: Vec::new(),
            resident_kib: None,
        }
    }
}

pub(crate) struct Verdict {
    pub(crate) what: String,
    pub(crate) seen: f64,
    pub(crate) bar: Bar,
}

#[derive(Clone, Copy)]
pub(crate) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    fn is_met(self, seen: f64) -> bool {
        match self {
            Self::AtMost(bar) => seen <= bar,
            Self::AtLeast(bar) => seen >= bar,
        }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bar) => write!(f, "at most {bar:.2}"),
            Self::AtLeast(bar) => write!(f, "at least {bar:.2}"),
        }
    }
}

impl Table {
    pub(crate) fn new(unit: &'static str, lines: Vec<Line>) -> Self {
        Self {
            name: String::new(),
            unit,
            lines,
            verdicts: Vec::new(),
        }
    }

    /// A line's median.
    pub(crate) fn of(&self, who: &str) -> Option<f64> {
        let line = self.lines.iter().find(|line| line.who == who)?;
        Some(median(&line.values))
    }

    pub(crate) fn judge(mut self, what: impl Into<String>, seen: f64, bar: Bar) -> Self {
        let what = what.into();
        self.verdicts.push(Verdict { what, seen, bar });
        self
    }

    /// Ours as a share of the lowest of these; says nothing when none of them was there.
    pub(crate) fn beside(self, peers: &[&str], most: f64) -> Self {
        let best = peers
            .iter()
            .filter_map(|peer| self.of(peer))
            .min_by(f64::total_cmp);
        match (self.of("dpu-proxy"), best) {
            (Some(ours), Some(best)) => {
                let what = format!("dpu-proxy / {}", peers.join(" or "));
                self.judge(what, ours / best, Bar::AtMost(most))
            }
            _ => self,
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        let lines = self.lines.iter().map(|line| {
            json!({"program": line.who, "median": median(&line.values), "spread": spread(&line.values),
                "per_second": (!line.rates.is_empty()).then(|| median(&line.rates)), "resident_kib": line.resident_kib})
        });
        let verdicts = self.verdicts.iter().map(|verdict| {
            json!({"what": verdict.what, "seen": verdict.seen, "bar": verdict.bar.to_string(), "met": verdict.bar.is_met(verdict.seen)})
        });
        json!({"name": self.name, "unit": self.unit, "lines": lines.collect::<Vec<_>>(), "verdicts": verdicts.collect::<Vec<_>>()})
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.name)?;
        for line in &self.lines {
            write!(
                f,
                "  {:<16} {:>10.2} ± {:<7.2} {}",
                line.who,
                median(&line.values),
                spread(&line.values),
                self.unit
            )?;
            if !line.rates.is_empty() {
                write!(f, "   {:>8.0} /s", median(&line.rates))?;
            }
            if let Some(kib) = line.resident_kib {
                write!(f, "   {:>6.1} MiB", kib / 1024.0)?;
            }
            writeln!(f)?;
        }
        for Verdict { what, seen, bar } in &self.verdicts {
            let word = if bar.is_met(*seen) { "met" } else { "NOT met" };
            writeln!(f, "  {what}: {seen:.2}, {bar}: {word}")?;
        }
        Ok(())
    }
}
