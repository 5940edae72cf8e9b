//! Numbers as a person reads them.

use crate::control::summary::scaled;

/// A count, as in `1.5 M`.
pub(super) fn count(count: u64) -> String {
    scaled(count, &["", "k", "M", "G", "T"])
}

/// A count of something, as in `1.5 M packets`.
pub(super) fn counted(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// An exact count of something, as in `2 prefixes`.
pub(super) fn exactly(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

const MINUTE_SECONDS: u64 = 60;
const HOUR_SECONDS: u64 = 60 * MINUTE_SECONDS;
const DAY_SECONDS: u64 = 24 * HOUR_SECONDS;

/// How long ago something was, as in `3 min ago`.
pub(super) fn ago(seconds: u64) -> String {
    if seconds == 0 {
        return "now".into();
    }
    let (value, unit) = match seconds {
        0..MINUTE_SECONDS => (seconds, "s"),
        MINUTE_SECONDS..HOUR_SECONDS => (seconds / MINUTE_SECONDS, "min"),
        HOUR_SECONDS..DAY_SECONDS => (seconds / HOUR_SECONDS, "h"),
        _ => (seconds / DAY_SECONDS, "d"),
    };
    format!("{value} {unit} ago")
}

/// How long something lasts, in its two largest units, as in `3 d 4 h`.
pub(super) fn duration(seconds: u64) -> String {
    let (days, hours) = (seconds / DAY_SECONDS, seconds % DAY_SECONDS / HOUR_SECONDS);
    let minutes = seconds % HOUR_SECONDS / MINUTE_SECONDS;
    let rest = seconds % MINUTE_SECONDS;
    match seconds {
        0..MINUTE_SECONDS => format!("{rest} s"),
        MINUTE_SECONDS..HOUR_SECONDS => format!("{minutes} min {rest} s"),
        HOUR_SECONDS..DAY_SECONDS => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
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
        assert_eq!(counted(1, "packet", "packets"), "1 packet");
        assert_eq!(counted(0, "packet", "packets"), "0 packets");
        assert_eq!(counted(1_500_000, "packet", "packets"), "1.5 M packets");
        assert_eq!(exactly(1, "prefix", "prefixes"), "1 prefix");
        assert_eq!(exactly(100_000, "prefix", "prefixes"), "100000 prefixes");
    }

    #[test]
    fn times() {
        for (seconds, when, how_long) in [
            (0, "now", "0 s"),
            (1, "1 s ago", "1 s"),
            (59, "59 s ago", "59 s"),
            (60, "1 min ago", "1 min 0 s"),
            (215, "3 min ago", "3 min 35 s"),
            (3600, "1 h ago", "1 h 0 min"),
            (86_399, "23 h ago", "23 h 59 min"),
            (86_400, "1 d ago", "1 d 0 h"),
            (277_200, "3 d ago", "3 d 5 h"),
        ] {
            assert_eq!(ago(seconds), when);
            assert_eq!(duration(seconds), how_long);
        }
        // A number that is no time is no reason to panic.
        assert!(duration(u64::MAX).ends_with(" h"));
    }
}
