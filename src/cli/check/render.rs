//! Items as a table for people and as JSON for programs.

use std::fmt::Write;

use super::item::{Item, STATUS_WIDTH, Status, can_run};

/// An array of objects, one per item, and a line end.
pub fn json(items: &[Item]) -> String {
    // Strings and options of strings always serialize.
    let mut text = serde_json::to_string_pretty(items).unwrap_or_else(|_| "[]".into());
    text.push('\n');
    text
}

/// A line per item, what it costs and how to mend it below where there is
/// something, and what it comes to at the end.
pub fn table(items: &[Item], colour: bool) -> String {
    let width = |item: &Item| item.name.chars().count();
    let name_width = items.iter().map(width).max().unwrap_or(0);
    let indent = STATUS_WIDTH + 2 + name_width + 2;
    let mut text = String::new();
    // Writing to a string cannot fail.
    for item in items {
        let Item { name, found, .. } = item;
        let status = format!("{:<STATUS_WIDTH$}", item.status);
        let status = painted(&status, paint(item.status), colour);
        let _ = writeln!(text, "{status}  {name:<name_width$}  {found}");
        for (label, remark) in [("cost: ", &item.cost), ("mend: ", &item.remedy)] {
            if let Some(remark) = remark {
                let _ = writeln!(text, "{:indent$}{label}{remark}", "");
            }
        }
    }
    let verdict = verdict(items);
    let paint = paint(if can_run(items) {
        Status::Ok
    } else {
        Status::Missing
    });
    let _ = writeln!(text, "\n{}", painted(&verdict, paint, colour));
    text
}

fn verdict(items: &[Item]) -> String {
    let of = |status| {
        let of_status = items.iter().filter(move |item| item.status == status);
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

/// SGR parameters (ECMA-48, 8.3.117).
fn paint(status: Status) -> &'static str {
    match status {
        Status::Ok => "32",
        Status::Info => "36",
        Status::Degraded => "33",
        Status::Missing => "1;31",
        Status::Unknown => "35",
    }
}

fn painted(text: &str, paint: &str, colour: bool) -> String {
    if colour {
        format!("\x1b[{paint}m{text}\x1b[0m")
    } else {
        text.into()
    }
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
                      mend: Linux 6.2
unknown   UDP_GRO     not probed: no loopback

fastvpn can run here; degraded: TUN USO; not probed: UDP_GRO.
";
        assert_eq!(table(&items(), false), expected.trim_start_matches('\n'));
    }

    #[test]
    fn colour_changes_nothing_else() {
        let coloured = table(&items(), true);
        assert!(coloured.starts_with("\x1b[32mok      \x1b[0m  kernel"));
        let mut plain = coloured;
        for paint in ["32", "36", "33", "1;31", "35", "0"] {
            plain = plain.replace(&format!("\x1b[{paint}m"), "");
        }
        assert_eq!(plain, table(&items(), false));
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
        let text = table(&items, false);
        assert!(
            text.ends_with("\nfastvpn cannot run here: CAP_NET_ADMIN.\n"),
            "{text}"
        );
        let good = [Item::ok("kernel", "new")];
        assert!(table(&good, false).ends_with("with all it can use.\n"));
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
