//! What watches tunnels: the dashboard and the alerts in `monitoring/`, against a tunnel that
//! has all metrics that there are, and with the programs that read them.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use serde_json::Value;
use testbed::program::{PROMETHEUS, PROMTOOL};
use testbed::{Namespace, configure};

use super::metrics::{PORT, Scrape, request, scrape};
use crate::registry::network::{Member, Network};
use crate::support::{check, fail, stop, tried, udp, wait_for, wait_until};

const DASHBOARD: &str = "monitoring/grafana-dashboard.json";
const ALERTS: &str = "monitoring/alerts.yml";
const ALERTS_TEST: &str = "monitoring/alerts-test.yml";

/// Where Prometheus listens.
const PROMETHEUS_PORT: u16 = 9090;

/// Hosts with keys in a registry, of which the first one serves metrics: all that there can
/// be are there.
struct Everything {
    network: Network,
    near: Member,
    far: Member,
    /// Sends to the near one what it drops.
    stray: UdpSocket,
}

impl Everything {
    fn new() -> Result<Self> {
        let config = r#"{"Network":"10.50.0.0/16","Backend":{"Type":"wireguard"}}"#;
        let network = Network::with_config(2, config)?;
        let near = network.join(0, &format!("--metrics {PORT}"))?;
        let far = network.join(1, "")?;
        wait_for(network.host(0), far.address()?)?;
        // What the peer may not send from.
        let stray = Ipv4Addr::new(172, 31, 0, 1);
        let net = IpNet::new_assert(stray.into(), 32);
        configure(network.host(1), "lo", &[net], 65_536)?;
        let stray = udp(network.host(1), stray, 0)?;
        tried("connect", stray.connect((near.address()?, 9)))?;
        let key = far.operator.ask("status")?["public_key"].clone();
        let everything = Self {
            network,
            near,
            far,
            stray,
        };
        let labels = [
            ("peer", key.as_str().unwrap_or_default()),
            ("reason", "source_not_allowed"),
        ];
        wait_until("a drop is counted, and the peer is known", || {
            everything.send_stray()?;
            let scrape = everything.scrape()?;
            let is_known = scrape.get("peer_path_mtu_bytes", &labels[..1]).is_some()
                && scrape.names().contains("fastvpn_peer_state");
            Ok(is_known && scrape.get("peer_dropped_packets_total", &labels) > Some(0.0))
        })?;
        Ok(everything)
    }

    /// The far one is heard of.
    fn send_stray(&self) -> Result<()> {
        tried("send", self.stray.send(b"hello")).map(drop)
    }

    fn host(&self) -> &Namespace {
        self.network.host(0)
    }

    fn scrape(&self) -> Result<Scrape> {
        scrape(self.host())
    }

    fn end(self) -> Result<()> {
        stop(self.near.tunnel)?;
        stop(self.far.tunnel).map(drop)
    }
}

/// A file of this project's.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn text(name: &str) -> Result<String> {
    tried(&format!("read {name}"), std::fs::read_to_string(path(name)))
}

/// The queries of the dashboard, for a host and peers of any name.
fn queries() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(&text(DASHBOARD)?)
        .map_err(|error| Error::new(format!("{DASHBOARD}: {error}")))?;
    let panels = dashboard["panels"].as_array().into_iter().flatten();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let queries = targets.filter_map(|target| target["expr"].as_str());
    let queries = queries.map(|query| {
        query
            .replace("$__rate_interval", "30s")
            .replace("$instance", ".*")
            .replace("$peer", ".*")
    });
    Ok(queries.collect())
}

/// The names of metrics in a text.
fn names_in(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_part(c));
    words.filter(|word| word.starts_with("fastvpn_")).collect()
}

/// Dashboard, alerts and documentation name what is there, and nothing else.
#[testbed::trial(etcd)]
fn what_is_watched_is_there() -> Result<()> {
    let everything = Everything::new()?;
    let scrape = everything.scrape()?;
    let there = scrape.names();
    for name in [DASHBOARD, ALERTS] {
        let text = text(name)?;
        let watched = names_in(&text);
        check(watched.len() > 5, || format!("{name} watches {watched:?}"))?;
        let missing: Vec<_> = watched.difference(&there).collect();
        check(missing.is_empty(), || {
            format!("{name}: there is no {missing:?}")
        })?;
    }
    let page = text("docs/metrics.md")?;
    let rows = page.lines().filter(|line| line.starts_with("| `fastvpn_"));
    let documented: BTreeSet<_> = rows.filter_map(|row| row.split('`').nth(1)).collect();
    check(documented == there, || {
        format!("documented: {documented:?}, there: {there:?}")
    })?;
    check(queries()?.len() > 20, || "no queries".into())?;
    for (key, name) in [
        ("revision", "registry_revision"),
        ("hosts", "registry_hosts"),
        ("connections", "registry_connections_total"),
        ("lease_ttl_seconds", "registry_lease_ttl_seconds"),
    ] {
        // A page may be a second old.
        wait_until(&format!("{name} is what the status says"), || {
            let value = everything.scrape()?.get(name, &[]);
            Ok(value > Some(0.0) && value == everything.near.status()?[key].as_f64())
        })?;
    }
    let is = |name: &str| scrape.get(name, &[]);
    check(
        is("registry_connected") == Some(1.0) && is("registry_events_total") > Some(0.0),
        || scrape.text.clone(),
    )?;
    everything.end()
}

/// Prometheus' own judgement of format, names and rules, and which alerts fire for what.
#[testbed::trial(long, promtool, etcd)]
fn promtool_finds_nothing() -> Result<()> {
    let run = |words: &[&str], input: &str| -> Result<()> {
        let mut command = PROMTOOL.command()?;
        command.args(words).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = tried("start promtool", command.spawn())?;
        if let Some(mut stdin) = child.stdin.take() {
            tried("write", stdin.write_all(input.as_bytes()))?;
        }
        let said = tried("wait for promtool", child.wait_with_output())?;
        let text = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
        check(said.status.success(), || {
            format!("promtool {words:?}: {text}")
        })
    };
    let everything = Everything::new()?;
    run(&["check", "metrics"], &everything.scrape()?.text)?;
    run(&["check", "rules", &path(ALERTS).display().to_string()], "")?;
    let test = path(ALERTS_TEST).display().to_string();
    run(&["test", "rules", &test], "")?;
    everything.end()
}

/// What Prometheus answers to a request of its API.
fn ask(host: &Namespace, target: &str) -> Result<Value> {
    let text = format!("GET /api/v1/{target} HTTP/1.0\r\n\r\n");
    let answer = tried("ask Prometheus", request(host, PROMETHEUS_PORT, &text))?;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    serde_json::from_str(body).map_err(|error| Error::new(format!("{target}: {error}: {answer}")))
}

/// How many series a query has.
fn series(host: &Namespace, query: &str) -> Result<usize> {
    let escaped: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let answer = ask(host, &format!("query?query={escaped}"))?;
    check(answer["status"] == "success", || {
        format!("{query}: {answer}")
    })?;
    Ok(answer["data"]["result"].as_array().map_or(0, Vec::len))
}

/// Each query of the dashboard has an answer, and each rule can be evaluated.
#[testbed::trial(long, promtool, etcd)]
fn prometheus_answers_the_dashboard() -> Result<()> {
    let everything = Everything::new()?;
    let (host, operator) = (everything.host(), &everything.near.operator);
    let config = format!(
        "global:\n  scrape_interval: 1s\n  evaluation_interval: 1s\n\
         rule_files: [{:?}]\n\
         scrape_configs:\n  - job_name: fastvpn\n    static_configs:\n      \
         - targets: [\"127.0.0.1:{PORT}\"]\n",
        path(ALERTS)
    );
    let config = operator.write("prometheus.yml", &config)?;
    let mut command: Command = PROMETHEUS.command()?;
    command
        .arg(format!("--config.file={config}"))
        .arg(format!(
            "--storage.tsdb.path={}",
            operator.path("tsdb").display()
        ))
        .arg(format!("--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}"))
        .args(["--log.level=error"]);
    let prometheus = host.spawn(command)?;
    wait_until("Prometheus has scraped twice", || {
        let count = series(host, "rate(fastvpn_worker_sent_packets_total[30s])");
        Ok(count.is_ok_and(|count| count > 0))
    })?;
    for query in queries()? {
        wait_until(&format!("{query} has an answer"), || {
            everything.send_stray()?;
            // What is compared has one only while it is so.
            Ok(series(host, &query)? > 0 || query.contains("> 0"))
        })?;
    }
    let mut rules = Value::Null;
    wait_until("all rules have been evaluated", || {
        rules = ask(host, "rules")?;
        let text = rules.to_string();
        Ok(text.contains("\"health\"") && !text.contains("\"health\":\"unknown\""))
    })?;
    if rules.to_string().contains("\"health\":\"err\"") {
        return fail(format!("{rules}"));
    }
    drop(prometheus);
    everything.end()
}
