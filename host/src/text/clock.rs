//! `strftime_now` for chat templates: a moment in UTC, formatted as Python's `strftime` does.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
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

/// Seconds since 1970-01-01 00:00 UTC, now.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

/// Formats a moment given in seconds since 1970. `None`: a directive that is not known.
pub fn strftime(seconds: i64, format: &str) -> Option<String> {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (weekday, yearday) = ((days + 4).rem_euclid(7), days - days_from_civil(year, 1, 1) + 1);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next()?;
        let unpadded = directive == '-';
        if unpadded {
            directive = chars.next()?;
        }
        let padded = |value: i64, width: usize| match unpadded {
            true => value.to_string(),
            false => format!("{value:0width$}"),
        };
        out += &match directive {
            'Y' => year.to_string(),
            'y' => padded(year.rem_euclid(100), 2),
            'm' => padded(month, 2),
            'd' => padded(day, 2),
            'e' => {
                if unpadded {
                    day.to_string()
                } else {
                    format!("{day:2}")
                }
            }
            'H' => padded(hour, 2),
            'I' => padded(hour12, 2),
            'M' => padded(minute, 2),
            'S' => padded(second, 2),
            'j' => padded(yearday, 3),
            'B' => MONTHS[month as usize - 1].to_owned(),
            'b' | 'h' => MONTHS[month as usize - 1][..3].to_owned(),
            'A' => DAYS[weekday as usize].to_owned(),
            'a' => DAYS[weekday as usize][..3].to_owned(),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'w' => weekday.to_string(),
            // Python's datetime.now() has no time zone, so these are empty there too.
            'Z' | 'z' => String::new(),
            '%' => "%".to_owned(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            _ => return None,
        };
    }
    Some(out)
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar: years
/// begin in March, so that the leap day is the last one (Hinnant, "chrono-compatible date algorithms").
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// The inverse of [`civil`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let shifted = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_dates_agree() {
        for days in (-800_000..800_000).step_by(37) {
            let (year, month, day) = civil(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
    }

    /// Against `datetime.fromtimestamp(s, timezone.utc).strftime(…)`.
    #[test]
    fn formats_as_python() {
        let at = |format| strftime(1_721_999_045, format).unwrap();
        assert_eq!(at("%d %b %Y"), "26 Jul 2024");
        assert_eq!(at("%A, %B %-d, %Y %H:%M:%S"), "Friday, July 26, 2024 13:04:05");
        assert_eq!(at("%I:%M %p %j %y 100%%"), "01:04 PM 208 24 100%");
        assert_eq!(strftime(0, "%F %T %a"), Some("1970-01-01 00:00:00 Thu".into()));
        assert_eq!(strftime(0, "%Q"), None);
    }
}
