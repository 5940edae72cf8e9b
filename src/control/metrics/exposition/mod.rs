//! A snapshot in Prometheus' text format. docs/metrics.md has all of it in a table.

mod peers;
mod registry;
mod tunnel;
mod workers;

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use super::Snapshot;

/// What all names begin with.
const PREFIX: &str = "fastvpn";

/// A snapshot as it is served.
///
/// # Errors
/// When it cannot be written, for which there is no reason.
pub(super) fn to_text(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(snapshot));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let families = &mut Families(encoder);
        tunnel::write(families, self)?;
        workers::write(families, &self.status)?;
        peers::write(families, &self.peers, self.taken_at)?;
        match &self.status.registry {
            Some(registry) => registry::write(families, registry, self.taken_at),
            None => Ok(()),
        }
    }
}

/// What samples have in common.
struct Family {
    kind: MetricType,
    /// Without prefix, unit and `_total`.
    name: &'static str,
    unit: Option<Unit>,
    help: &'static str,
}

const BYTES: Option<Unit> = Some(Unit::Bytes);
const SECONDS: Option<Unit> = Some(Unit::Seconds);

/// What only grows while the process runs.
const fn counter(name: &'static str, unit: Option<Unit>, help: &'static str) -> Family {
    Family {
        kind: MetricType::Counter,
        name,
        unit,
        help,
    }
}

/// What goes up and down.
const fn gauge(name: &'static str, unit: Option<Unit>, help: &'static str) -> Family {
    Family {
        kind: MetricType::Gauge,
        name,
        unit,
        help,
    }
}

/// A sample's value.
#[derive(Clone, Copy)]
enum Value {
    Whole(u64),
    Real(f64),
}

/// A number.
fn whole(value: impl TryInto<u64>) -> Option<Value> {
    value.try_into().ok().map(Value::Whole)
}

/// Whether something is so.
fn flag(is_so: bool) -> Option<Value> {
    Some(Value::Whole(is_so.into()))
}

/// When something was that was so many seconds ago, in seconds since 1970.
fn timestamp(taken_at: SystemTime, seconds_ago: u64) -> Option<Value> {
    let at = taken_at.checked_sub(Duration::from_secs(seconds_ago))?;
    whole(at.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// Where families are written to.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    /// Writes a family, unless it has no samples.
    fn write<L: EncodeLabelSet>(
        &mut self,
        family: &Family,
        samples: impl IntoIterator<Item = (L, Option<Value>)>,
    ) -> fmt::Result {
        let samples = samples.into_iter();
        let mut samples = samples
            .filter_map(|(labels, value)| Some((labels, value?)))
            .peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let (kind, unit) = (family.kind, family.unit.as_ref());
        let mut encoder = self
            .0
            .encode_descriptor(family.name, family.help, unit, kind)?;
        for (labels, value) in samples {
            const NONE: Option<&Exemplar<NoLabelSet, f64>> = None;
            let mut encoder = encoder.encode_family(&labels)?;
            match (kind, value) {
                (MetricType::Counter, Value::Whole(value)) => {
                    encoder.encode_counter(&value, NONE)?;
                }
                (MetricType::Counter, Value::Real(value)) => {
                    encoder.encode_counter(&value, NONE)?;
                }
                (_, Value::Whole(value)) => encoder.encode_gauge(&value)?,
                (_, Value::Real(value)) => encoder.encode_gauge(&value)?,
            }
        }
        Ok(())
    }

    /// Writes a family of one sample without labels, if there is one.
    fn write_one(&mut self, family: &Family, value: Option<Value>) -> fmt::Result {
        self.write(family, [([("", ""); 0], value)])
    }
}

#[cfg(test)]
mod tests;
