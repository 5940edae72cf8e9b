//! `status --watch`: under traffic, across a takeover, until the tunnel ends.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};

use fastvpn::error::{Error, Result};
use serde_json::Value;
use testbed::{Child, Namespace};

use crate::daemon::takeover::Stage;
use crate::operator::Operator;
use crate::site::tunnel;
use crate::support::{FASTVPN, check, fail, tried, wait_until};
use crate::tools::{Stream, wait_for_line};

/// A command that goes on, and its output.
struct Watcher {
    child: Child,
    lines: BufReader<Box<dyn Read + Send>>,
    _desk: Namespace,
}

impl Watcher {
    /// Starts `fastvpn status --watch WORDS` about an operator's tunnel.
    fn start(operator: &Operator, words: &[&str]) -> Result<Self> {
        let mut command = Command::new(FASTVPN);
        command.args(["status", "--watch"]).args(words);
        command.arg("--control").arg(operator.socket());
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let desk = Namespace::new()?;
        let mut child = desk.spawn(command)?;
        let Some(stdout) = child.process().stdout.take() else {
            return fail("no standard output");
        };
        Ok(Self {
            child,
            lines: BufReader::new(Box::new(stdout)),
            _desk: desk,
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        tried("read a line", self.lines.read_line(&mut line))?;
        check(line.ends_with('\n'), || format!("cut short: {line:?}"))?;
        Ok(line)
    }

    /// The first line that has this part.
    fn line_with(&mut self, part: &str) -> Result<String> {
        wait_for_line(&mut self.lines, part)
    }

    fn object(&mut self) -> Result<Value> {
        let line = self.line()?;
        serde_json::from_str(&line).map_err(|error| Error::new(format!("{error}: {line}")))
    }

    /// How it ends by itself, and what it says then.
    fn end(mut self) -> Result<(ExitStatus, String)> {
        let mut status = None;
        wait_until("the watch ends", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        let mut said = String::new();
        if let Some(stderr) = self.child.process().stderr.as_mut() {
            tried("read standard error", stderr.read_to_string(&mut said))?;
        }
        status.map_or_else(|| fail("it goes on"), |status| Ok((status, said)))
    }
}

/// What a rate is in an answer that has them.
fn rate(object: &Value, name: &str) -> Result<f64> {
    let rate = object["rates"][name].as_f64();
    rate.map_or_else(|| fail(format!("no {name} in {object}")), Ok)
}

#[testbed::trial(each_engine)]
fn a_watch_shows_rates_and_survives_a_takeover() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let operator = &stage.operator;
    let stream = Stream::start(&stage.near().host, &stage.far().host, tunnel(2)[0])?;
    stream.wait_for_progress()?;
    let mut text = Watcher::start(operator, &[])?;
    let mut json = Watcher::start(operator, &["1", "--json"])?;
    // Patient, but not when the tunnel ends.
    let slow = Watcher::start(operator, &["86400"])?;

    let line = text.line_with("Mbit/s")?;
    check(
        line.contains("Z  sent ") && line.contains("dropped "),
        || line.clone(),
    )?;
    let object = json.object()?;
    let (seconds, bits) = (
        rate(&object, "interval_seconds")?,
        rate(&object, "bits_sent_per_second")?,
    );
    let packets = rate(&object, "packets_sent_per_second")?;
    let total = object["counters"]["packets_sent"].as_f64().unwrap_or(0.0);
    check(
        object["ok"] == true && seconds > 0.9 && bits > 1e6 && packets > 0.0,
        || object.to_string(),
    )?;
    // As many as there are, and no more: 1472 bytes are the most in a packet.
    let is_plausible = packets * seconds <= 1.01 * total && bits <= packets * 8.0 * 1472.0 + 1.0;
    check(is_plausible, || object.to_string())?;

    let old = near.pid();
    let (near, _) = stage.take_over(near, &[])?;
    let new = near.pid();
    text.line_with(&format!("now process {new}, before {old}"))?;
    text.line_with("Mbit/s")?;
    wait_until("the new process is in the objects", || {
        let object = json.object()?;
        let is_new = object["pid"] == new;
        let total = object["counters"]["packets_sent"].as_f64().unwrap_or(0.0);
        let packets = rate(&object, "packets_sent_per_second")?;
        let seconds = rate(&object, "interval_seconds")?;
        // Never from the old one's counters to the new one's.
        check(
            (is_new || object["pid"] == old) && packets * seconds <= 1.01 * total + 1.0,
            || object.to_string(),
        )?;
        Ok(is_new)
    })?;

    stream.finish()?;
    near.stop()?;
    for watcher in [text, json, slow] {
        let (status, said) = watcher.end()?;
        let is_clear = said == "fastvpn: tunnel fastvpn0 has ended\n";
        check(status.code() == Some(1) && is_clear, || {
            format!("{status}: {said:?}")
        })?;
    }
    far.stop().map(drop)
}

#[testbed::trial]
fn a_watch_ends_when_nobody_reads_it() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let mut watcher = Watcher::start(&stage.operator, &[])?;
    watcher.line()?;
    watcher.lines = BufReader::new(Box::new(std::io::empty()));
    let (status, said) = watcher.end()?;
    check(status.success() && said.is_empty(), || {
        format!("{status}: {said}")
    })?;
    near.stop()?;
    far.stop()?;
    let said = stage.operator.run(&["status", "--watch"])?;
    crate::operator::is_refusal(&said, &["no fastvpn answers at"])
}
