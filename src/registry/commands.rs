//! What operators do to a registry: make a network in it, look at its hosts, and take one out.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::Serialize;

use super::access::Access;
use super::client::{Client, Outcome};
use super::entry::Keys;
use super::network::Network;
use super::proto::{Compare, DeleteRangeRequest, Operation, PutRequest};
use super::view::View;
use crate::error::{Error, Result};

/// A network in the registry.
#[derive(Serialize)]
pub(crate) struct Shown {
    /// The network.
    pub(crate) network: Option<Ipv4Net>,
    /// Its backend.
    pub(crate) backend: Option<&'static str>,
    /// Its hosts, by subnet.
    pub(crate) hosts: Vec<ShownHost>,
}

/// A host in the registry.
#[derive(Serialize)]
pub(crate) struct ShownHost {
    /// Its subnet.
    pub(crate) subnet: Ipv4Net,
    /// Where its datagrams go.
    pub(crate) public_ip: Ipv4Addr,
    /// Its backend.
    pub(crate) backend: String,
    /// Its public key, with the wireguard backend.
    pub(crate) public_key: Option<String>,
    /// Its prefixes besides.
    pub(crate) prefixes: usize,
    /// The seconds that its lease has left; none if it has no lease.
    pub(crate) lease_left_seconds: Option<i64>,
    /// The seconds since its lease was renewed.
    pub(crate) renewed_seconds: Option<i64>,
}

/// Makes the network's configuration, unless there is one.
///
/// # Errors
/// When there is one, or etcd does not do it.
pub(crate) fn init(access: &Access, prefix: &str, value: &str) -> Result<()> {
    let key = Keys::new(prefix).config();
    run(async {
        let mut client = connect(access).await?;
        let put = Operation::Put(PutRequest {
            key: key.clone().into(),
            value: value.into(),
            lease: 0,
        });
        let compare = vec![Compare::is_unchanged(&key[..], 0)];
        match client.transact(compare, vec![put], &key).await? {
            Outcome::Done => Ok(()),
            Outcome::Refused(_) => {
                let what = format!("there is a network at {key} already");
                Err(Error::new(what).hint("hosts use it; etcdctl del removes it"))
            }
            Outcome::Denied(error) => Err(error),
        }
    })
}

/// The network and its hosts.
///
/// # Errors
/// When etcd does not tell.
pub(crate) fn show(access: &Access, prefix: &str) -> Result<Shown> {
    run(async {
        let mut client = connect(access).await?;
        let view = view(&mut client, prefix).await?;
        let network = view.config().and_then(|value| Network::parse(value).ok());
        let leases: BTreeSet<i64> = view.hosts().map(|(_, host)| host.lease).collect();
        let leases = leases.into_iter().filter(|lease| *lease != 0);
        let times = client.times_left(&leases.collect::<Vec<_>>()).await?;
        let mut hosts = Vec::new();
        for (subnet, host) in view.hosts() {
            let time = times.get(&host.lease);
            hosts.push(ShownHost {
                subnet,
                public_ip: host.value.public_ip,
                backend: host.value.backend.clone(),
                public_key: host.value.key.map(|key| key.to_string()),
                prefixes: view.extra(subnet).map_or(0, <[_]>::len),
                lease_left_seconds: time.map(|(left_s, _)| *left_s),
                renewed_seconds: time
                    .map(|(left_s, granted_s)| granted_s.saturating_sub(*left_s).max(0)),
            });
        }
        Ok(Shown {
            network: network.as_ref().map(|network| network.network),
            backend: network.as_ref().map(|network| network.backend.name()),
            hosts,
        })
    })
}

/// Takes the host with this address out of the registry; tells which subnets it had.
///
/// # Errors
/// When there is no such host, or etcd does not do it.
pub(crate) fn leave(access: &Access, prefix: &str, host: Ipv4Addr) -> Result<Vec<Ipv4Net>> {
    let keys = Keys::new(prefix);
    run(async {
        let mut client = connect(access).await?;
        let view = view(&mut client, prefix).await?;
        let mut left = Vec::new();
        for (subnet, entry) in view.hosts() {
            if entry.value.public_ip != host {
                continue;
            }
            let key = keys.subnet(subnet);
            let mut gone = vec![key.clone()];
            // One who may write its own keys only has no others.
            gone.extend(view.extra(subnet).map(|_| keys.extra(subnet)));
            let delete = |key: String| Operation::Delete(DeleteRangeRequest { key: key.into() });
            let compare = vec![Compare::is_unchanged(&key[..], entry.mod_revision)];
            let operations = gone.into_iter().map(delete).collect();
            match client.transact(compare, operations, &key).await? {
                Outcome::Done => left.push(subnet),
                Outcome::Denied(error) => return Err(error),
                Outcome::Refused(_) => {
                    return Err(
                        Error::new(format!("{key} has changed meanwhile")).hint("try again")
                    );
                }
            }
        }
        match left.is_empty() {
            true => {
                let what = format!("the registry has no host with the address {host}");
                Err(Error::new(what).hint("`fastvpn registry show` lists them"))
            }
            false => Ok(left),
        }
    })
}

/// Does it on this thread.
fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|cause| Error::os("cannot start a runtime", cause))?;
    runtime.block_on(work)
}

/// Connects to the first member that answers.
async fn connect(access: &Access) -> Result<Client> {
    let mut last = Error::new("there is no registry to ask");
    for url in &access.urls {
        match Client::connect(access, url).await {
            Ok(client) => return Ok(client),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn view(client: &mut Client, prefix: &str) -> Result<View> {
    let keys = Keys::new(prefix);
    let (first, end) = keys.range();
    let listed = client.list(&first, &end).await?;
    let mut view = View::new(keys);
    let now = std::time::Instant::now();
    view.replace(listed.pairs, listed.cluster, listed.revision, now);
    Ok(view)
}
