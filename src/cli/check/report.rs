//! What a check says: items, as a table for people and as JSON for programs.

use std::fmt::{self, Write};

use serde::Serialize;

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
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

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Info => "info",
            Self::Degraded => "degraded",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
        })
    }
}

/// Widest status in characters: "degraded".
const STATUS_WIDTH: usize = 8;

/// One thing that was checked. The fields' names are the keys of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Item {
    /// What was checked; the same in every run and version.
    pub name: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What that costs, unless nothing.
    pub cost: Option<String>,
    /// How to fix it, if there is anything to fix.
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
        cost: &str,
        remedy: &str,
    ) -> Self {
        Self {
            cost: Some(cost.into()),
            remedy: Some(remedy.into()),
            ..Self::new(name, Status::Degraded, found)
        }
    }

    /// A thing without which fastvpn does not run.
    pub fn missing(name: &'static str, found: impl Into<String>, cost: &str, remedy: &str) -> Self {
        Self {
            status: Status::Missing,
            ..Self::degraded(name, found, cost, remedy)
        }
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
pub(super) fn can_run(items: &[Item]) -> bool {
    items.iter().all(|item| item.status != Status::Missing)
}

/// An array of objects, one per item, and a line end.
pub(super) fn json(items: &[Item]) -> String {
    // Strings and options of strings always serialize.
    let mut text = serde_json::to_string_pretty(items).unwrap_or_else(|_| "[]".into());
    text.push('\n');
    text
}

/// A line per item, what it costs and how to fix it below where there is
/// something, and what it comes to at the end.
pub(super) fn table(items: &[Item]) -> String {
    let width = |item: &Item| item.name.chars().count();
    let name_width = items.iter().map(width).max().unwrap_or(0);
    let indent = STATUS_WIDTH + 2 + name_width + 2;
    let mut text = String::new();
    // Writing to a string cannot fail.
    for item in items {
        let Item {
            name,
            status,
            found,
            ..
        } = item;
        let _ = writeln!(
            text,
            "{status:<STATUS_WIDTH$}  {name:<name_width$}  {found}"
        );
        for (label, remark) in [("cost: ", &item.cost), ("fix: ", &item.remedy)] {
            if let Some(remark) = remark {
                let _ = writeln!(text, "{:indent$}{label}{remark}", "");
            }
        }
    }
    let _ = writeln!(text, "\n{}", verdict(items));
    text
}

fn verdict(items: &[Item]) -> String {
    let of = |status| {
        let of_status = items.iter().filter(|item| item.status == status);
        of_status.map(|item| item.name).collect::<Vec<_>>()
    };
    let missing = of(Status::Missing);
    if !missing.is_empty() {
        return format!("fastvpn cannot run here: {}.", missing.join(", "));
    }
    let mut verdict = String::from("fastvpn can run here");
    let (degraded, unknown) = (of(Status::Degraded), of(Status::Unknown));
    if degraded.is_empty() && unknown.is_empty() {
        verdict += ", with all it can use";
    }
    for (label, names) in [("degraded", degraded), ("not probed", unknown)] {
        if !names.is_empty() {
            verdict += &format!("; {label}: {}", names.join(", "));
        }
    }
    verdict + "."
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items() -> Vec<Item> {
        vec![
            Item::ok("kernel", "Linux 6.18"),
            Item::info("ip_forward", "0"),
            Item::degraded("TUN USO", "refused", "UDP packet by packet", "Linux 6.2"),
            Item::unknown("UDP_GRO", "no loopback"),
        ]
    }

    #[test]
    fn the_table_is_aligned() {
        let expected = "
ok        kernel      Linux 6.18
info      ip_forward  0
degraded  TUN USO     refused
                      cost: UDP packet by packet
                      fix: Linux 6.2
unknown   UDP_GRO     not probed: no loopback

fastvpn can run here; degraded: TUN USO; not probed: UDP_GRO.
";
        assert_eq!(table(&items()), expected.trim_start_matches('\n'));
    }

    #[test]
    fn what_is_missing_decides() {
        assert!(can_run(&items()));
        let mut items = items();
        items.push(Item::missing(
            "CAP_NET_ADMIN",
            "no",
            "does not start",
            "be root",
        ));
        assert!(!can_run(&items));
        let text = table(&items);
        assert!(
            text.ends_with("\nfastvpn cannot run here: CAP_NET_ADMIN.\n"),
            "{text}"
        );
        let good = [Item::ok("kernel", "new")];
        assert!(table(&good).ends_with("with all it can use.\n"));
    }

    #[test]
    fn json_has_every_key_of_every_item() {
        let text = json(&items());
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            parsed[2],
            serde_json::json!({
                "name": "TUN USO",
                "status": "degraded",
                "found": "refused",
                "cost": "UDP packet by packet",
                "remedy": "Linux 6.2",
            })
        );
        assert_eq!(parsed[0]["cost"], serde_json::Value::Null);
        assert_eq!(parsed[3]["status"], "unknown");
        assert_eq!(parsed.as_array().map(Vec::len), Some(items().len()));
    }
}
