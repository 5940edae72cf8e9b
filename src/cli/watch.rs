//! `fastvpn status --watch`: a line every few seconds, for logs and scripts.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use super::poller::{Poller, is_gone};
use super::rates::{Rates, Totals, drops_by_reason, is_same_process, seconds_between};
use super::units;
use crate::control::client::{Verdict, parse};
use crate::control::protocol::{Request, Status};
use crate::control::summary::bytes;
use crate::control::text::{printable, printable_json};
use crate::error::{Error, Result};

/// How long a tunnel may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// An answer to `status`.
struct Sample {
    /// As it came.
    line: String,
    status: Status,
    /// When it came.
    arrival: Instant,
}

/// Asks again and again, until nobody reads any more.
///
/// # Errors
/// When the tunnel ends, or does not answer as it should.
pub(super) fn run(path: &Path, every: Duration, json: bool, out: &mut impl Write) -> Result<()> {
    let mut poller = Poller::new(path.to_path_buf(), PATIENCE);
    let mut before = sample(&mut poller, path)?;
    let mut due = before.arrival + every;
    loop {
        let waited = poller.wait(due);
        let after = waited.and_then(|()| sample(&mut poller, path));
        let after = after.map_err(|error| ended(&before.status, error))?;
        let text = match json {
            true => object(&before, &after, path)?,
            false => Some(line(&before, &after)),
        };
        match text.map_or(Ok(()), |text| write(out, &text)) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => {
                written.map_err(|error| Error::os("cannot write to standard output", error))?
            }
        }
        due = (due + every).max(after.arrival);
        before = after;
    }
}

fn sample(poller: &mut Poller, path: &Path) -> Result<Sample> {
    let line = poller.ask(&Request::Status {})?;
    let arrival = Instant::now();
    parse::<Verdict>(&line, path)?.check()?;
    let status = parse(&line, path)?;
    Ok(Sample {
        line,
        status,
        arrival,
    })
}

/// Says so if the tunnel that was there is gone.
fn ended(last: &Status, error: Error) -> Error {
    match is_gone(&error) {
        true => Error::new(format!("tunnel {} has ended", printable(&last.tun))),
        false => error,
    }
}

fn write(out: &mut impl Write, text: &str) -> io::Result<()> {
    writeln!(out, "{text}")?;
    out.flush()
}

/// Seconds between two answers of one process, and what happened in each.
fn rates(before: &Sample, after: &Sample) -> Option<(f64, Rates)> {
    if !is_same_process(&before.status, &after.status) {
        return None;
    }
    let elapsed = after.arrival - before.arrival;
    let (from, to) = (before.status.boottime_ns, after.status.boottime_ns);
    let seconds = seconds_between(from, to, elapsed)?;
    let rates = Rates::of_tunnel(&before.status, &after.status, seconds);
    Some((seconds, rates))
}

/// Drops per second, by those reasons for which there were some.
fn drop_rates(before: &Sample, after: &Sample, seconds: f64) -> Vec<(String, f64)> {
    let drops = drops_by_reason(Some((&before.status, seconds)), &after.status);
    let rates = drops
        .into_iter()
        .filter_map(|it| Some((it.reason, it.rate?)));
    rates.filter(|(_, rate)| *rate > 0.0).collect()
}

/// Rates and totals as a person reads them.
fn line(before: &Sample, after: &Sample) -> String {
    let Some((seconds, rates)) = rates(before, after) else {
        let (old, new) = (before.status.pid, after.status.pid);
        let what = format!("now process {new}, before {old}: its counters begin at 0");
        return format!("{}  {what}", now());
    };
    let totals = Totals::of_tunnel(&after.status);
    let one_way = |what: &str, packets: f64, bits: f64, all: u64, all_bytes: u64| {
        format!(
            "{what} {}, {} ({}, {})",
            units::per_second(packets).replace("/s", " packets/s"),
            units::bits_per_second(bits),
            units::counted(all, "packet"),
            bytes(all_bytes)
        )
    };
    let mut dropped = format!(
        "dropped {} ({})",
        units::per_second(rates.drops),
        totals.drops
    );
    for (reason, rate) in drop_rates(before, after, seconds) {
        let reason = printable(&reason.replace('_', "-"));
        dropped += &format!(", {reason} {}", units::per_second(rate));
    }
    [
        now(),
        one_way(
            "sent",
            rates.packets_sent,
            rates.bits_sent,
            totals.packets_sent,
            totals.bytes_sent,
        ),
        one_way(
            "received",
            rates.packets_received,
            rates.bits_received,
            totals.packets_received,
            totals.bytes_received,
        ),
        dropped,
    ]
    .join("  ")
}

/// The answer, with `time` and `rates`. None if there are no rates, as after a takeover.
///
/// # Errors
/// When the answer is not an object.
fn object(before: &Sample, after: &Sample, path: &Path) -> Result<Option<String>> {
    let Some((seconds, rates)) = rates(before, after) else {
        return Ok(None);
    };
    let drops = drop_rates(before, after, seconds).into_iter();
    let drops: Map<_, _> = drops
        .map(|(reason, rate)| (reason, rounded(rate)))
        .collect();
    let mut object: Map<String, Value> = parse(&after.line, path)?;
    object.insert("time".into(), now().into());
    object.insert(
        "rates".into(),
        json!({
            "interval_seconds": rounded(seconds),
            "packets_sent_per_second": rounded(rates.packets_sent),
            "bits_sent_per_second": rounded(rates.bits_sent),
            "packets_received_per_second": rounded(rates.packets_received),
            "bits_received_per_second": rounded(rates.bits_received),
            "drops_per_second": rounded(rates.drops),
            "drops_by_reason_per_second": drops,
        }),
    );
    Ok(Some(printable_json(&Value::Object(object).to_string())))
}

/// To thousandths.
fn rounded(rate: f64) -> Value {
    ((rate * 1e3).round() / 1e3).into()
}

/// The time as log lines have it.
fn now() -> String {
    let mut text = String::new();
    // A string takes all that is written.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer at this time, with so many packets of 1000 bytes sent, and so many drops.
    fn a_sample(pid: u32, boottime_ns: u64, packets: u64, drops: u64) -> Sample {
        let line = json!({
            "ok": true, "version": "0.1.0", "pid": pid, "uptime_seconds": 7,
            "boottime_ns": boottime_ns, "tun": "fastvpn0", "addresses": [], "mtu_bytes": 1472,
            "listen": "0.0.0.0:8285", "engine": "epoll", "offloads": "", "hop": false,
            "keeps_routes": true, "config_file": null, "reload_error": null, "peers": 1,
            "prefixes": 1, "tun_queue_drops": 0, "workers": [],
            "counters": {"packets_sent": packets, "bytes_sent": 1000 * packets},
            "drops": {"queue_aqm": drops, "no_route": 12},
        });
        Sample {
            status: serde_json::from_value(line.clone()).unwrap(),
            line: line.to_string(),
            arrival: Instant::now(),
        }
    }

    /// Without its time.
    fn shown(before: &Sample, after: &Sample) -> String {
        let line = line(before, after);
        let (time, rest) = line.split_once("  ").unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
        rest.into()
    }

    #[test]
    fn a_line_has_rates_and_totals() {
        let (before, after) = (
            a_sample(1, 1_000_000_000, 1_000_000, 340),
            a_sample(1, 3_000_000_000, 1_003_000, 341),
        );
        assert_eq!(
            shown(&before, &after),
            "sent 1.5 k packets/s, 12.0 Mbit/s (1.0 M packets, 1.0 GB)  \
             received 0 packets/s, 0 bit/s (0 packets, 0 B)  \
             dropped 0.5/s (353), queue-aqm 0.5/s"
        );
        let object = object(&before, &after, Path::new("x")).unwrap().unwrap();
        let object: Value = serde_json::from_str(&object).unwrap();
        assert_eq!(object["counters"]["packets_sent"], 1_003_000);
        let rates = &object["rates"];
        assert_eq!(rates["interval_seconds"], 2.0);
        assert_eq!(rates["bits_sent_per_second"], 12_000_000.0);
        assert_eq!(
            rates["drops_by_reason_per_second"],
            json!({"queue_aqm": 0.5})
        );
    }

    #[test]
    fn there_are_no_rates_between_two_processes() {
        let (before, after) = (a_sample(1, 1, 1_000_000, 0), a_sample(2, 2, 5, 0));
        let said = "now process 2, before 1: its counters begin at 0";
        assert_eq!(shown(&before, &after), said);
        assert!(object(&before, &after, Path::new("x")).unwrap().is_none());
    }

    #[test]
    fn nothing_is_shown_raw() {
        let mut after = a_sample(1, 2, 0, 0);
        after.status.drops.insert("\x1b[2J".into(), 1);
        let shown = shown(&a_sample(1, 1, 0, 0), &after);
        assert!(!shown.chars().any(char::is_control), "{shown:?}");
    }
}
