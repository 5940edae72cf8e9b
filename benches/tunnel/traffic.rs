//! The kinds of traffic, and the figures that each of them yields.

use crate::results::{Better, Row};

/// One kind of traffic.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// The first part of its rows' keys, as in `tcp-1`.
    pub key: &'static str,
    /// As shown to a person.
    pub title: &'static str,
    /// What is done.
    pub kind: Kind,
    /// What is measured of it.
    pub figures: &'static [Figure],
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP as fast as it goes.
    Tcp {
        /// Parallel connections in each direction.
        streams: usize,
        /// Who sends.
        direction: Direction,
    },
    /// UDP as fast as it goes, from host `a` to host `b`.
    Udp {
        /// Bytes of payload.
        bytes: usize,
    },
    /// Requests of 64 bytes, one at a time.
    Ping {
        /// Over UDP instead of TCP.
        udp: bool,
        /// Beside one TCP stream as fast as it goes.
        loaded: bool,
    },
    /// Requests of 64 bytes over UDP, one at a time, beside TCP as fast as it goes, on a
    /// slow cable.
    Queue {
        /// Megabits per second of the cable.
        mbit_per_s: u32,
        /// TCP connections.
        streams: usize,
    },
    /// The same beside eight TCP connections, on a cable of 100 Mbit/s that changes to 20
    /// and then to 500, from two seconds after each change on.
    Changing,
    /// UDP at 1 Mbit/s beside eight TCP connections as fast as they go, on a slow cable.
    Paced {
        /// Megabits per second of the cable.
        mbit_per_s: u32,
    },
    /// One TCP connection as fast as it goes, while host `b` is flooded: at the link's port,
    /// and at a closed one.
    Flooded {
        /// With what, and from where.
        by: Flooder,
    },
    /// Nothing.
    Idle,
    /// What the processes have taken, after all the rest.
    Memory,
    /// System calls, counted in a pass of its own.
    SystemCalls,
}

/// Who floods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flooder {
    /// An address that the link knows, with what is not a packet.
    Peer,
    /// An address that it does not know, with the same.
    Stranger,
    /// Sixteen such addresses, with [`INITIATIONS_PPS`] messages that look like the start
    /// of a WireGuard handshake to whoever only checks the first code.
    Initiators,
    /// The same addresses, with what looks like data messages of a WireGuard session that there
    /// is not, as many as one thread can send.
    Garbage,
}

/// Messages in a second from all initiators together.
pub const INITIATIONS_PPS: u64 = 100_000;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Host `a`, which made the connection.
    Forward,
    /// Host `b`.
    Reverse,
    /// Both, each on connections of its own.
    Both,
}

/// One figure.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// The second part of its row's key, as in `gbit_per_s`.
    pub key: &'static str,
    title: &'static str,
    unit: &'static str,
    better: Better,
}

const fn figure(
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    better: Better,
) -> Figure {
    Figure {
        key,
        title,
        unit,
        better,
    }
}

use Better::{Higher, Lower};

const THROUGHPUT: Figure = figure("gbit_per_s", "throughput", "Gbit/s", Higher);
const CPU: Figure = figure("cpu_s_per_gb", "CPU", "s/GB", Lower);
const RETRANSMITS: Figure = figure("retransmits", "retransmits", "segments", Lower);

const TCP: &[Figure] = &[
    THROUGHPUT,
    CPU,
    figure("cpu_s_per_gb_sender", "CPU, sender", "s/GB", Lower),
    figure("cpu_s_per_gb_receiver", "CPU, receiver", "s/GB", Lower),
    RETRANSMITS,
];
const TCP_BOTH: &[Figure] = &[THROUGHPUT, CPU, RETRANSMITS];
const UDP: &[Figure] = &[
    figure("delivered_kpps", "delivered", "1000/s", Higher),
    figure("loss_percent", "loss", "%", Lower),
    figure("cpu_ns_per_packet", "CPU", "ns/packet", Lower),
    figure(
        "cpu_ns_per_packet_sender",
        "CPU, sender",
        "ns/packet",
        Lower,
    ),
    figure(
        "cpu_ns_per_packet_receiver",
        "CPU, receiver",
        "ns/packet",
        Lower,
    ),
];
const PING: &[Figure] = &[
    figure("p50_us", "p50", "µs", Lower),
    figure("p99_us", "p99", "µs", Lower),
    figure("p999_us", "p99.9", "µs", Lower),
];
const UDP_PING: &[Figure] = &[
    figure("p50_us", "p50", "µs", Lower),
    figure("p99_us", "p99", "µs", Lower),
    figure("p999_us", "p99.9", "µs", Lower),
    figure("lost", "unanswered", "requests", Lower),
];
const QUEUE: &[Figure] = &[
    figure("p50_ms", "p50", "ms", Lower),
    figure("p99_ms", "p99", "ms", Lower),
    figure("lost", "unanswered", "requests", Lower),
    THROUGHPUT,
    CPU,
];
const CHANGING: &[Figure] = &[
    figure("p50_ms_20m", "p50 at 20 Mbit/s", "ms", Lower),
    figure("p99_ms_20m", "p99 at 20 Mbit/s", "ms", Lower),
    figure("p50_ms_500m", "p50 at 500 Mbit/s", "ms", Lower),
    figure("p99_ms_500m", "p99 at 500 Mbit/s", "ms", Lower),
    figure("lost", "unanswered", "requests", Lower),
];
const PACED: &[Figure] = &[
    figure("loss_percent", "loss", "%", Lower),
    figure("jitter_p99_ms", "jitter, p99", "ms", Lower),
];
const FLOODED: &[Figure] = &[
    figure(
        "ratio",
        "throughput to that with a closed port flooded",
        "",
        Higher,
    ),
    THROUGHPUT,
];
const IDLE: &[Figure] = &[figure("cpu_percent", "CPU", "% of a core", Lower)];
const MEMORY: &[Figure] = &[
    figure("rss_mib", "resident", "MiB", Lower),
    figure("rss_peak_mib", "resident, peak", "MiB", Lower),
];
const SYSTEM_CALLS: &[Figure] = &[
    figure("udp_64_per_packet", "UDP, 64 bytes", "per packet", Lower),
    figure("tcp_1_per_mb", "TCP, 1 stream", "per MB", Lower),
];

const fn tcp(key: &'static str, title: &'static str, streams: usize) -> Traffic {
    Traffic {
        key,
        title,
        kind: Kind::Tcp {
            streams,
            direction: Direction::Forward,
        },
        figures: TCP,
    }
}

const fn udp(key: &'static str, title: &'static str, bytes: usize) -> Traffic {
    Traffic {
        key,
        title,
        kind: Kind::Udp { bytes },
        figures: UDP,
    }
}

const fn queue(key: &'static str, title: &'static str, mbit_per_s: u32, streams: usize) -> Traffic {
    Traffic {
        key,
        title,
        kind: Kind::Queue {
            mbit_per_s,
            streams,
        },
        figures: QUEUE,
    }
}

/// All kinds, in the order in which they are measured and shown.
pub const ALL: &[Traffic] = &[
    tcp("tcp-1", "TCP, 1 stream", 1),
    tcp("tcp-4", "TCP, 4 streams", 4),
    tcp("tcp-16", "TCP, 16 streams", 16),
    Traffic {
        key: "tcp-1-reverse",
        title: "TCP, 1 stream, the other way",
        kind: Kind::Tcp {
            streams: 1,
            direction: Direction::Reverse,
        },
        figures: TCP,
    },
    Traffic {
        key: "tcp-1-both",
        title: "TCP, 1 stream each way at once",
        kind: Kind::Tcp {
            streams: 1,
            direction: Direction::Both,
        },
        figures: TCP_BOTH,
    },
    udp("udp-64", "UDP, 64 bytes", 64),
    udp("udp-512", "UDP, 512 bytes", 512),
    udp("udp-1400", "UDP, 1400 bytes", 1400),
    Traffic {
        key: "tcp-ping",
        title: "TCP ping-pong, 64 bytes",
        kind: Kind::Ping {
            udp: false,
            loaded: false,
        },
        figures: PING,
    },
    Traffic {
        key: "tcp-ping-loaded",
        title: "TCP ping-pong, 64 bytes, beside a TCP stream",
        kind: Kind::Ping {
            udp: false,
            loaded: true,
        },
        figures: PING,
    },
    Traffic {
        key: "udp-ping",
        title: "UDP ping-pong, 64 bytes",
        kind: Kind::Ping {
            udp: true,
            loaded: false,
        },
        figures: UDP_PING,
    },
    Traffic {
        key: "udp-ping-loaded",
        title: "UDP ping-pong, 64 bytes, beside a TCP stream",
        kind: Kind::Ping {
            udp: true,
            loaded: true,
        },
        figures: UDP_PING,
    },
    Traffic {
        key: "idle",
        title: "Idle, both ends",
        kind: Kind::Idle,
        figures: IDLE,
    },
    queue(
        "queue-10m-8",
        "UDP ping-pong beside 8 TCP streams, 10 Mbit/s",
        10,
        8,
    ),
    queue(
        "queue-100m-1",
        "UDP ping-pong beside 1 TCP stream, 100 Mbit/s",
        100,
        1,
    ),
    queue(
        "queue-100m-8",
        "UDP ping-pong beside 8 TCP streams, 100 Mbit/s",
        100,
        8,
    ),
    queue(
        "queue-1g-1",
        "UDP ping-pong beside 1 TCP stream, 1 Gbit/s",
        1000,
        1,
    ),
    queue(
        "queue-1g-8",
        "UDP ping-pong beside 8 TCP streams, 1 Gbit/s",
        1000,
        8,
    ),
    Traffic {
        key: "queue-change",
        title: "UDP ping-pong beside 8 TCP streams, 100 to 20 to 500 Mbit/s",
        kind: Kind::Changing,
        figures: CHANGING,
    },
    Traffic {
        key: "paced-100m",
        title: "UDP at 1 Mbit/s beside 8 TCP streams, 100 Mbit/s",
        kind: Kind::Paced { mbit_per_s: 100 },
        figures: PACED,
    },
    Traffic {
        key: "flood-stranger",
        title: "TCP, 1 stream, beside a stranger's flood",
        kind: Kind::Flooded {
            by: Flooder::Stranger,
        },
        figures: FLOODED,
    },
    Traffic {
        key: "flood-peer",
        title: "TCP, 1 stream, beside a peer's flood of what is not a packet",
        kind: Kind::Flooded { by: Flooder::Peer },
        figures: FLOODED,
    },
    Traffic {
        key: "flood-initiations",
        title: "TCP, 1 stream, beside 100 000 WireGuard initiations a second",
        kind: Kind::Flooded {
            by: Flooder::Initiators,
        },
        figures: FLOODED,
    },
    Traffic {
        key: "flood-garbage",
        title: "TCP, 1 stream, beside a flood of what looks like WireGuard's data",
        kind: Kind::Flooded {
            by: Flooder::Garbage,
        },
        figures: FLOODED,
    },
    Traffic {
        key: "memory",
        title: "Memory, of the end with more",
        kind: Kind::Memory,
        figures: MEMORY,
    },
    Traffic {
        key: "syscalls",
        title: "System calls, both ends",
        kind: Kind::SystemCalls,
        figures: SYSTEM_CALLS,
    },
];

impl Traffic {
    /// Key of the row of one figure.
    pub fn row_key(&self, figure: &str) -> String {
        format!("{}/{figure}", self.key)
    }

    /// Its rows.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        self.figures.iter().map(|figure| Row {
            key: self.row_key(figure.key),
            group: self.title.into(),
            title: figure.title.into(),
            unit: figure.unit.into(),
            better: figure.better,
        })
    }

    /// Whether a sample takes time of its own; otherwise it is only read off.
    pub fn is_timed(&self) -> bool {
        self.kind != Kind::Memory
    }
}

/// The kinds with these keys, in the order of [`ALL`]; all for none.
///
/// # Errors
/// Names the first key that there is not.
pub fn select(keys: &[String]) -> Result<Vec<Traffic>, String> {
    if let Some(unknown) = keys
        .iter()
        .find(|key| ALL.iter().all(|traffic| traffic.key != key.as_str()))
    {
        return Err(format!("there is no row {unknown}; --list shows all"));
    }
    let wanted = |traffic: &&Traffic| keys.is_empty() || keys.iter().any(|key| key == traffic.key);
    Ok(ALL.iter().filter(wanted).copied().collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn rows_have_unique_keys() {
        let keys: Vec<_> = ALL
            .iter()
            .flat_map(Traffic::rows)
            .map(|row| row.key)
            .collect();
        let unique: HashSet<_> = keys.iter().collect();
        assert_eq!(unique.len(), keys.len());
        assert!(keys.contains(&"tcp-1/gbit_per_s".to_string()));
        assert!(keys.contains(&"udp-64/cpu_ns_per_packet".to_string()));
    }

    #[test]
    fn rows_are_selected_in_their_own_order() {
        let select = |keys: &[&str]| {
            let keys: Vec<_> = keys.iter().map(ToString::to_string).collect();
            select(&keys).map(|list| list.iter().map(|traffic| traffic.key).collect::<Vec<_>>())
        };
        assert_eq!(select(&["udp-64", "tcp-1"]).unwrap(), ["tcp-1", "udp-64"]);
        assert_eq!(select(&[]).unwrap().len(), ALL.len());
        assert!(select(&["tcp-1", "tcp-2"]).unwrap_err().contains("tcp-2"));
    }
}
