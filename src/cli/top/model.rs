//! What is shown, and what keys do to it; without a terminal, and without a tunnel.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::time::Instant;

use super::table::{Row, View, peers, reasons, sessions, workers};
use crate::cli::rates::{Rates, is_same_process, seconds_between};
use crate::control::protocol::{Peers, Status};
use crate::control::text::printable;

/// Seconds of history: as many as the widest of terminals has columns.
const HISTORY_MAX: usize = 1000;

/// Longest filter, in characters.
const FILTER_CHARS_MAX: usize = 64;

/// How long it is said that another process runs, in samples.
const NOTICE_SAMPLES: usize = 10;

/// A tunnel as it was at one time.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) status: Status,
    pub(super) peers: Peers,
    /// When the answers had come.
    pub(super) arrival: Instant,
}

/// What has become of the tunnel.
#[derive(Clone, Debug)]
pub(super) enum Update {
    /// It answers.
    Sample(Box<Sample>),
    /// It does not, and why.
    Lost(String),
}

/// A key, as far as anything is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Enter,
    Escape,
    Backspace,
    /// The next view.
    Next,
    Previous,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    /// Ends it at any time.
    Interrupt,
}

/// What comes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    GoOn,
    Quit,
}

/// What a view's rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sort {
    pub(super) column: usize,
    /// Names backwards, and the smallest numbers first.
    pub(super) is_reversed: bool,
}

/// A tunnel as it is shown.
pub(super) struct Shown {
    pub(super) status: Status,
    /// Peers with keys, and how many of these have sessions.
    pub(super) sessions: (usize, usize),
    /// All of it together, from the second sample of a process on.
    pub(super) rates: Option<Rates>,
    /// Those of each view, in the order of [`View::ALL`].
    rows: [Vec<Row>; 3],
}

/// See the module's documentation.
pub(super) struct Model {
    latest: Box<Sample>,
    pub(super) shown: Shown,
    /// Newest first.
    pub(super) history: VecDeque<Rates>,
    pub(super) view: View,
    sorts: [Sort; 3],
    pub(super) filter: String,
    pub(super) is_filtering: bool,
    pub(super) is_paused: bool,
    pub(super) shows_help: bool,
    /// Why the tunnel does not answer, if it does not.
    lost: Option<String>,
    /// What has happened, and for how many samples it is still said.
    notice: (String, usize),
    /// Rows above those that are shown.
    scroll: usize,
    /// Rows that there was room for.
    page_rows: usize,
}

impl Model {
    /// Begins with a first sample.
    pub(super) fn new(sample: Box<Sample>) -> Self {
        let sort = |view: View| Sort {
            column: view.sort(),
            is_reversed: false,
        };
        Self {
            shown: Shown::new(None, &sample),
            latest: sample,
            history: VecDeque::new(),
            view: View::Workers,
            sorts: View::ALL.map(sort),
            filter: String::new(),
            is_filtering: false,
            is_paused: false,
            shows_help: false,
            lost: None,
            notice: (String::new(), 0),
            scroll: 0,
            page_rows: 1,
        }
    }

    /// Takes note of what has become of the tunnel.
    pub(super) fn update(&mut self, update: Update) {
        let sample = match update {
            Update::Sample(sample) => sample,
            Update::Lost(reason) => return self.lost = Some(printable(&reason)),
        };
        self.lost = None;
        self.notice.1 = self.notice.1.saturating_sub(1);
        let before = Some(&*self.latest);
        let before = before.filter(|before| is_same_process(&before.status, &sample.status));
        if before.is_none() {
            let (old, new) = (self.latest.status.pid, sample.status.pid);
            let what = format!("now process {new}, before {old}: its counters begin at 0");
            self.notice = (what, NOTICE_SAMPLES);
        }
        if !self.is_paused {
            self.shown = Shown::new(before, &sample);
            if let Some(rates) = self.shown.rates {
                self.history.push_front(rates);
            }
            self.history.truncate(HISTORY_MAX);
        }
        self.latest = sample;
    }

    /// What somebody has to know, and whether it is bad.
    pub(super) fn message(&self) -> Option<(String, bool)> {
        match (&self.lost, self.is_paused, &self.notice) {
            (Some(reason), ..) => Some((format!("no answer: {reason}; trying again"), true)),
            (None, true, _) => Some(("paused: p goes on".into(), false)),
            (None, false, (text, 1..)) => Some((text.clone(), false)),
            _ => None,
        }
    }

    fn view_index(&self) -> usize {
        let is_this = |view: &View| *view == self.view;
        View::ALL.iter().position(is_this).unwrap_or(0)
    }

    /// What the view's rows are sorted by.
    pub(super) fn sort(&self) -> Sort {
        self.sorts[self.view_index()]
    }

    /// As many of the view's rows as there is room for, how many are before them, and how many
    /// there are.
    pub(super) fn rows(&mut self, page_rows: usize) -> (Vec<&Row>, usize, usize) {
        let (index, sort) = (self.view_index(), self.sort());
        let filter = self.filter.to_lowercase();
        let is_meant = |row: &&Row| {
            let mut cells = row.iter();
            filter.is_empty() || cells.any(|cell| cell.text.to_lowercase().contains(&filter))
        };
        let mut rows: Vec<&Row> = self.shown.rows[index].iter().filter(is_meant).collect();
        let columns = self.view.columns();
        let is_number = columns
            .get(sort.column)
            .is_some_and(|column| column.is_number);
        rows.sort_by(|one, other| {
            let cells = one.get(sort.column).zip(other.get(sort.column));
            let order = cells.map_or(Ordering::Equal, |(one, other)| one.compare(other));
            match is_number != sort.is_reversed {
                true => order.reverse(),
                false => order,
            }
        });
        let count = rows.len();
        self.page_rows = page_rows.max(1);
        self.scroll = self.scroll.min(count.saturating_sub(self.page_rows));
        let rows = rows.into_iter().skip(self.scroll).take(page_rows);
        (rows.collect(), self.scroll, count)
    }

    /// Does what a key means.
    pub(super) fn key(&mut self, key: Key) -> Outcome {
        match key {
            Key::Interrupt => return Outcome::Quit,
            key if self.is_filtering => self.edit_filter(key),
            Key::Char('q') => return Outcome::Quit,
            _ if self.shows_help => self.shows_help = false,
            Key::Char('?' | 'h') => self.shows_help = true,
            Key::Char('p' | ' ') => self.is_paused = !self.is_paused,
            Key::Char('/') => self.is_filtering = true,
            Key::Char('v') | Key::Next => self.change_view(1),
            Key::Char('V') | Key::Previous => self.change_view(View::ALL.len() - 1),
            Key::Char('s' | '>') => self.change_sort(1),
            Key::Char('S' | '<') => self.change_sort(self.view.columns().len() - 1),
            Key::Char('r') => self.reverse(),
            Key::Escape => self.filter.clear(),
            Key::Up | Key::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            Key::Down | Key::Char('j') => self.scroll = self.scroll.saturating_add(1),
            Key::PageUp => self.scroll = self.scroll.saturating_sub(self.page_rows),
            Key::PageDown => self.scroll = self.scroll.saturating_add(self.page_rows),
            Key::Home => self.scroll = 0,
            Key::End => self.scroll = usize::MAX,
            Key::Char(_) | Key::Enter | Key::Backspace => {}
        }
        Outcome::GoOn
    }

    fn reverse(&mut self) {
        let index = self.view_index();
        let sort = &mut self.sorts[index];
        sort.is_reversed = !sort.is_reversed;
    }

    fn edit_filter(&mut self, key: Key) {
        match key {
            Key::Char(c) if self.filter.chars().count() < FILTER_CHARS_MAX => self.filter.push(c),
            Key::Backspace => drop(self.filter.pop()),
            Key::Enter => self.is_filtering = false,
            Key::Escape => {
                self.filter.clear();
                self.is_filtering = false;
            }
            _ => {}
        }
    }

    /// Goes some views on.
    fn change_view(&mut self, by: usize) {
        let next = (self.view_index() + by) % View::ALL.len();
        self.view = View::ALL[next];
        self.scroll = 0;
    }

    /// Sorts by a column some places on, in its own order.
    fn change_sort(&mut self, by: usize) {
        let columns = self.view.columns().len();
        self.sorts[self.view_index()] = Sort {
            column: (self.sort().column + by) % columns,
            is_reversed: false,
        };
    }
}

impl Shown {
    /// `before`: an earlier sample of the same process.
    fn new(before: Option<&Sample>, after: &Sample) -> Self {
        let since = |before: &Sample, from, to| {
            let elapsed = after.arrival.saturating_duration_since(before.arrival);
            seconds_between(from, to, elapsed)
        };
        let by_status = before.and_then(|before| {
            let (from, to) = (before.status.boottime_ns, after.status.boottime_ns);
            Some((&before.status, since(before, from, to)?))
        });
        let by_peers = before.and_then(|before| {
            let (from, to) = (before.peers.boottime_ns, after.peers.boottime_ns);
            Some((&before.peers, since(before, from, to)?))
        });
        let rates =
            by_status.map(|(before, seconds)| Rates::of_tunnel(before, &after.status, seconds));
        Self {
            sessions: sessions(&after.peers),
            rates,
            rows: [
                workers(by_status, &after.status),
                peers(by_peers, &after.peers),
                reasons(by_status, &after.status),
            ],
            status: after.status.clone(),
        }
    }
}
