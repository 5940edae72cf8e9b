//! The table at the end.

use crate::testbed::traffic::{BulkReport, Latency};

/// What was measured on one way.
pub(super) struct Measured {
    pub(super) bulk: BulkReport,
    pub(super) latency: Latency,
    /// Of the tunnel's two ends together; a bare veth has none.
    pub(super) cpu_seconds_per_gb: Option<f64>,
}

/// One row: name, tunnel, bare veth, ratio.
type Row = [String; 4];

/// Names to the left, numbers to the right, as wide as they need to be.
pub(super) fn table(tunnel: &Measured, veth: &Measured) -> String {
    let rows: Vec<Row> = vec![
        ["", "tunnel", "bare veth", "ratio"].map(String::from),
        compared(
            "TCP throughput, Gbit/s",
            tunnel.bulk.gigabits_per_second(),
            veth.bulk.gigabits_per_second(),
        ),
        [
            "TCP retransmissions".into(),
            tunnel.bulk.retransmissions.to_string(),
            veth.bulk.retransmissions.to_string(),
            String::new(),
        ],
        compared(
            "TCP round trip p50, µs",
            tunnel.latency.p50_ns as f64 / 1e3,
            veth.latency.p50_ns as f64 / 1e3,
        ),
        compared(
            "TCP round trip p99, µs",
            tunnel.latency.p99_ns as f64 / 1e3,
            veth.latency.p99_ns as f64 / 1e3,
        ),
        [
            "tunnel CPU seconds per GB".into(),
            optional(tunnel.cpu_seconds_per_gb),
            optional(veth.cpu_seconds_per_gb),
            String::new(),
        ],
    ];
    let mut widths = [0; 4];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for [name, tunnel, veth, ratio] in &rows {
        let line = format!(
            "{name:<0$}  {tunnel:>1$}  {veth:>2$}  {ratio:>3$}",
            widths[0], widths[1], widths[2], widths[3]
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn compared(name: &str, tunnel: f64, veth: f64) -> Row {
    let ratio = if veth > 0.0 {
        format!("{:.2}", tunnel / veth)
    } else {
        String::new()
    };
    [
        name.into(),
        format!("{tunnel:.1}"),
        format!("{veth:.1}"),
        ratio,
    ]
}

fn optional(value: Option<f64>) -> String {
    value.map_or("-".into(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn columns_are_aligned() {
        let measured = |bytes, p50_ns, cpu_seconds_per_gb| Measured {
            bulk: BulkReport {
                bytes,
                elapsed: Duration::from_secs(1),
                intact: true,
                retransmissions: 7,
            },
            latency: Latency {
                p50_ns,
                p99_ns: 120_000,
                p999_ns: 140_000,
                exchanges: 1,
                lost: 0,
            },
            cpu_seconds_per_gb,
        };
        let tunnel = measured(2_000_000_000, 60_000, Some(0.5));
        let veth = measured(4_000_000_000, 30_000, None);
        let expected = "
                           tunnel  bare veth  ratio
TCP throughput, Gbit/s       16.0       32.0   0.50
TCP retransmissions             7          7
TCP round trip p50, µs       60.0       30.0   2.00
TCP round trip p99, µs      120.0      120.0   1.00
tunnel CPU seconds per GB    0.50          -
";
        assert_eq!(table(&tunnel, &veth), expected.trim_start_matches('\n'));
    }
}
