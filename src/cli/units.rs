//! Numbers as a person reads them.

use crate::control::summary::scaled;

/// A count, as in `1.5 M`.
pub(super) fn count(count: u64) -> String {
    scaled(count, ["", "k", "M", "G", "T"])
}

/// A count of something, as in `1.5 M packets`.
pub(super) fn counted(number: u64, what: &str) -> String {
    format!("{} {what}{}", count(number), plural(number, what))
}

/// An exact count of something, as in `2 prefixes`.
pub(super) fn exactly(number: usize, what: &str) -> String {
    format!("{number} {what}{}", plural(number as u64, what))
}

/// How many a second, as in `1.5 k/s`: of few, also tenths.
pub(super) fn per_second(rate: f64) -> String {
    match rate > 0.0 && rate < 9.95 {
        true => format!("{rate:.1}/s"),
        false => count(rate.round() as u64) + "/s",
    }
}

/// Bits a second, as in `1.5 Gbit/s`.
pub(super) fn bits_per_second(rate: f64) -> String {
    let units = ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"];
    scaled(rate.round() as u64, units)
}

fn plural(number: u64, what: &str) -> &'static str {
    match number {
        1 => "",
        _ if what.ends_with('x') => "es",
        _ => "s",
    }
}

/// How long something lasts, in its two largest units, as in `3 d 4 h`.
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1000), "1.0 k");
        assert_eq!(count(1_549_999), "1.5 M");
        assert_eq!(counted(1, "packet"), "1 packet");
        assert_eq!(counted(0, "packet"), "0 packets");
        assert_eq!(counted(1_500_000, "packet"), "1.5 M packets");
        assert_eq!(exactly(1, "prefix"), "1 prefix");
        assert_eq!(exactly(100_000, "prefix"), "100000 prefixes");
    }

    #[test]
    fn rates() {
        for (rate, shown) in [
            (0.0, "0/s"),
            (0.04, "0.0/s"),
            (0.2, "0.2/s"),
            (9.94, "9.9/s"),
            (9.96, "10/s"),
            (1234.5, "1.2 k/s"),
            (f64::INFINITY, "18446744.1 T/s"),
        ] {
            assert_eq!(per_second(rate), shown);
        }
        assert_eq!(bits_per_second(0.4), "0 bit/s");
        assert_eq!(bits_per_second(98.44e6), "98.4 Mbit/s");
    }

    #[test]
    fn times() {
        for (seconds, how_long) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min 0 s"),
            (215, "3 min 35 s"),
            (3600, "1 h 0 min"),
            (86_399, "23 h 59 min"),
            (86_400, "1 d 0 h"),
            (277_200, "3 d 5 h"),
        ] {
            assert_eq!(duration(seconds), how_long);
        }
        // A number that is not a time is no reason to panic.
        assert!(duration(u64::MAX).ends_with(" h"));
    }
}
