use std::net::Ipv4Addr;
use std::path::Path;

use crossbeam_channel::bounded;

use super::*;
use crate::registry::access::Access;
use crate::registry::claim;
use crate::registry::network::Network;

const CONFIG: &str = r#"{"Network":"10.50.0.0/16"}"#;

/// One that has never connected, with its files in `directory`.
fn worker(directory: &Path) -> Worker {
    let (changed, _) = bounded(1);
    let (joined, _) = bounded(1);
    let shared = Shared {
        snapshot: arc_swap::ArcSwap::default(),
        status: arc_swap::ArcSwap::default(),
        leases: arc_swap::ArcSwap::default(),
        leases_wanted: tokio::sync::Notify::new(),
        leases_known: bounded(1).0,
        end: std::sync::Mutex::default(),
        apply_us: std::sync::atomic::AtomicU64::new(0),
        changed,
        joined,
    };
    let options = Options {
        access: Access {
            urls: Vec::new(),
            ca: None,
            identity: None,
            user: None,
        },
        prefix: "/n".into(),
        public_ip: "10.0.0.1".parse().unwrap(),
        allowed: Vec::new(),
        allowed_prefixes: Vec::new(),
        reserved: BTreeSet::new(),
        ttl_s: 60,
        private_key: None,
        key_file: directory.join("key"),
        published: Vec::new(),
        subnet_file: directory.join("subnet.env"),
        cache: directory.join("cache.json"),
    };
    Worker::new(options, Arc::new(shared))
}

fn pair(key: String, value: &str, revision: i64) -> Pair {
    Pair {
        key: key.into(),
        value: value.into(),
        mod_revision: revision,
        ..Pair::default()
    }
}

#[test]
fn a_configuration_that_is_gone_has_changed() {
    let directory = tempfile::tempdir().unwrap();
    let mut worker = worker(directory.path());
    assert!(worker.follow_config().is_err());
    let key = worker.keys.config();
    let put = |revision| (pair(key.clone(), CONFIG, revision), false);
    worker.view.put(put(1).0);
    worker.follow_config().unwrap();
    assert!(worker.policy.is_some() && !worker.status.is_config_changed);
    worker.take(vec![(pair(key.clone(), "", 2), true)], 0);
    assert!(worker.status.is_config_changed);
    // As the next connection does.
    worker.follow_config().unwrap();
    worker.take(vec![put(3)], 0);
    assert!(!worker.status.is_config_changed);
}

#[test]
fn a_subnet_that_another_start_of_this_host_took_is_this_hosts() {
    let directory = tempfile::tempdir().unwrap();
    let mut worker = worker(directory.path());
    worker.view.replace(Vec::new(), 1, 5, Instant::now());
    let subnet = "10.50.2.0/24".parse().unwrap();
    let found = |ip: &str| {
        let value = format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null}}"#);
        pair(Keys::new("/n").subnet(subnet), &value, 9)
    };
    let own: Ipv4Addr = "10.0.0.1".parse().unwrap();
    assert_eq!(worker.learn_owner(found("10.0.0.1")), own);
    // It is written, if at all, over what was found, and what came before that is watched.
    assert_eq!(worker.view.host(subnet).unwrap().mod_revision, 9);
    assert_eq!(worker.view.revision(), 5);
    let network = Network::parse(CONFIG.as_bytes()).unwrap();
    let taken = std::collections::BTreeMap::from([(subnet, own)]);
    let claim = claim::choose(&network, own, None, &taken).unwrap();
    assert_eq!(claim, claim::Claim::Own(subnet));
    assert_ne!(worker.learn_owner(found("10.0.0.2")), own);
}
