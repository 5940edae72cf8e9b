//! How the registry is doing, where there is one.

use std::fmt;
use std::time::SystemTime;

use super::{Families, Family, SECONDS, Value, counter, flag, gauge, timestamp, whole};
use crate::control::protocol::RegistryStatus;

/// What a snapshot of a certain time says of it.
type Read = fn(&RegistryStatus, SystemTime) -> Option<Value>;

static NUMBERS: [(Family, Read); 10] = [
    (
        gauge(
            "registry_connected",
            None,
            "Whether this host is connected to etcd.",
        ),
        |registry, _| flag(registry.is_connected),
    ),
    (
        gauge(
            "registry_alarm",
            None,
            "Whether somebody has to do something about the registry.",
        ),
        |registry, _| flag(registry.alarm.is_some()),
    ),
    (
        gauge(
            "registry_config_changed",
            None,
            "Whether the network's configuration is not the one that this host runs by.",
        ),
        |registry, _| flag(registry.is_config_changed),
    ),
    (
        gauge(
            "registry_revision",
            None,
            "The last revision of etcd that is known.",
        ),
        |registry, _| whole(registry.revision),
    ),
    (
        gauge(
            "registry_hosts",
            None,
            "Hosts in the registry, this one among them.",
        ),
        |registry, _| whole(registry.hosts),
    ),
    (
        gauge(
            "registry_held_hosts",
            None,
            "Hosts that are kept although the registry does not know them.",
        ),
        |registry, _| whole(registry.held),
    ),
    (
        gauge(
            "registry_lease_ttl",
            SECONDS,
            "How long this host's lease lasts after it is renewed.",
        ),
        |registry, _| whole(registry.lease_ttl_seconds?),
    ),
    (
        gauge(
            "registry_lease_renewed_timestamp",
            SECONDS,
            "When this host's lease was last renewed.",
        ),
        |registry, taken_at| timestamp(taken_at, registry.lease_renewed_seconds?),
    ),
    (
        counter(
            "registry_connections",
            None,
            "Connections to etcd that this host has made and listed the registry by.",
        ),
        |registry, _| whole(registry.connections),
    ),
    (
        counter(
            "registry_events",
            None,
            "Changes of keys that etcd has reported.",
        ),
        |registry, _| whole(registry.events),
    ),
];

static UNUSED: Family = gauge(
    "registry_unused_entries",
    None,
    "What is in the registry and is not used, by reason.",
);

/// Writes it all.
pub(super) fn write(
    families: &mut Families<'_>,
    registry: &RegistryStatus,
    taken_at: SystemTime,
) -> fmt::Result {
    for (family, read) in &NUMBERS {
        families.write_one(family, read(registry, taken_at))?;
    }
    let unused = [
        ("malformed", registry.malformed),
        ("not_allowed", registry.not_allowed),
        ("out_of_place", registry.out_of_place),
        ("other_backend", registry.other_backend),
    ];
    let unused = unused.map(|(reason, count)| ([("reason", reason)], whole(count)));
    families.write(&UNUSED, unused)
}
