//! What a check says: items, as a table for people and as JSON for programs.

use serde::Serialize;

use crate::cli::table::Table;
use crate::error::Error;

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
    fn new(name: &'static str, status: Status, found: impl Into<String>) -> Self {
        Self {
            name,
            status,
            found: found.into(),
            cost: None,
            remedy: None,
        }
    }

    /// A thing that is as it should be.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Ok, found)
    }

    /// A thing that is good to know.
    pub fn info(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Status::Info, found)
    }

    /// A thing that was not found out.
    pub fn unknown(name: &'static str, why: &str) -> Self {
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

    /// The same of something that has failed. `remedy`: unless the error has one.
    pub fn failed(name: &'static str, error: &Error, cost: &str, remedy: &str) -> Self {
        Self::degraded(name, error.fault(), cost, error.remedy().unwrap_or(remedy))
    }

    /// The same item, if fastvpn does not run without it.
    pub fn missing(self) -> Self {
        Self {
            status: Status::Missing,
            ..self
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
    serde_json::to_string_pretty(items).unwrap_or_default() + "\n"
}

/// A line per item, what it costs and how to fix it below where there is
/// something, and what it comes to at the end.
pub(super) fn table(items: &[Item]) -> String {
    let mut table = Table::without_names();
    for item in items {
        let status = format!("{:?}", item.status).to_lowercase();
        table.push([status, item.name.into(), item.found.clone()]);
        for (label, remark) in [("cost: ", &item.cost), ("fix: ", &item.remedy)] {
            if let Some(remark) = remark {
                table.push([String::new(), String::new(), format!("{label}{remark}")]);
            }
        }
    }
    format!("{}\n{}\n", table.text(), verdict(items))
}

fn verdict(items: &[Item]) -> String {
    let of = |status| {
        let items = items.iter().filter(|item| item.status == status);
        items.map(|item| item.name).collect::<Vec<_>>().join(", ")
    };
    let missing = of(Status::Missing);
    if !missing.is_empty() {
        return format!("fastvpn cannot run here: {missing}.");
    }
    let mut verdict = String::from("fastvpn can run here");
    let less = [
        ("degraded", of(Status::Degraded)),
        ("not probed", of(Status::Unknown)),
    ];
    if less.iter().all(|(_, names)| names.is_empty()) {
        verdict += ", with all it can use";
    }
    for (label, names) in less.iter().filter(|(_, names)| !names.is_empty()) {
        verdict += &format!("; {label}: {names}");
    }
    verdict + "."
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items() -> Vec<Item> {
        vec![
            Item::ok("CAP_NET_ADMIN", "effective"),
            Item::info("kernel", "Linux 6.18"),
            Item::degraded("TUN USO", "refused", "UDP packet by packet", "Linux 6.2"),
            Item::unknown("UDP_GRO", "no loopback"),
        ]
    }

    #[test]
    fn the_table_is_aligned() {
        let expected = "
ok        CAP_NET_ADMIN  effective
info      kernel         Linux 6.18
degraded  TUN USO        refused
                         cost: UDP packet by packet
                         fix: Linux 6.2
unknown   UDP_GRO        not probed: no loopback

fastvpn can run here; degraded: TUN USO; not probed: UDP_GRO.
";
        assert_eq!(table(&items()), expected.trim_start_matches('\n'));
    }

    #[test]
    fn a_missing_item_decides() {
        assert!(can_run(&items()));
        let mut items = items();
        let none = Item::degraded("/dev/net/tun", "no", "does not start", "be root");
        items.push(none.missing());
        assert!(!can_run(&items));
        let text = table(&items);
        assert!(
            text.ends_with("\nfastvpn cannot run here: /dev/net/tun.\n"),
            "{text}"
        );
        let good = [Item::ok("CAP_NET_ADMIN", "effective")];
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

    #[test]
    fn an_error_has_the_last_word_on_the_remedy() {
        let error = Error::new("it is taken");
        let item = Item::failed("tunnel address", &error, "no start", "give an --address");
        assert_eq!(item.remedy.as_deref(), Some("give an --address"));
        let item = Item::failed("tunnel address", &error.hint("wait"), "no start", "");
        assert_eq!(item.found, "it is taken");
        assert_eq!(item.remedy.as_deref(), Some("wait"));
    }
}
