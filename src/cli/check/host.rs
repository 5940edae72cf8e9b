//! Kernel parameters that concern a tunnel and are the host's own business.

use super::item::Item;
use super::read;

/// What was found; `None` where the parameter does not show here.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    backlog: Option<String>,
    forwarding: Option<String>,
    congestion_control: Option<String>,
    /// `rp_filter` for all interfaces and for the one toward the peer: the
    /// larger counts (`ip-sysctl.rst` in the kernel tree).
    reverse_path: [Option<String>; 2],
    interface: Option<String>,
}

/// Reads it all; never waits.
pub fn probe(interface: Option<&str>) -> Facts {
    let reverse_path = |of: &str| read::sysctl(&format!("net/ipv4/conf/{of}/rp_filter"));
    Facts {
        backlog: read::sysctl("net/core/netdev_max_backlog"),
        forwarding: read::sysctl("net/ipv4/ip_forward"),
        congestion_control: read::sysctl("net/ipv4/tcp_congestion_control"),
        reverse_path: [reverse_path("all"), interface.and_then(reverse_path)],
        interface: interface.map(String::from),
    }
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    let plain = |name, value: &Option<String>, unit: &str| match value {
        Some(value) => Item::info(name, format!("{value}{unit}")),
        None => Item::info(name, "does not show in this network namespace"),
    };
    vec![
        plain("netdev_max_backlog", &facts.backlog, " packets per core"),
        forwarding(facts.forwarding.as_deref()),
        plain("tcp_congestion_control", &facts.congestion_control, ""),
        reverse_path(facts),
    ]
}

fn forwarding(value: Option<&str>) -> Item {
    const NAME: &str = "ip_forward";
    match value {
        Some("0") => Item::info(
            NAME,
            "0; to reach containers behind this host: sysctl -w net.ipv4.ip_forward=1",
        ),
        Some(value) => Item::info(NAME, value),
        None => Item::info(NAME, "does not show here"),
    }
}

fn reverse_path(facts: &Facts) -> Item {
    const NAME: &str = "rp_filter";
    let values = facts.reverse_path.iter().flatten();
    let Some(value) = values.filter_map(|text| text.parse::<u8>().ok()).max() else {
        return Item::info(NAME, "does not show here");
    };
    let on = match &facts.interface {
        Some(interface) => format!(" on {interface}"),
        None => String::new(),
    };
    match value {
        0 => Item::info(NAME, format!("0{on}: off")),
        1 => Item::info(NAME, format!("1{on}: strict")).costing(
            "datagrams that come in by another interface than answers would leave by are dropped",
            format!(
                "if the routes are asymmetric: sysctl -w net.ipv4.conf.{}.rp_filter=2",
                facts.interface.as_deref().unwrap_or("all")
            ),
        ),
        _ => Item::info(NAME, format!("{value}{on}: loose")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_filter_counts() {
        let found = |all: &str, own: &str| {
            reverse_path(&Facts {
                reverse_path: [Some(all.into()), Some(own.into())],
                interface: Some("eth0".into()),
                ..Facts::default()
            })
        };
        assert_eq!(found("0", "0").found, "0 on eth0: off");
        assert_eq!(found("1", "2").found, "2 on eth0: loose");
        let strict = found("1", "0");
        assert_eq!(strict.found, "1 on eth0: strict");
        assert!(strict.remedy.unwrap().contains("eth0.rp_filter=2"));
    }

    #[test]
    fn what_does_not_show_is_no_reason_to_stop() {
        let items = items(&Facts::default());
        assert_eq!(items.len(), 4);
        assert!(
            items
                .iter()
                .all(|item| item.found.contains("does not show"))
        );
    }
}
