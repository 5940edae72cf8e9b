//! The counters in words.

use crate::counters::Snapshot;

/// Lines that sum a run up: all queues together, each queue, and what was
/// dropped and why. `tun_queue_drops`: packets that found the TUN device's queue full.
pub fn lines(queues: &[Snapshot], tun_queue_drops: u64) -> Vec<String> {
    let total = total(queues);
    let mut lines = vec![format!("total: {}", traffic(&total))];
    if queues.len() > 1 {
        let numbered = queues.iter().enumerate();
        lines.extend(numbered.map(|(index, queue)| format!("queue {index}: {}", traffic(queue))));
    }
    let mut drops: Vec<String> = total
        .drops()
        .map(|(reason, count)| format!("{} {count}", reason.replace('_', "-")))
        .collect();
    if tun_queue_drops > 0 {
        drops.push(format!("tun-queue-full {tun_queue_drops}"));
    }
    if drops.is_empty() {
        drops.push("none".into());
    }
    lines.push(format!("dropped: {}", drops.join(", ")));
    lines
}

/// What all queues have counted together.
pub fn total(queues: &[Snapshot]) -> Snapshot {
    let queues = queues.iter();
    queues.fold(Snapshot::default(), |sum, queue| sum.plus(queue))
}

fn traffic(counters: &Snapshot) -> String {
    format!(
        "sent {} packets ({}) in {} sends, received {} packets ({}) in {} receives, \
         {} vnet packets from and {} to the TUN",
        counters.packets_sent,
        bytes(counters.bytes_sent),
        counters.udp_sends,
        counters.packets_received,
        bytes(counters.bytes_received),
        counters.udp_receives,
        counters.tun_reads,
        counters.tun_writes,
    )
}

/// Bytes as a person reads them.
pub fn bytes(count: u64) -> String {
    scaled(count, ["B", "kB", "MB", "GB", "TB"])
}

/// A number with a unit as a person reads it. `units`: each a thousand of the
/// one before.
pub fn scaled(count: u64, units: [&str; 5]) -> String {
    if count < 1000 {
        return format!("{count} {}", units[0]).trim_end().into();
    }
    let (mut value, mut unit) = (count as f64 / 1e3, 1);
    // From there on one decimal rounds up to 1000.
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1e3;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_up_traffic_and_drops() {
        let one = Snapshot {
            packets_sent: 5,
            bytes_sent: 1_500_000,
            drop_send_full: 2,
            ..Snapshot::default()
        };
        let lines = lines(&[one, one], 0);
        assert_eq!(lines.len(), 4);
        assert!(
            lines[0].starts_with("total: sent 10 packets (3.0 MB)"),
            "{}",
            lines[0]
        );
        assert!(
            lines[2].starts_with("queue 1: sent 5 packets"),
            "{}",
            lines[2]
        );
        assert_eq!(lines[3], "dropped: send-full 4");
    }

    #[test]
    fn units() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.0 kB");
        assert_eq!(bytes(999_949), "999.9 kB");
        assert_eq!(bytes(999_950), "1.0 MB");
        assert_eq!(bytes(12_345_678_901), "12.3 GB");
        assert_eq!(bytes(u64::MAX), "18446744.1 TB");
    }
}
