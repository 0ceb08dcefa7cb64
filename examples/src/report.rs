//! Progress while an example runs, a line for each scenario, the tables at the end, and the same as JSON:
//!
//! ```json
//! {"scenarios":[{"name":"…","passed":true,"detail":"…"}],
//!  "latency_us":{"direct":{"p50":1.0,"p90":1.0,"p99":1.0,"max":1.0}},
//!  "cpu_us_per_request":{"dataplane":1.0},
//!  "rss_kib":{"proxy":1},
//!  "took_ms":{"…":1.0}}
//! ```
//! `took_ms` is there where something was timed.
//!
//! Progress goes to standard error (a spinner on a terminal, plain lines elsewhere), results to standard output.

use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::measure::Percentiles;

/// What an example found out.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// In the order they ran.
    pub scenarios: Vec<Scenario>,
    /// Latency by path; each name says its pinning.
    pub latency_us: Table<Percentiles>,
    /// CPU microseconds for one request, by process.
    pub cpu_us_per_request: Table<f64>,
    /// Resident memory by process, KiB.
    pub rss_kib: Table<u64>,
    /// How long single things took, milliseconds.
    #[serde(skip_serializing_if = "Table::is_empty")]
    pub took_ms: Table<f64>,
}

/// One thing that was to be shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Scenario {
    /// What it is called.
    pub name: String,
    /// Whether it was shown.
    pub passed: bool,
    /// The figures that show it, or what went wrong.
    pub detail: String,
}

/// Named rows that keep their order; an object in JSON.
#[derive(Clone, Debug)]
pub struct Table<T>(Vec<(String, T)>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Table<T> {
    /// Adds a row, or replaces the one of that name.
    pub fn set(&mut self, name: impl Into<String>, value: T) {
        let name = name.into();
        match self.0.iter_mut().find(|(existing, _)| *existing == name) {
            Some((_, existing)) => *existing = value,
            None => self.0.push((name, value)),
        }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The row called `name`.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0
            .iter()
            .find(|(existing, _)| existing == name)
            .map(|(_, value)| value)
    }
}

impl<T: Serialize> Serialize for Table<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Report {
    /// Plays a scenario, prints its line and keeps its outcome. `play` returns the detail, or what went wrong; a
    /// panic in it is a failure of this scenario, not of the run. Returns whether it passed.
    pub fn scenario<E: fmt::Display>(
        &mut self,
        progress: &Progress,
        name: &str,
        play: impl FnOnce() -> Result<String, E>,
    ) -> bool {
        progress.step(name);
        let outcome = catch_unwind(AssertUnwindSafe(play));
        let (passed, detail) = match outcome {
            Ok(Ok(detail)) => (true, detail),
            Ok(Err(error)) => (false, error.to_string()),
            Err(panic) => (false, format!("panicked: {}", words_of(panic.as_ref()))),
        };
        let scenario = Scenario {
            name: name.to_owned(),
            passed,
            detail,
        };
        progress.line(&scenario.to_string());
        self.scenarios.push(scenario);
        passed
    }

    /// Whether there were scenarios and all of them passed.
    pub fn passed(&self) -> bool {
        !self.scenarios.is_empty() && self.scenarios.iter().all(|scenario| scenario.passed)
    }

    /// Success if [`passed`](Self::passed).
    pub fn exit_code(&self) -> ExitCode {
        if self.passed() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// The JSON of this module's description.
    ///
    /// # Errors
    /// If a figure is not a number.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// Writes the JSON to `path`, whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_json(&self, path: &Path) -> io::Result<()> {
        let text = self.to_json().map_err(io::Error::other)?;
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        std::fs::write(&beside, text + "\n")
            .and_then(|()| std::fs::rename(&beside, path))
            .map_err(|error| {
                // What was half written is of no use; the first error is the one to tell.
                let _ = std::fs::remove_file(&beside);
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.passed { "ok    " } else { "FAILED" };
        write!(f, "{mark} {}: {}", self.name, self.detail)
    }
}

/// The tables, and how many scenarios passed.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let latency = self.latency_us.0.iter().map(|(name, row)| {
            let figures = [row.p50, row.p90, row.p99, row.max].map(|figure| format!("{figure:.0}"));
            (name.as_str(), figures.to_vec())
        });
        table(f, "latency, µs", &["p50", "p90", "p99", "max"], latency)?;
        let cpu = self.cpu_us_per_request.0.iter();
        let cpu = cpu.map(|(name, figure)| (name.as_str(), vec![format!("{figure:.1}")]));
        table(f, "CPU for a request", &["µs"], cpu)?;
        let memory = self.rss_kib.0.iter();
        let memory = memory.map(|(name, figure)| (name.as_str(), vec![figure.to_string()]));
        table(f, "memory", &["KiB"], memory)?;
        let took = self.took_ms.0.iter();
        let took = took.map(|(name, figure)| (name.as_str(), vec![format!("{figure:.0}")]));
        table(f, "time", &["ms"], took)?;
        let passed = self.scenarios.iter().filter(|scenario| scenario.passed).count();
        write!(f, "\n{passed} of {} scenarios passed", self.scenarios.len())
    }
}

fn table<'a>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    columns: &[&str],
    rows: impl Iterator<Item = (&'a str, Vec<String>)>,
) -> fmt::Result {
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return Ok(());
    }
    let names = rows.iter().map(|(name, _)| *name).chain([title]);
    let width = names.map(|name| name.chars().count()).max().unwrap_or(0);
    let line = |name: &str, figures: &[String]| {
        let figures: String = figures.iter().map(|figure| format!(" {figure:>9}")).collect();
        format!("{name:width$}{figures}")
    };
    let columns: Vec<String> = columns.iter().map(ToString::to_string).collect();
    writeln!(f, "\n{}", line(title, &columns))?;
    for (name, figures) in &rows {
        writeln!(f, "{}", line(name, figures))?;
    }
    Ok(())
}

/// Shows what is going on.
#[derive(Debug)]
pub struct Progress {
    /// Hidden where there is no terminal.
    spinner: ProgressBar,
    begun: Instant,
    silent: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// A spinner if standard error is a terminal.
    pub fn new() -> Self {
        let spinner = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>3} {msg}") {
            spinner.set_style(style);
        }
        if !spinner.is_hidden() {
            spinner.enable_steady_tick(Duration::from_millis(100));
        }
        Self {
            spinner,
            begun: Instant::now(),
            silent: false,
        }
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        Self {
            spinner: ProgressBar::hidden(),
            begun: Instant::now(),
            silent: true,
        }
    }

    /// Says what happens next.
    pub fn step(&self, what: &str) {
        if self.silent {
            return;
        }
        if self.spinner.is_hidden() {
            // A closed standard error must not end the run.
            let _ = writeln!(
                io::stderr(),
                "[{:5.1}s] {what}",
                self.begun.elapsed().as_secs_f64()
            );
        } else {
            self.spinner.set_message(what.to_owned());
        }
    }

    /// Prints a line of the result on standard output.
    pub fn line(&self, text: &str) {
        if self.silent {
            return;
        }
        // As above.
        self.spinner.suspend(|| drop(writeln!(io::stdout(), "{text}")));
    }

    /// Takes the spinner away.
    pub fn finish(&self) {
        self.spinner.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report() -> Report {
        let mut report = Report::default();
        let progress = Progress::silent();
        report.scenario(&progress, "same node", || Ok::<_, String>("10 of 10".to_owned()));
        report.latency_us.set(
            "direct",
            Percentiles {
                p50: 1.0,
                p90: 2.0,
                p99: 3.0,
                max: 4.0,
            },
        );
        report.cpu_us_per_request.set("proxy", 9.5);
        report.cpu_us_per_request.set("dataplane", 4.0);
        report.rss_kib.set("proxy", 2048);
        report
    }

    #[test]
    fn the_json_has_its_shape() {
        let value: serde_json::Value =
            serde_json::from_str(&report().to_json().expect("written")).expect("read");
        let expected = json!({
            "scenarios": [{"name": "same node", "passed": true, "detail": "10 of 10"}],
            "latency_us": {"direct": {"p50": 1.0, "p90": 2.0, "p99": 3.0, "max": 4.0}},
            "cpu_us_per_request": {"proxy": 9.5, "dataplane": 4.0},
            "rss_kib": {"proxy": 2048},
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn one_failure_fails_the_run() {
        let mut report = report();
        assert!(report.passed());
        let progress = Progress::silent();
        report.scenario(&progress, "broken", || Err::<String, _>("no answer"));
        assert!(!report.passed());
        assert_eq!(report.scenarios[1].to_string(), "FAILED broken: no answer");
        report.scenario(&progress, "panics", || -> Result<String, String> {
            panic!("on {}", "purpose")
        });
        assert_eq!(report.scenarios[2].detail, "panicked: on purpose");
        assert!(!Report::default().passed(), "nothing shown is nothing passed");
    }

    #[test]
    fn the_table_keeps_the_order_of_its_rows() {
        let text = report().to_string();
        let proxy = text.find("proxy").expect("there");
        assert!(proxy < text.find("dataplane").expect("there"), "{text}");
        assert!(text.contains("latency, µs       p50"), "{text}");
        assert!(text.ends_with("1 of 1 scenarios passed"));
    }

    #[test]
    fn the_file_is_whole_or_absent() {
        let folder = tempfile::tempdir().expect("made");
        let path = folder.path().join("report.json");
        report().write_json(&path).expect("written");
        assert!(
            std::fs::read_to_string(&path)
                .expect("read")
                .contains("\"scenarios\"")
        );
        assert_eq!(std::fs::read_dir(folder.path()).expect("read").count(), 1);
        let missing = folder.path().join("no/such/folder");
        let error = report().write_json(&missing).expect_err("no folder");
        assert!(error.to_string().contains("no/such/folder"), "{error}");
    }
}
