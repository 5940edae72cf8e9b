//! This host's own keys in the registry: claimed, kept, and claimed again.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Instant;

use ipnet::{IpNet, Ipv4Net};

use super::{End, Own, Worker};
use crate::error::{Error, Result};
use crate::registry::claim::{self, Claim};
use crate::registry::client::{Client, Outcome};
use crate::registry::entry::{HostValue, extra_to_json};
use crate::registry::proto::{Compare, DeleteRangeRequest, Operation, PutRequest};
use crate::registry::view::Pair;
use crate::wire::wireguard::keys::PrivateKey;

/// Most subnets that are tried on one connection although this user may not have them.
const DENIALS_MAX: usize = 32;

impl Worker {
    /// What this host's key should say.
    fn own_value(&self) -> HostValue {
        let key = self.private_key.as_ref().map(PrivateKey::public);
        HostValue::new(self.options.public_ip, key)
    }

    /// Makes sure that this host has its subnet, and renews its lease.
    pub(super) async fn keep_own(&mut self, client: &mut Client) -> std::result::Result<(), End> {
        let Some(own) = self.own else {
            return Ok(self.claim(client).await?);
        };
        let renewed = match own.lease {
            0 => None,
            lease => client.keep_alive(lease).await?,
        };
        let key = self.keys.subnet(own.subnet);
        let found = client.get(&key).await?.pairs.pop();
        let value = found
            .as_ref()
            .and_then(|pair| HostValue::parse(&pair.value));
        match (found, value) {
            // One that had been somebody else's was removed because of that.
            (None, _) if renewed.is_some() && self.status.alarm.is_none() => {
                let what = format!("this host's key {key} was removed from the registry");
                let error = Error::new(what);
                return Err(End::Fatal(error.hint(
                    "start fastvpn again for a new subnet, if that was not meant",
                )));
            }
            (None, _) => {
                let subnet = own.subnet;
                match self.put_own(client, subnet, 0).await? {
                    Outcome::Done => tracing::info!(%subnet, "registry: {subnet} claimed again"),
                    Outcome::Refused(others) => self.alarm(subnet, others.last()),
                    Outcome::Denied(error) => return Err(error.into()),
                }
            }
            (Some(pair), Some(value)) if value.public_ip != self.options.public_ip => {
                self.alarm(own.subnet, Some(&pair));
            }
            (Some(pair), value) => {
                let is_right = value.is_some_and(|value| value == self.own_value());
                if is_right
                    && pair.lease == own.lease
                    && let Some(ttl_s) = renewed
                {
                    self.note_lease(ttl_s);
                } else if is_right
                    && pair.lease != 0
                    && let Some((left_s, _)) = client.time_left(pair.lease).await?
                {
                    // Of the process that was here before, or that takes over.
                    self.own = Some(Own {
                        lease: pair.lease,
                        ..own
                    });
                    self.note_lease(left_s);
                } else {
                    match self.put_own(client, own.subnet, pair.mod_revision).await? {
                        Outcome::Done => {}
                        Outcome::Refused(others) => self.alarm(own.subnet, others.last()),
                        Outcome::Denied(error) => return Err(error.into()),
                    }
                }
            }
        }
        Ok(())
    }

    fn note_lease(&mut self, ttl_s: i64) {
        self.status.alarm = None;
        self.status.lease = Some((ttl_s, Instant::now()));
        self.show_status();
    }

    /// This host's subnet is somebody else's, and its containers have addresses of it: they
    /// are not to be renumbered under way.
    fn alarm(&mut self, subnet: Ipv4Net, other: Option<&Pair>) {
        let value = other.and_then(|pair| HostValue::parse(&pair.value));
        let who = value.map_or("somebody else".into(), |value| value.public_ip.to_string());
        let text = format!(
            "this host's subnet {subnet} was taken by {who}: two hosts use it now; stop one of \
             them, remove its key, and start it again"
        );
        if self.status.alarm.as_ref() != Some(&text) {
            tracing::error!(%subnet, by = who, "registry: {text}");
            self.status.alarm = Some(text);
            self.show_status();
        }
    }

    /// Claims a subnet.
    async fn claim(&mut self, client: &mut Client) -> Result<()> {
        let Some(policy) = &self.policy else {
            return Ok(());
        };
        let (network, own_ip) = (policy.network.clone(), policy.own_ip);
        let mut taken: BTreeMap<Ipv4Net, Ipv4Addr> = self.view.taken();
        let denied = self.denied.iter();
        taken.extend(denied.map(|subnet| (*subnet, Ipv4Addr::UNSPECIFIED)));
        let mut attempts = 0;
        loop {
            let claim = match claim::choose(&network, own_ip, self.previous, &taken) {
                // Rights may be given meanwhile: from the beginning.
                Err(_) if !std::mem::take(&mut self.denied).is_empty() => return Err(denial()),
                claim => claim?,
            };
            let (subnet, mod_revision) = match claim {
                Claim::Own(subnet) => {
                    if self.adopt(client, subnet).await? {
                        return Ok(());
                    }
                    let host = self.view.host(subnet);
                    (subnet, host.map_or(0, |host| host.mod_revision))
                }
                Claim::Free(subnet) => (subnet, 0),
            };
            match self.put_own(client, subnet, mod_revision).await? {
                Outcome::Done => return Ok(()),
                // Another one was faster.
                Outcome::Refused(mut pairs) => match pairs.pop() {
                    Some(pair) => drop(taken.insert(subnet, self.learn_owner(pair))),
                    None => {
                        taken.remove(&subnet);
                        self.view.delete(self.keys.subnet(subnet).as_bytes(), 0);
                    }
                },
                // One that may write some keys only may have another subnet.
                Outcome::Denied(_) => {
                    self.denied.insert(subnet);
                    taken.insert(subnet, Ipv4Addr::UNSPECIFIED);
                    attempts += 1;
                    if attempts >= DENIALS_MAX {
                        return Err(denial());
                    }
                }
            }
        }
    }

    /// Takes in the key of a subnet that was found to be taken; tells by whom.
    pub(super) fn learn_owner(&mut self, pair: Pair) -> Ipv4Addr {
        let value = HostValue::parse(&pair.value);
        let owner = value.map_or(Ipv4Addr::UNSPECIFIED, |value| value.public_ip);
        if owner == self.options.public_ip {
            self.view.learn(pair);
        }
        owner
    }

    /// Goes on with the keys that this host has in the registry, if they are as they should
    /// be: nobody sees that it was started again.
    async fn adopt(&mut self, client: &mut Client, subnet: Ipv4Net) -> Result<bool> {
        let Some(host) = self.view.host(subnet) else {
            return Ok(false);
        };
        let published = self.view.extra(subnet).unwrap_or_default();
        let lease = host.lease;
        if lease == 0 || host.value != self.own_value() || published != self.published() {
            return Ok(false);
        }
        let left = client.time_left(lease).await?;
        if left.is_none_or(|(_, granted_s)| granted_s != self.options.ttl_s) {
            return Ok(false);
        }
        let Some(ttl_s) = client.keep_alive(lease).await? else {
            return Ok(false);
        };
        self.set_own(subnet, lease, ttl_s);
        Ok(true)
    }

    fn published(&self) -> Vec<IpNet> {
        let mut prefixes: Vec<_> = self.options.published.iter().map(IpNet::trunc).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        prefixes
    }

    fn set_own(&mut self, subnet: Ipv4Net, lease: i64, ttl_s: i64) {
        self.own = Some(Own { subnet, lease });
        self.spare_lease = None;
        self.previous = Some(subnet);
        self.note_lease(ttl_s);
    }

    /// A lease for this host's keys, and its seconds. One that nothing came of is used again:
    /// it lasts for long, and there may be many attempts.
    async fn new_lease(&mut self, client: &mut Client) -> Result<(i64, i64)> {
        if let Some(lease) = self.spare_lease
            && let Some(ttl_s) = client.keep_alive(lease).await?
        {
            return Ok((lease, ttl_s));
        }
        let (lease, ttl_s) = client.grant(self.options.ttl_s).await?;
        self.spare_lease = Some(lease);
        Ok((lease, ttl_s))
    }

    /// Writes this host's keys, if that of its subnet is as it was at `mod_revision`, with
    /// another lease. If it is not: as it is now.
    async fn put_own(
        &mut self,
        client: &mut Client,
        subnet: Ipv4Net,
        mod_revision: i64,
    ) -> Result<Outcome> {
        let (lease, ttl_s) = self.new_lease(client).await?;
        let (key, extra) = (self.keys.subnet(subnet), self.keys.extra(subnet));
        let put = |key: &str, value: String| {
            Operation::Put(PutRequest {
                key: key.into(),
                value: value.into(),
                lease,
            })
        };
        let (value, published) = (self.own_value().to_json(), self.published());
        let mut operations = vec![put(&key, value.clone())];
        if !published.is_empty() {
            operations.push(put(&extra, extra_to_json(&published)));
        } else if self.view.extra(subnet).is_some() {
            let key = extra.into();
            operations.push(Operation::Delete(DeleteRangeRequest { key }));
        }
        let compare = vec![Compare::is_unchanged(&key[..], mod_revision)];
        let outcome = client.transact(compare, operations, &key).await?;
        if matches!(outcome, Outcome::Done) {
            self.set_own(subnet, lease, ttl_s);
        }
        Ok(outcome)
    }
}

/// Why there is no subnet for this host, although there are some.
fn denial() -> Error {
    let what = "etcd: permission denied for the keys of the subnets that are free";
    Error::new(what).hint("grant this user the right to write one of them")
}
