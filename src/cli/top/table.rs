//! The rows of each view, with what they are sorted by.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::cli::rates::{Rates, Totals, drops_by_reason};
use crate::cli::units::count;
use crate::control::protocol::{PeerStatus, Peers, Status};
use crate::control::summary::bytes;
use crate::control::text::printable;

/// How long a session may be used after its handshake, in seconds (REJECT_AFTER_TIME of the
/// WireGuard paper, section 6.1).
const SESSION_SECONDS_MAX: u64 = 180;

/// One of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// A row for each worker.
    Workers,
    /// A row for each peer.
    Peers,
    /// A row for each reason for which packets were dropped.
    Drops,
}

impl View {
    /// In the order in which they are shown.
    pub(super) const ALL: [Self; 3] = [Self::Workers, Self::Peers, Self::Drops];

    /// What it is called.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Workers => "workers",
            Self::Peers => "peers",
            Self::Drops => "drops",
        }
    }

    /// Its columns; the first one is the row's name.
    pub(super) fn columns(self) -> &'static [Column] {
        match self {
            Self::Workers => &WORKERS,
            Self::Peers => &PEERS,
            Self::Drops => &DROPS,
        }
    }

    /// The column that it is sorted by at first.
    pub(super) fn sort(self) -> usize {
        match self {
            Self::Workers => 0,
            Self::Peers | Self::Drops => 1,
        }
    }
}

/// A column of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) title: &'static str,
    /// In characters, one of them for the mark of what the table is sorted by. The first
    /// column gets what the others leave.
    pub(super) width: u16,
    /// Numbers stand to the right, and the largest ones come first.
    pub(super) is_number: bool,
    /// Columns of the terminal without which there is no room for it.
    pub(super) terminal_width: u16,
}

const fn column(title: &'static str, width: u16) -> Column {
    Column {
        title,
        width,
        is_number: true,
        terminal_width: 0,
    }
}

const fn name(title: &'static str) -> Column {
    Column {
        is_number: false,
        ..column(title, 18)
    }
}

/// A column for those who have room for it.
const fn extra(column: Column, terminal_width: u16) -> Column {
    Column {
        terminal_width,
        ..column
    }
}

const WORKERS: [Column; 8] = [
    name("WORKER"),
    column("SENT bit/s", 11),
    column("PACKETS/s", 10),
    column("RECV bit/s", 11),
    column("PACKETS/s", 10),
    column("DROPS/s", 8),
    extra(column("DROPPED", 8), 92),
    extra(column("WAITING", 10), 104),
];

const PEERS: [Column; 10] = [
    name("PEER"),
    column("SENT bit/s", 11),
    column("PACKETS/s", 10),
    column("RECV bit/s", 11),
    column("PACKETS/s", 10),
    column("DROPS/s", 8),
    column("SEEN", 7),
    extra(column("DROPPED", 8), 92),
    extra(column("HANDSHAKE", 10), 104),
    Column {
        is_number: false,
        ..extra(column("ENDPOINT", 24), 130)
    },
];

const DROPS: [Column; 3] = [
    name("REASON"),
    column("PACKETS/s", 12),
    column("PACKETS", 12),
];

/// A row's cells, in the order of the view's columns.
pub(super) type Row = Vec<Cell>;

/// A cell.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cell {
    /// Made safe for a terminal.
    pub(super) text: String,
    /// What it is sorted by, in place of the text.
    number: Option<f64>,
}

impl Cell {
    fn text(text: &str) -> Self {
        Self {
            text: printable(text),
            number: None,
        }
    }

    fn number(number: f64, text: String) -> Self {
        let number = Some(number);
        Self { text, number }
    }

    /// A rate, if it is known by now.
    fn rate(rate: Option<f64>) -> Self {
        match rate {
            Some(rate) if rate > 0.0 && rate < 9.95 => Self::number(rate, format!("{rate:.1}")),
            Some(rate) => Self::number(rate, count(rate.round() as u64)),
            None => Self::unknown(),
        }
    }

    fn unknown() -> Self {
        Self::number(f64::NEG_INFINITY, "-".into())
    }

    /// Whether it is a number above zero.
    pub(super) fn is_some(&self) -> bool {
        self.number.is_some_and(|number| number > 0.0)
    }

    /// The order of a column's cells, smallest first.
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        match (self.number, other.number) {
            (Some(one), Some(other)) => one.total_cmp(&other),
            _ => self.text.cmp(&other.text),
        }
    }
}

/// The cells that all rows about traffic have.
fn traffic(rates: Option<Rates>) -> [Cell; 5] {
    let cell = |of: fn(&Rates) -> f64| Cell::rate(rates.as_ref().map(of));
    [
        cell(|rates| rates.bits_sent),
        cell(|rates| rates.packets_sent),
        cell(|rates| rates.bits_received),
        cell(|rates| rates.packets_received),
        cell(|rates| rates.drops),
    ]
}

fn exact(number: u64) -> Cell {
    Cell::number(number as f64, count(number))
}

/// A row for each worker. `before`: an earlier answer of the same process, and the seconds
/// since.
pub(super) fn workers(before: Option<(&Status, f64)>, after: &Status) -> Vec<Row> {
    let rows = after.workers.iter().enumerate().map(|(index, counters)| {
        let totals = Totals::of_worker(counters);
        let rates = before.and_then(|(status, seconds)| {
            let before = Totals::of_worker(status.workers.get(index)?);
            Some(Rates::between(&before, &totals, seconds))
        });
        let waiting = counters.get("queue_backlog_bytes").copied().unwrap_or(0);
        let mut row = vec![Cell::number(index as f64, index.to_string())];
        row.extend(traffic(rates));
        row.push(exact(totals.drops));
        row.push(Cell::number(waiting as f64, bytes(waiting)));
        row
    });
    rows.collect()
}

/// A row for each peer.
pub(super) fn peers(before: Option<(&Peers, f64)>, after: &Peers) -> Vec<Row> {
    let earlier: HashMap<&str, &PeerStatus> = before
        .iter()
        .flat_map(|(peers, _)| &peers.peers)
        .map(|peer| (peer.peer.as_str(), peer))
        .collect();
    let rows = after.peers.iter().map(|peer| {
        let totals = Totals::of_peer(peer);
        let rates = before.and_then(|(_, seconds)| {
            let before = Totals::of_peer(earlier.get(peer.peer.as_str())?);
            Some(Rates::between(&before, &totals, seconds))
        });
        let wireguard = peer.wireguard.as_ref();
        let identity = wireguard.and_then(|it| it.identity.as_deref());
        let handshake = wireguard.and_then(|it| it.latest_handshake_seconds);
        let endpoint = peer.endpoint.map(|endpoint| endpoint.to_string());
        let mut row = vec![Cell::text(identity.unwrap_or(&peer.peer))];
        row.extend(traffic(rates));
        row.push(age(peer.last_seen_seconds));
        row.push(exact(totals.drops));
        row.push(age(handshake));
        row.push(Cell::text(endpoint.as_deref().unwrap_or("-")));
        row
    });
    rows.collect()
}

/// How long ago something was, in its largest unit.
fn age(seconds: Option<u64>) -> Cell {
    let Some(seconds) = seconds else {
        return Cell::unknown();
    };
    let text = match seconds {
        0 => "now".into(),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    };
    Cell::number(seconds as f64, text)
}

/// A row for each reason.
pub(super) fn reasons(before: Option<(&Status, f64)>, after: &Status) -> Vec<Row> {
    let rows = drops_by_reason(before, after).into_iter().map(|drops| {
        vec![
            Cell::text(&drops.reason.replace('_', "-")),
            Cell::rate(drops.rate),
            exact(drops.count),
        ]
    });
    rows.collect()
}

/// How many peers have keys, and how many of these a session that can be used.
pub(super) fn sessions(peers: &Peers) -> (usize, usize) {
    let with_keys = peers
        .peers
        .iter()
        .filter_map(|peer| peer.wireguard.as_ref());
    let latest = with_keys.map(|wireguard| wireguard.latest_handshake_seconds);
    let is_usable = |latest: &Option<u64>| latest.is_some_and(|it| it < SESSION_SECONDS_MAX);
    (latest.clone().count(), latest.filter(is_usable).count())
}
