//! What this host knows of the registry, and the peers that follow from it. Pure: what comes
//! from etcd is put in, and a snapshot is taken out.

mod extras;
mod peers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net};

use super::entry::{HostValue, Key, Keys, parse_extra};
use super::network::Network;
use crate::config::{PEERS_MAX, PeerId, PeerSpec};
use crate::wire::wireguard::keys::PublicKey;

/// How long hosts that another cluster, or an older state of the same one, does not know are
/// kept: a registry that was made anew, or restored from a backup, is filled again by the
/// hosts themselves.
pub(crate) const HOLD: Duration = Duration::from_secs(300);

/// Most hosts that are kept in mind, and most keys that cannot be read, with their length.
const ENTRIES_MAX: usize = 2 * PEERS_MAX;
const MALFORMED_MAX: usize = 10_000;
const KEY_BYTES_MAX: usize = 1024;

/// A key of etcd's with its value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pair {
    /// The key.
    pub(crate) key: Vec<u8>,
    /// The value.
    pub(crate) value: Vec<u8>,
    /// The revision at which it was made.
    pub(crate) create_revision: i64,
    /// The revision at which it was last changed.
    pub(crate) mod_revision: i64,
    /// The lease that it ends with; 0 for none.
    pub(crate) lease: i64,
}

/// A host in the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// What its value says.
    pub(crate) value: HostValue,
    /// The lease that its keys end with; 0 for none.
    pub(crate) lease: i64,
    /// The revision at which its key was last changed.
    pub(crate) mod_revision: i64,
}

/// What a host has besides its subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extra {
    prefixes: Vec<IpNet>,
    create_revision: i64,
    lease: i64,
}

/// Which hosts become peers.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// The network.
    pub(crate) network: Network,
    /// This host's address in the registry.
    pub(crate) own_ip: Ipv4Addr,
    /// This host's key, with the wireguard backend.
    pub(crate) own_key: Option<PublicKey>,
    /// Addresses that hosts may have; empty for all.
    pub(crate) allowed: Vec<IpNet>,
    /// What prefixes that hosts have besides their subnets have to be in; empty for none.
    pub(crate) allowed_prefixes: Vec<IpNet>,
    /// Addresses that none of these may cover, besides the hosts': etcd's, and this host's.
    pub(crate) reserved: BTreeSet<IpAddr>,
}

/// The peers that follow from the registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// By name, each with its prefixes in order.
    pub(crate) peers: BTreeMap<PeerId, Arc<PeerSpec>>,
    /// What is in the registry and was not used.
    pub(crate) unused: Unused,
}

/// Entries that were not used, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unused {
    /// Keys and values that cannot be read, and subnets of another length than the network's.
    pub(crate) malformed: usize,
    /// Hosts whose addresses are not in the list of those allowed.
    pub(crate) not_allowed: usize,
    /// Prefixes besides hosts' subnets that are not allowed, or cover an address that is needed
    /// to reach a host or etcd.
    pub(crate) prefixes_refused: usize,
    /// Subnets outside the network, prefixes of others, and hosts beyond what a tunnel can have.
    pub(crate) out_of_place: usize,
    /// Hosts with another backend, or without the key that this one needs.
    pub(crate) other_backend: usize,
}

/// A peer that was there before, and one that is there now: at least one of them.
pub(crate) type Change = (Option<Arc<PeerSpec>>, Option<Arc<PeerSpec>>);

impl Snapshot {
    /// What is different from the `old` snapshot. Takes time in proportion to both, and room
    /// in proportion to the difference.
    pub(crate) fn changes_since(&self, old: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut before = old.peers.iter().peekable();
        for (id, new) in &self.peers {
            while let Some((_, gone)) = before.next_if(|(other, _)| *other < id) {
                changes.push((Some(Arc::clone(gone)), None));
            }
            let was = before.next_if(|(other, _)| *other == id);
            match was.map(|(_, was)| was) {
                Some(was) if Arc::ptr_eq(was, new) || was == new => {}
                was => changes.push((was.cloned(), Some(Arc::clone(new)))),
            }
        }
        changes.extend(before.map(|(_, gone)| (Some(Arc::clone(gone)), None)));
        changes
    }
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct View {
    keys: Keys,
    cluster: u64,
    revision: i64,
    config: Option<Pair>,
    hosts: BTreeMap<Ipv4Net, Host>,
    extras: BTreeMap<Ipv4Net, Extra>,
    malformed: BTreeSet<Vec<u8>>,
    /// Hosts that the registry does not know any more, and until when they are kept.
    held: BTreeMap<Ipv4Net, (Host, Option<Extra>)>,
    hold_until: Option<Instant>,
}

impl View {
    /// Nothing is known yet.
    pub(crate) fn new(keys: Keys) -> Self {
        Self {
            keys,
            cluster: 0,
            revision: 0,
            config: None,
            hosts: BTreeMap::new(),
            extras: BTreeMap::new(),
            malformed: BTreeSet::new(),
            held: BTreeMap::new(),
            hold_until: None,
        }
    }

    /// The cluster that this was learned from; 0 for none yet.
    pub(crate) fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The revision that this is the state of.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    /// The value of the network's configuration.
    pub(crate) fn config(&self) -> Option<&[u8]> {
        self.config.as_ref().map(|pair| &pair.value[..])
    }

    /// The host with this subnet, as the registry has it now.
    pub(crate) fn host(&self, subnet: Ipv4Net) -> Option<&Host> {
        self.hosts.get(&subnet)
    }

    /// All hosts, as the registry has them now.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = (Ipv4Net, &Host)> {
        self.hosts.iter().map(|(subnet, host)| (*subnet, host))
    }

    /// Which subnets are taken, and by whom.
    pub(crate) fn taken(&self) -> BTreeMap<Ipv4Net, Ipv4Addr> {
        let hosts = self.hosts();
        hosts
            .map(|(subnet, host)| (subnet, host.value.public_ip))
            .collect()
    }

    /// The prefixes that the host with this subnet has besides.
    pub(crate) fn extra(&self, subnet: Ipv4Net) -> Option<&[IpNet]> {
        self.extras.get(&subnet).map(|extra| &extra.prefixes[..])
    }

    /// How many hosts are kept although the registry does not know them.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether a state of this cluster and revision cannot have followed from what is known.
    pub(crate) fn is_strange(&self, cluster: u64, revision: i64) -> bool {
        self.cluster != 0 && (cluster != self.cluster || revision < self.revision)
    }

    /// Takes in all of the registry. What a strange one does not know is held.
    pub(crate) fn replace(&mut self, pairs: Vec<Pair>, cluster: u64, revision: i64, now: Instant) {
        if self.is_strange(cluster, revision) {
            self.hold_until = Some(now + HOLD);
        }
        let mut new = Self {
            cluster,
            revision,
            hold_until: self.hold_until,
            held: std::mem::take(&mut self.held),
            ..Self::new(self.keys.clone())
        };
        // What cannot be read stays what it was.
        let mut unreadable = Vec::new();
        for pair in pairs {
            let key = new.keys.parse(&pair.key);
            if !new.put(pair) {
                unreadable.push(key);
            }
        }
        for key in unreadable {
            match key {
                Key::Subnet(subnet) => {
                    let old = self.hosts.remove_entry(&subnet);
                    new.hosts.extend(old);
                }
                Key::Extra(subnet) => new.extras.extend(self.extras.remove_entry(&subnet)),
                Key::Config | Key::Malformed | Key::Other => {}
            }
        }
        if new.hold_until.is_some() {
            let mut extras = std::mem::take(&mut self.extras);
            for (subnet, host) in std::mem::take(&mut self.hosts) {
                new.held.insert(subnet, (host, extras.remove(&subnet)));
            }
        }
        let hosts = &new.hosts;
        // One that has come back with another subnet is there.
        let back: BTreeSet<_> = hosts.values().map(|host| host.value.public_ip).collect();
        new.held.retain(|subnet, (host, _)| {
            !hosts.contains_key(subnet) && !back.contains(&host.value.public_ip)
        });
        *self = new;
    }

    /// Takes in a key's new value. Returns whether it could be read; if not, what was known
    /// of the key before stands.
    pub(crate) fn put(&mut self, pair: Pair) -> bool {
        self.revision = self.revision.max(pair.mod_revision);
        let key = self.keys.parse(&pair.key);
        let is_read = match key {
            Key::Other => return true,
            Key::Malformed => false,
            Key::Config => {
                self.config = Some(pair.clone());
                true
            }
            // Memory is bounded, whatever is written.
            Key::Subnet(subnet) if is_beyond(&self.hosts, subnet) => false,
            Key::Extra(subnet) if is_beyond(&self.extras, subnet) => false,
            Key::Subnet(subnet) => match HostValue::parse(&pair.value) {
                Some(value) => {
                    self.held.retain(|held, (host, _)| {
                        *held != subnet && host.value.public_ip != value.public_ip
                    });
                    let host = Host {
                        value,
                        lease: pair.lease,
                        mod_revision: pair.mod_revision,
                    };
                    self.hosts.insert(subnet, host);
                    true
                }
                None => false,
            },
            Key::Extra(subnet) => match parse_extra(&pair.value) {
                Some(prefixes) => {
                    let extra = Extra {
                        prefixes,
                        create_revision: pair.create_revision,
                        lease: pair.lease,
                    };
                    self.extras.insert(subnet, extra);
                    true
                }
                None => false,
            },
        };
        if is_read {
            self.malformed.remove(&pair.key);
        } else if self.malformed.len() < MALFORMED_MAX && pair.key.len() <= KEY_BYTES_MAX {
            self.malformed.insert(pair.key);
        }
        is_read
    }

    /// Takes in a key by itself. What happened to others before that is still to be seen, so
    /// the revision stays.
    pub(crate) fn learn(&mut self, pair: Pair) {
        let revision = self.revision;
        self.put(pair);
        self.revision = revision;
    }

    /// Takes in that a key is gone.
    pub(crate) fn delete(&mut self, key: &[u8], revision: i64) {
        self.revision = self.revision.max(revision);
        self.malformed.remove(key);
        match self.keys.parse(key) {
            Key::Config => self.config = None,
            Key::Subnet(subnet) => drop(self.hosts.remove(&subnet)),
            Key::Extra(subnet) => drop(self.extras.remove(&subnet)),
            Key::Malformed | Key::Other => {}
        }
    }

    /// Notes that nothing more has happened up to this revision.
    pub(crate) fn note_revision(&mut self, revision: i64) {
        self.revision = self.revision.max(revision);
    }

    /// Keeps the hosts that are held for as long once more: they can come back only from when
    /// the registry can be used.
    pub(crate) fn hold_again(&mut self, now: Instant) {
        self.hold_until = self.hold_until.map(|_| now + HOLD);
    }

    /// Lets the hosts go that were held long enough. Returns whether there were any.
    pub(crate) fn release(&mut self, now: Instant) -> bool {
        if self.hold_until.is_none_or(|until| now < until) {
            return false;
        }
        self.hold_until = None;
        !std::mem::take(&mut self.held).is_empty()
    }

    /// All of it, to be read again by [`Self::replace`]; what is held, too.
    pub(crate) fn pairs(&self) -> Vec<Pair> {
        let live = self.hosts.iter();
        let live = live.map(|(subnet, host)| (subnet, host, self.extras.get(subnet)));
        let held = self.held.iter();
        let held = held.map(|(subnet, (host, extra))| (subnet, host, extra.as_ref()));
        let mut pairs: Vec<Pair> = self.config.iter().cloned().collect();
        for (subnet, host, extra) in live.chain(held) {
            pairs.push(Pair {
                key: self.keys.subnet(*subnet).into(),
                value: host.value.to_json().into(),
                mod_revision: host.mod_revision,
                lease: host.lease,
                ..Pair::default()
            });
            pairs.extend(extra.map(|extra| Pair {
                key: self.keys.extra(*subnet).into(),
                value: super::entry::extra_to_json(&extra.prefixes).into(),
                create_revision: extra.create_revision,
                lease: extra.lease,
                ..Pair::default()
            }));
        }
        pairs
    }
}

/// Whether an entry is new, and there are enough of them.
fn is_beyond<T>(entries: &BTreeMap<Ipv4Net, T>, subnet: Ipv4Net) -> bool {
    entries.len() >= ENTRIES_MAX && !entries.contains_key(&subnet)
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
