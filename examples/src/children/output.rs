//! What a process says, collected by a thread so that it never waits for a reader.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Longest line that is kept whole, octets; longer ones are cut into several.
const LINE: u64 = 64 * 1024;

/// The last lines of a stream.
#[derive(Debug, Default)]
pub(super) struct Lines {
    said: Mutex<Said>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    lines: VecDeque<String>,
    ended: bool,
}

impl Lines {
    /// Reads `stream` to its end on a thread of its own and keeps the last `most` lines.
    pub(super) fn collect(stream: Option<impl Read + Send + 'static>, most: usize) -> io::Result<Arc<Self>> {
        let stream = stream.ok_or_else(|| io::Error::other("the stream is not a pipe"))?;
        let lines = Arc::new(Self::default());
        let collected = Arc::clone(&lines);
        thread::Builder::new().name("output".into()).spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            // A stream that cannot be read has ended.
            while (&mut stream).take(LINE).read_until(b'\n', &mut line).unwrap_or(0) > 0 {
                let text = String::from_utf8_lossy(&line);
                collected.push(text.trim_end_matches('\n').to_owned(), most);
                line.clear();
            }
            collected.lock().ended = true;
            collected.changed.notify_all();
        })?;
        Ok(lines)
    }

    /// The rest of the first line that begins with `prefix`; `None` if the stream ends or time passes before.
    pub(super) fn find(&self, prefix: &str, timeout: Duration) -> Option<String> {
        let find = |said: &Said| {
            let found = said.lines.iter().find_map(|line| line.strip_prefix(prefix));
            found.map(str::to_owned)
        };
        let waiting = |said: &mut Said| !said.ended && find(said).is_none();
        let outcome = self.changed.wait_timeout_while(self.lock(), timeout, waiting);
        let (said, _) = outcome.unwrap_or_else(PoisonError::into_inner);
        find(&said)
    }

    /// Whether the stream has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Waits until the stream has ended, at most so long.
    pub(super) fn wait_for_end(&self, timeout: Duration) {
        drop(
            self.changed
                .wait_timeout_while(self.lock(), timeout, |said| !said.ended),
        );
    }

    /// The lines so far.
    pub(super) fn text(&self) -> String {
        let said = self.lock();
        said.lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect()
    }

    fn push(&self, line: String, most: usize) {
        let mut said = self.lock();
        if said.lines.len() == most {
            said.lines.pop_front();
        }
        said.lines.push_back(line);
        drop(said);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[test]
    fn the_last_lines_are_kept() {
        let lines = Lines::collect(Some(&b"one\ntwo\nthree\nfour"[..]), 2).expect("collected");
        lines.wait_for_end(DEADLINE);
        assert_eq!(lines.text(), "three\nfour\n");
        assert_eq!(lines.find("fo", DEADLINE).as_deref(), Some("ur"));
        assert_eq!(lines.find("one", DEADLINE), None, "ended: no use waiting");
    }

    #[test]
    fn an_endless_line_is_cut() {
        let lines = Lines::collect(Some(io::repeat(b'x').take(LINE * 3)), 2).expect("collected");
        lines.wait_for_end(DEADLINE);
        assert_eq!(lines.text().len(), 2 * (LINE as usize + 1));
    }
}
