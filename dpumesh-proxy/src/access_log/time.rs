//! Points in time as logs write them, in UTC.

use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `%START_TIME(FORMAT)%`: strftime's conversions in the C locale, `%f` for nanoseconds, `%3f` for that many digits of the second's
/// fraction, and what the time library of Envoy adds: `%Ez`, `%:z`, `%E3S`, `%E*S`, `%E4Y`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TimeFormat(Vec<Step>);

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Text(String),
    /// A conversion.
    Field(char),
    /// So many digits of the second's fraction.
    Fraction(u32),
    /// The second with so many digits of its fraction.
    Second(u32),
    /// The second with its fraction, without zeros at the end.
    WholeSecond,
}

impl TimeFormat {
    /// # Errors
    /// The conversion that is not known.
    pub(super) fn new(format: &str) -> Result<Self, String> {
        let mut steps = Vec::new();
        let mut text = String::new();
        let mut rest = format.chars();
        while let Some(next) = rest.next() {
            if next != '%' {
                text.push(next);
                continue;
            }
            let unknown = || format!("the time format {format:?} has a conversion that is not supported yet");
            let step = match rest.next().ok_or_else(unknown)? {
                '%' => {
                    text.push('%');
                    continue;
                }
                field if "YymdeHIMSpjaAbBhDFTRszZcxXklUWVGguwCrP".contains(field) => Step::Field(field),
                ':' if rest.next() == Some('z') => Step::Text("+00:00".to_owned()),
                'E' => match rest.next() {
                    Some('z') => Step::Text("+00:00".to_owned()),
                    Some('*') if rest.next() == Some('S') => Step::WholeSecond,
                    Some('4') if rest.next() == Some('Y') => Step::Field('Y'),
                    Some(digits @ '1'..='9') if rest.clone().next() == Some('S') => {
                        rest.next();
                        Step::Second(digits.to_digit(10).unwrap_or(9))
                    }
                    _ => return Err(unknown()),
                },
                'f' => Step::Fraction(9),
                digits @ '1'..='9' if rest.next() == Some('f') => {
                    Step::Fraction(digits.to_digit(10).unwrap_or(9))
                }
                _ => return Err(unknown()),
            };
            if !text.is_empty() {
                steps.push(Step::Text(std::mem::take(&mut text)));
            }
            steps.push(step);
        }
        steps.push(Step::Text(text));
        Ok(Self(steps))
    }

    pub(super) fn write(&self, time: SystemTime, out: &mut Vec<u8>) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        for step in &self.0 {
            match step {
                Step::Text(text) => out.extend_from_slice(text.as_bytes()),
                Step::Fraction(digits) => {
                    let value = since.subsec_nanos() / 10u32.pow(9 - digits);
                    let _ = write!(
                        out,
                        "{value:0width$}",
                        width = usize::try_from(*digits).unwrap_or(9)
                    );
                }
                Step::Second(digits) => {
                    write_field('S', since, out);
                    out.push(b'.');
                    let value = since.subsec_nanos() / 10u32.pow(9 - digits);
                    let width = usize::try_from(*digits).unwrap_or(9);
                    let _ = write!(out, "{value:0width$}");
                }
                Step::WholeSecond => {
                    write_field('S', since, out);
                    if since.subsec_nanos() > 0 {
                        let _ = write!(out, ".{:09}", since.subsec_nanos());
                        let end = out
                            .iter()
                            .rposition(|digit| *digit != b'0')
                            .map_or(0, |at| at + 1);
                        out.truncate(end);
                    }
                }
                Step::Field(field) => write_field(*field, since, out),
            }
        }
    }
}

fn write_field(field: char, since: Duration, out: &mut Vec<u8>) {
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let twelve = (hour + 11) % 12 + 1;
    let name = |all: &'static [&'static str], at: u64| all[usize::try_from(at).unwrap_or_default()];
    let of_year = days - days_until(year);
    let (weekday, month_name) = (name(&DAYS, days % 7), name(&MONTHS, month - 1));
    let _ = match field {
        'Y' => write!(out, "{year:04}"),
        'y' => write!(out, "{:02}", year % 100),
        'm' => write!(out, "{month:02}"),
        'd' => write!(out, "{day:02}"),
        'e' => write!(out, "{day:2}"),
        'H' => write!(out, "{hour:02}"),
        'I' => write!(out, "{twelve:02}"),
        'M' => write!(out, "{minute:02}"),
        'S' => write!(out, "{second:02}"),
        'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
        'j' => write!(out, "{:03}", days - days_until(year) + 1),
        'a' => write!(out, "{}", &weekday[..3]),
        'A' => write!(out, "{weekday}"),
        'b' | 'h' => write!(out, "{}", &month_name[..3]),
        'B' => write!(out, "{month_name}"),
        'D' => write!(out, "{month:02}/{day:02}/{:02}", year % 100),
        'F' => write!(out, "{year:04}-{month:02}-{day:02}"),
        'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
        'R' => write!(out, "{hour:02}:{minute:02}"),
        's' => write!(out, "{}", since.as_secs()),
        'k' => write!(out, "{hour:2}"),
        'l' => write!(out, "{twelve:2}"),
        'P' => write!(out, "{}", if hour < 12 { "am" } else { "pm" }),
        'C' => write!(out, "{:02}", year / 100),
        'u' => write!(out, "{}", (days + 3) % 7 + 1),
        'w' => write!(out, "{}", (days + 4) % 7),
        'U' => write!(out, "{:02}", (of_year + 7 - (days + 4) % 7) / 7),
        'W' => write!(out, "{:02}", (of_year + 7 - (days + 3) % 7) / 7),
        'V' => write!(out, "{:02}", week(days).1),
        'G' => write!(out, "{}", week(days).0),
        'g' => write!(out, "{:02}", week(days).0 % 100),
        'c' => return each("a b e T Y", since, out),
        'x' => write!(out, "{month:02}/{day:02}/{:02}", year % 100),
        'X' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
        'r' => write!(
            out,
            "{twelve:02}:{minute:02}:{second:02} {}",
            if hour < 12 { "AM" } else { "PM" }
        ),
        'z' => write!(out, "+0000"),
        _ => write!(out, "UTC"),
    };
}

/// Conversions with what is between them.
fn each(fields: &str, since: Duration, out: &mut Vec<u8>) {
    for field in fields.chars() {
        match field {
            ' ' => out.push(b' '),
            field => write_field(field, since, out),
        }
    }
}

/// The year and the week of ISO 8601: weeks begin with Monday and belong to the year of their Thursday.
fn week(days: u64) -> (u64, u64) {
    let thursday = days + 3 - (days + 3) % 7;
    let (year, ..) = civil(thursday);
    (year, (thursday - days_until(year)) / 7 + 1)
}

/// `2026-11-22T15:36:48.833Z`
pub(crate) fn timestamp(time: SystemTime, out: &mut Vec<u8>) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let mut text = *b"0000-00-00T00:00:00.000Z";
    let mut put = |at: usize, width: usize, mut value: u64| {
        for place in (at..at + width).rev() {
            text[place] = b'0' + (value % 10) as u8;
            value /= 10;
        }
    };
    put(0, 4, year);
    put(5, 2, month);
    put(8, 2, day);
    put(11, 2, second / 3600);
    put(14, 2, second / 60 % 60);
    put(17, 2, second % 60);
    put(20, 3, u64::from(since.subsec_millis()));
    out.extend_from_slice(&text);
}

/// Year, month and day of a count of days since 1970 (proleptic Gregorian).
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Days from 1970 to the beginning of a year since then.
fn days_until(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_778), (2026, 11, 21));
    }

    #[test]
    fn weeks_are_those_of_iso_8601() {
        for (at, wanted) in [
            (0, (1970, 1)),
            (3, (1970, 1)),
            (4, (1970, 2)),
            (18_628, (2020, 53)),
            (18_631, (2021, 1)),
            (16_433, (2015, 1)),
        ] {
            assert_eq!(week(at), wanted, "{at}");
        }
    }

    #[test]
    fn conversions_are_strftimes() {
        let at = UNIX_EPOCH + Duration::new(1_795_361_808, 833_000_456);
        for (format, wanted) in [
            ("%Y/%m/%dT%H:%M:%S%z %s", "2026/11/22T15:36:48+0000 1795361808"),
            ("%s.%3f %6f %f %1f", "1795361808.833 833000 833000456 8"),
            (
                "%a %A %b %B %j %e %I%p %y",
                "Sun Sunday Nov November 326 22 03PM 26",
            ),
            (
                "%F %T %R %D 100%% %Z",
                "2026-11-22 15:36:48 15:36 11/22/26 100% UTC",
            ),
            (
                "%c|%x|%X|%r|%P",
                "Sun Nov 22 15:36:48 2026|11/22/26|15:36:48|03:36:48 PM|pm",
            ),
            ("%k|%l|%C|%u|%w|%U|%W|%V|%G|%g", "15| 3|20|7|0|47|46|47|2026|26"),
            ("%E3S|%E*S|%E4Y|%Ez|%:z", "48.833|48.833000456|2026|+00:00|+00:00"),
            ("", ""),
        ] {
            let mut out = Vec::new();
            TimeFormat::new(format).unwrap().write(at, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), wanted, "{format}");
        }
        for bad in ["%", "%Q", "%3", "%3g", "%E", "%EQ", "%E3", "%E*Y", "%:", "%L"] {
            assert!(TimeFormat::new(bad).is_err(), "{bad}");
        }
    }
}
