//! What a test tells the simulated card, through the library's `diagnose`: one command, one answer, both text.
//!
//! | command | what |
//! |---|---|
//! | `lose`, `restore` | the processor goes, comes back empty |
//! | `set KEY=VALUE` | a [setting](crate::settings::Settings) from now on |
//! | `fail COUNT CODE [WHAT]` | so many of the next additions fail, or of WHAT: `delete`, `create`, `read`, `count`, `tunnel` |
//! | `lose_after COUNT` | the processor goes after so many more entries |
//! | `health CODE` | a condition is reported |
//! | `pass TOKEN UP DOWN` | octets of a connection |
//! | `inject PORT HEX` | a frame comes in; the answer is its fate |
//! | `entries` | how many steering entries there are |
//! | `alive` | 1, or 0 while it is gone |
//! | `users` | whose they are: numbers of rules |

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::card::{Card, Status, Target};
use crate::pipeline::Fate;

/// Carries a command out.
///
/// # Errors
/// `E_INVALID` for what is no command, and those of the command.
pub fn command(card: &Card, text: &str) -> Status<String> {
    const INVALID: i32 = dpumesh_yusur::table::E_INVALID;
    fn number<T: std::str::FromStr>(word: Option<&str>) -> Status<T> {
        word.and_then(|word| word.parse().ok()).ok_or(INVALID)
    }
    let mut words = text.split_whitespace();
    let done = || Ok("done".to_owned());
    match words.next() {
        Some("lose") => card.lose(),
        Some("restore") => card.restore(),
        Some("set") => {
            let mut state = card.state();
            return match words.try_for_each(|pair| state.settings.set(pair)) {
                Ok(()) => done(),
                Err(_) => Err(INVALID),
            };
        }
        Some("fail") => {
            let (count, code) = (number(words.next())?, number(words.next())?);
            let target = match words.next() {
                None => Target::Add,
                Some("delete") => Target::Delete,
                Some("create") => Target::Create,
                Some("read") => Target::Read,
                Some("count") => Target::Count,
                Some("tunnel") => Target::Tunnel,
                Some(_) => return Err(INVALID),
            };
            card.sabotage(target, count, code);
        }
        Some("lose_after") => card.lose_after(number(words.next())?),
        Some("health") => card.set_health(number(words.next())?),
        Some("pass") => {
            let (token, up, down) = (
                number(words.next())?,
                number(words.next())?,
                number(words.next())?,
            );
            card.alive()?.programs.pass(token, up, down)?;
        }
        Some("inject") => {
            let port = number(words.next())?;
            let octets = from_hex(words.next().unwrap_or_default()).ok_or(INVALID)?;
            return Ok(fate(&card.state().switch(port, &octets)));
        }
        Some("alive") => return Ok(u8::from(card.state().alive).to_string()),
        Some("users") => {
            let state = card.state();
            let tables = state.steering.tables.values();
            let users: BTreeSet<u64> = tables
                .flat_map(|content| content.entries.values().map(|held| held.entry.user))
                .collect();
            let users: Vec<String> = users.iter().map(u64::to_string).collect();
            return Ok(users.join(" "));
        }
        Some("entries") => return Ok(card.state().steering.entries.to_string()),
        _ => return Err(INVALID),
    }
    done()
}

/// A fate as text.
fn fate(fate: &Fate) -> String {
    match fate {
        Fate::Forwarded(port, octets) => format!("forward {port} {}", to_hex(octets)),
        Fate::Punted(octets) => format!("punt {}", to_hex(octets)),
        Fate::Missed => "miss".to_owned(),
        Fate::Dropped(why) => format!("drop {why}"),
    }
}

/// What [`command`] answered to `inject`; `None` for what is no such answer.
pub fn read_fate(text: &str) -> Option<Fate> {
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    match word {
        "forward" => {
            let (port, octets) = rest.split_once(' ')?;
            Some(Fate::Forwarded(port.parse().ok()?, from_hex(octets)?))
        }
        "punt" => Some(Fate::Punted(from_hex(rest)?)),
        "miss" => Some(Fate::Missed),
        "drop" => Some(Fate::Dropped("")),
        _ => None,
    }
}

/// The command that hands a frame in.
pub fn inject(port: dpumesh_core::PortRef, octets: &[u8]) -> String {
    format!(
        "inject {} {}",
        dpumesh_yusur::number_of_port(port),
        to_hex(octets)
    )
}

fn to_hex(octets: &[u8]) -> String {
    octets
        .iter()
        .fold(String::with_capacity(octets.len() * 2), |mut text, octet| {
            let _ = write!(text, "{octet:02x}"); // a string takes everything
            text
        })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    let pairs = (0..text.len()).step_by(2);
    pairs
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates_are_written_and_read_alike() {
        let fates = [
            Fate::Forwarded(7, vec![0, 255, 16]),
            Fate::Punted(vec![]),
            Fate::Missed,
            Fate::Dropped(""),
        ];
        for one in fates {
            assert_eq!(read_fate(fate(&one).trim_end()), Some(one));
        }
        assert_eq!(from_hex("0g"), None);
        assert_eq!(from_hex("0"), None);
    }
}
