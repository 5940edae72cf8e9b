//! What a check says of one thing.

use std::fmt;

use serde::Serialize;

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Good to know; nothing is wrong with it.
    Info,
    /// fastvpn runs, but slower or with less.
    Degraded,
    /// fastvpn does not run without it.
    Missing,
    /// It could not be found out.
    Unknown,
}

/// Widest status in characters: "degraded".
pub const STATUS_WIDTH: usize = 8;

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Info => "info",
            Self::Degraded => "degraded",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One thing that was looked at. The fields' names are the keys of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What was looked at; the same in every run and version.
    pub name: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What that costs, unless nothing.
    pub cost: Option<String>,
    /// How to mend it, if there is anything to mend.
    pub remedy: Option<String>,
}

impl Item {
    /// A thing that is as it should be.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, found)
    }

    /// A thing that is good to know.
    pub fn info(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Info, found)
    }

    /// A thing that was not found out; `why` follows "not probed: ".
    pub fn unknown(name: &'static str, why: impl fmt::Display) -> Self {
        Self::new(name, Status::Unknown, format!("not probed: {why}"))
    }

    /// A thing without which fastvpn runs less well.
    pub fn degraded(
        name: &'static str,
        found: impl Into<String>,
        cost: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(name, Status::Degraded, found).costing(cost, remedy)
    }

    /// A thing without which fastvpn does not run.
    pub fn missing(
        name: &'static str,
        found: impl Into<String>,
        cost: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(name, Status::Missing, found).costing(cost, remedy)
    }

    /// Adds what it costs and how to mend it.
    #[must_use]
    pub fn costing(mut self, cost: impl Into<String>, remedy: impl Into<String>) -> Self {
        self.cost = Some(cost.into());
        self.remedy = Some(remedy.into());
        self
    }

    fn new(name: &'static str, status: Status, found: impl Into<String>) -> Self {
        Self {
            name,
            status,
            found: found.into(),
            cost: None,
            remedy: None,
        }
    }
}

/// Whether fastvpn can run on a host with these items.
pub fn can_run(items: &[Item]) -> bool {
    items.iter().all(|item| item.status != Status::Missing)
}
