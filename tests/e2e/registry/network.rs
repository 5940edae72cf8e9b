//! A network for these tests: hosts on one switch, etcd on one more, and what hosts have in
//! common with flanneld.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

use fastvpn::error::Result;
use ipnet::IpNet;
use serde_json::Value;
use testbed::etcd::Etcd;
use testbed::{Namespace, Switch, switch};

use crate::operator::{Operator, Said, said};
use crate::support::{Ended, FASTVPN, Tunnel, check, fastvpn, wait_until};

/// Prefix of the network's keys.
pub const PREFIX: &str = "/coreos.com/network";

/// Where etcd is.
pub const ETCD: Ipv4Addr = Ipv4Addr::new(10, 211, 77, 250);

/// Hosts on one switch, and etcd beside them, with a network for them.
pub struct Network {
    switch: Switch,
    pub etcd: Etcd,
}

/// The underlay address of a host, from 0.
pub fn public_ip(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 211, 77, host as u8 + 1)
}

/// Namespaces for some hosts, and one more for etcd.
pub fn namespaces(hosts: usize) -> Result<Switch> {
    let net = |address: Ipv4Addr| IpNet::new_assert(address.into(), 24);
    let mut addresses: Vec<_> = (0..hosts).map(|host| vec![net(public_ip(host))]).collect();
    addresses.push(vec![net(ETCD)]);
    switch(&addresses, 1500)
}

impl Network {
    /// A network with the udp backend.
    pub fn new(hosts: usize) -> Result<Self> {
        Self::with_config(
            hosts,
            r#"{"Network":"10.50.0.0/16","Backend":{"Type":"udp","Port":8285}}"#,
        )
    }

    /// A network with this configuration.
    pub fn with_config(hosts: usize, config: &str) -> Result<Self> {
        let network = Self::without_config(hosts)?;
        network.put("config", config)?;
        Ok(network)
    }

    /// An etcd without a network.
    pub fn without_config(hosts: usize) -> Result<Self> {
        let switch = namespaces(hosts)?;
        let etcd = Etcd::start(&switch.hosts[hosts], ETCD.into())?;
        Ok(Self { switch, etcd })
    }

    /// A host, from 0.
    pub fn host(&self, host: usize) -> &Namespace {
        &self.switch.hosts[host]
    }

    /// Where etcd runs.
    pub fn desk(&self) -> &Namespace {
        self.switch.hosts.last().expect("there is etcd's")
    }

    /// Puts a value under a key of the network's.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.etcd
            .put(self.desk(), &format!("{PREFIX}/{key}"), value)
    }

    /// As flanneld does it, for as many seconds as it is not renewed.
    pub fn put_host(&self, subnet: &str, ip: &str, ttl_s: u32) -> Result<()> {
        let value = format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null}}"#);
        let granted = self.ask(&["lease", "grant", &ttl_s.to_string()])?;
        // "lease 32695410dcc0ca06 granted with TTL(60s)"
        let lease = granted.split_whitespace().nth(1).unwrap_or_default();
        let key = format!("{PREFIX}/subnets/{subnet}");
        self.ask(&["put", "--lease", lease, "--", &key, &value])
            .map(drop)
    }

    /// Removes a key of the network's.
    pub fn delete(&self, key: &str) -> Result<()> {
        self.ask(&["del", &format!("{PREFIX}/{key}")]).map(drop)
    }

    /// What etcdctl says.
    pub fn ask(&self, words: &[&str]) -> Result<String> {
        self.etcd.ask(self.desk(), words)
    }

    /// All hosts in the registry: the names of their keys, and their values.
    pub fn hosts(&self) -> Result<Vec<(String, String)>> {
        let prefix = format!("{PREFIX}/subnets/");
        let all = self.etcd.list(self.desk(), &prefix)?.into_iter();
        let name = |key: String| key.trim_start_matches(&prefix[..]).to_string();
        Ok(all.map(|(key, value)| (name(key), value)).collect())
    }

    /// Kills etcd and starts it again.
    pub fn restart_etcd(&mut self) -> Result<()> {
        let desk = self.switch.hosts.last().expect("there is etcd's");
        self.etcd.restart(desk)
    }

    /// Runs `fastvpn registry WORDS` where etcd runs.
    pub fn command(&self, words: &str) -> Result<Said> {
        let mut command = Command::new(FASTVPN);
        command.arg("registry").args(words.split_whitespace());
        command.args(["--registry", self.etcd.url()]);
        said(self.desk(), command)
    }

    /// Starts a host's tunnel, with more flags.
    pub fn start(&self, host: usize, flags: &str) -> Result<Member> {
        Member::start(
            self.host(host),
            host,
            &format!("--registry {} {flags}", self.etcd.url()),
        )
    }

    /// The same, waited for until it is there.
    pub fn join(&self, host: usize, flags: &str) -> Result<Member> {
        let member = self.start(host, flags)?;
        member.wait_until_joined()?;
        Ok(member)
    }
}

/// A host's tunnel, and its files.
pub struct Member {
    pub tunnel: Tunnel,
    pub operator: Operator,
    flags: String,
}

impl Member {
    /// Starts a tunnel in a namespace.
    pub fn start(namespace: &Namespace, host: usize, flags: &str) -> Result<Self> {
        let operator = Operator::new()?;
        Self::start_with(namespace, host, flags, operator)
    }

    fn start_with(
        namespace: &Namespace,
        host: usize,
        flags: &str,
        operator: Operator,
    ) -> Result<Self> {
        let path = |name: &str| operator.path(name).display().to_string();
        let all = format!(
            "--public-ip {} --subnet-file {} --registry-cache {} --control {} --queues 1 {flags}",
            public_ip(host),
            path("subnet.env"),
            path("cache.json"),
            operator.socket_text()
        );
        Ok(Self {
            tunnel: fastvpn(namespace, &all)?,
            operator,
            flags: flags.into(),
        })
    }

    /// Starts it once more with the same files, after it has ended.
    pub fn start_again(self, namespace: &Namespace, host: usize) -> Result<Self> {
        let Self {
            tunnel,
            operator,
            flags,
        } = self;
        drop(tunnel);
        Self::start_with(namespace, host, &flags, operator)
    }

    /// Has another process with the same files take over; tells how this one ended.
    pub fn take_over(self, namespace: &Namespace, host: usize) -> Result<(Ended, Self)> {
        let Self {
            tunnel,
            operator,
            flags,
        } = self;
        let new = Self::start_with(namespace, host, &format!("{flags} --takeover"), operator)?;
        new.wait_until_joined()?;
        Ok((tunnel.wait()?, new))
    }

    /// Waits until it has a subnet and packets are carried.
    pub fn wait_until_joined(&self) -> Result<()> {
        self.tunnel.wait_for_line("offloads:")
    }

    /// Its subnet, as the file that container tools read has it, and the other lines.
    pub fn subnet_file(&self) -> Result<Vec<String>> {
        let path = self.operator.path("subnet.env");
        let text = crate::support::tried("read subnet.env", std::fs::read_to_string(path))?;
        Ok(text.lines().map(str::to_string).collect())
    }

    /// Its subnet, as in `10.50.7.0/24`.
    pub fn subnet(&self) -> Result<IpNet> {
        let lines = self.subnet_file()?;
        let found = lines
            .iter()
            .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="));
        let net: Option<IpNet> = found.and_then(|net| net.parse().ok());
        match net {
            Some(net) => Ok(net.trunc()),
            None => crate::support::fail(format!("no subnet in {lines:?}")),
        }
    }

    /// Its address in the tunnel.
    pub fn address(&self) -> Result<IpAddr> {
        Ok(self.subnet()?.network())
    }

    /// What it tells of the registry.
    pub fn status(&self) -> Result<Value> {
        Ok(self.operator.ask("status")?["registry"].clone())
    }

    /// Its prefixes that come from the registry, each with its peer.
    pub fn routes(&self) -> Result<Vec<String>> {
        let answer = self.operator.ask("route list")?;
        let all = answer["routes"].as_array().cloned().unwrap_or_default();
        let own = all.iter().filter(|route| route["origin"] == "registry");
        let text = |route: &Value, key: &str| route[key].as_str().unwrap_or_default().to_string();
        Ok(own
            .map(|route| format!("{} {}", text(route, "prefix"), text(route, "peer")))
            .collect())
    }

    /// Waits until those are these.
    pub fn wait_for_routes(&self, expected: &[&str]) -> Result<()> {
        let mut last = Vec::new();
        wait_until(&format!("routes {expected:?}"), || {
            last = self.routes()?;
            Ok(last == expected)
        })
        .map_err(|error| {
            let said = self.tunnel.said();
            fastvpn::error::Error::new(format!("{error}; they are {last:?}; it said:\n{said}"))
        })
    }

    /// Waits until a member of the registry's status is so.
    pub fn wait_for_status(&self, key: &str, expected: &Value) -> Result<()> {
        wait_until(&format!("{key} {expected}"), || {
            Ok(self.status()?[key] == *expected)
        })
    }
}

/// The names of a network's keys of all hosts, all different.
pub fn check_distinct(hosts: &[(String, String)], count: usize) -> Result<()> {
    let subnets: std::collections::BTreeSet<_> = hosts.iter().map(|(key, _)| key).collect();
    let ips: std::collections::BTreeSet<_> = hosts.iter().map(|(_, value)| value).collect();
    check(subnets.len() == count && ips.len() == count, || {
        format!("{count} hosts have {hosts:?}")
    })
}
