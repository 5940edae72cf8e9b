//! What the unit leaves to a tunnel with keys, and to one with a registry that masquerades: files,
//! system calls, address families, nft(8).

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use tempfile::TempDir;
use testbed::systemd::Systemd;
use testbed::{Namespace, container, ip};

use super::systemd::{Machine, OVERRIDE, SERVICE, Traffic, UNIT};
use crate::registry::network::{ETCD, Network};
use crate::support::{FASTVPN, check, stop, tried, wait_for, wait_until};
use crate::tools::{Stream, inventory, nothing_left};
use crate::wireguard::ends::{self, Keys, Kind, Reach, Underlay, inside};

/// Starts the service with files in /etc/fastvpn.
fn boot(namespace: &Namespace, place: &Path, files: &[(String, String)]) -> Result<Machine> {
    let unit = [
        ("units/fastvpn@.service", UNIT),
        ("units/fastvpn@.service.d/test.conf", OVERRIDE),
    ];
    let files = files.iter().map(|(name, text)| (&name[..], &text[..]));
    let all: Vec<_> = unit.into_iter().chain(files).collect();
    let program = Some(Path::new(FASTVPN));
    let machine = Machine(Systemd::boot(namespace, place, &all, SERVICE, program)?);
    let started = wait_until("the service is started", || machine.is_active());
    started.map_err(|error| error.hint(machine.log()))?;
    Ok(machine)
}

/// Stops the service: that goes well.
fn stop_service(machine: &Machine) -> Result<()> {
    machine.0.systemctl(&format!("stop {SERVICE}"))?;
    let result = machine.0.property(SERVICE, "Result")?;
    check(result == "success" && machine.pid()? == 0, || {
        format!("{result}:\n{}", machine.log())
    })
}

/// What host A is told, with its keys, as files of /etc/fastvpn.
fn files_of_host_a(keys: &Keys) -> Result<Vec<(String, String)>> {
    let path = keys.file(0, Reach::at(Underlay::V4.endpoint(1)))?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let read = || {
        let mut files = Vec::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let text = fs::read_to_string(directory.join(&name))?;
            let text = text.replace(&directory.display().to_string(), "/etc/fastvpn");
            files.push((
                format!("etc/{}", name.replace("0.toml", "office.toml")),
                text,
            ));
        }
        Ok(files)
    };
    tried("read files", read())
}

/// Keys are read at the start, for each reload and by each new process; sessions are made, and
/// `wg` has its socket.
#[testbed::trial(needs_root, long, systemd)]
fn a_service_has_keys() -> Result<()> {
    let (hosts, keys) = (ends::hosts()?, Keys::new(true)?);
    let before = inventory(&hosts.a)?;
    let directory = tried("make a directory", TempDir::new())?;
    let machine = boot(&hosts.a, directory.path(), &files_of_host_a(&keys)?)?;
    let far = keys.start(&hosts.b, 1, Kind::Fastvpn, Reach::UNKNOWN)?;
    wait_for(&hosts.a, inside(1))?;
    wait_for(&hosts.b, inside(0))?;
    machine.0.tell("test -S /run/wireguard/office.sock")?;
    Traffic(&hosts).survives(|streams| {
        machine.0.systemctl(&format!("reload {SERVICE}"))?;
        streams.wait_for_more(100).map(drop)
    })?;
    // What was sealed for the old process's sessions is lost.
    let streams = [
        Stream::start(&hosts.a, &hosts.b, inside(1))?,
        Stream::start(&hosts.b, &hosts.a, inside(0))?,
    ];
    for _ in 0..2 {
        machine.upgrade()?;
        streams.iter().try_for_each(Stream::wait_for_progress)?;
    }
    for stream in streams {
        stream.finish()?;
    }
    check(machine.number("NRestarts")? == 0, || machine.log())?;
    machine.is_restarted_after("KILL")?;
    wait_for(&hosts.a, inside(1))?;
    stop_service(&machine)?;
    nothing_left(&hosts.a, &before)?;
    drop(machine);
    far.stop()
}

/// A host of a registry's network, under systemd.
struct Member {
    machine: Machine,
    /// An address of another host's in the network.
    far: IpAddr,
}

impl Member {
    /// The line of subnet.env that begins so, without that.
    fn subnet_env(&self, word: &str) -> Result<String> {
        let text = self.machine.0.tell("cat /run/flannel/subnet.env")?;
        let found = text.lines().find_map(|line| line.strip_prefix(word));
        found.map_or_else(|| Err(Error::new(text.clone())), |rest| Ok(rest.into()))
    }

    fn rules(&self) -> Result<usize> {
        let rules = self.machine.0.tell("nft list ruleset")?;
        Ok(rules.matches("masquerade").count())
    }

    /// A container on this host, which is the namespace.
    fn container(&self, host: &Namespace) -> Result<Namespace> {
        let bridge = self.subnet_env("FLANNEL_SUBNET=")?;
        let net = |text: &str| -> Result<IpNet> {
            text.parse().map_err(|_| Error::new(text.to_string()))
        };
        let inside = bridge.replace(".1/24", ".2/24");
        container(host, "cni0", &[(net(&bridge)?, net(&inside)?)], 1400)
    }

    /// It is in the network, and what leaves that is masqueraded: etcd's host knows nothing of it.
    fn works(&self, container: &Namespace) -> Result<()> {
        let both = wait_for(container, self.far).and_then(|()| wait_for(container, ETCD.into()));
        both.map_err(|error| error.hint(self.machine.log()))?;
        let rules = self.rules()?;
        check(rules == 2, || format!("{rules} rules masquerade"))
    }

    /// What must outlast a process, and what container tools read, are where they belong.
    fn has_its_files(&self) -> Result<()> {
        for file in [
            "644 /run/flannel/subnet.env",
            "700 /var/lib/fastvpn",
            "600 /var/lib/fastvpn/office.registry.json",
            "600 /var/lib/fastvpn/office.registry.key",
        ] {
            let path = file.split(' ').nth(1).unwrap_or_default();
            // What was learned is written down after a while.
            let exists = || Ok(self.machine.0.run(&["test", "-e", path])?.status.success());
            wait_until(path, exists)?;
            let found = self.machine.0.tell(&format!("stat -c %a:%U:%n {path}"))?;
            let expected = file.replace(' ', ":root:");
            check(found == expected, || format!("{found}, not {expected}"))?;
        }
        Ok(())
    }
}

/// It joins a network, by what it knew last if etcd is away, and nft masquerades for it.
#[testbed::trial(needs_root, long, systemd, etcd)]
fn a_service_joins_a_network_and_masquerades() -> Result<()> {
    let config = r#"{"Network":"10.50.0.0/16","Backend":{"Type":"wireguard"}}"#;
    let mut network = Network::with_config(2, config)?;
    let far = network.join(1, "")?;
    let before = inventory(network.host(0))?;
    let directory = tried("make a directory", TempDir::new())?;
    let file = format!(
        "peer = []\nregistry = [{:?}]\niface = [\"underlay0\"]\nip-masq = true\n",
        network.etcd.url()
    );
    let files = [("etc/office.toml".to_string(), file)];
    let machine = boot(network.host(0), directory.path(), &files)?;
    let member = Member {
        machine,
        far: far.address()?,
    };
    let subnet = member.subnet_env("FLANNEL_SUBNET=")?;
    let container = member.container(network.host(0))?;
    member.works(&container)?;
    let stream = Stream::start(&container, network.host(1), member.far)?;
    member.machine.0.systemctl(&format!("reload {SERVICE}"))?;
    stream.wait_for_progress()?;
    member.machine.upgrade()?;
    stream.wait_for_progress()?;
    stream.finish()?;
    member.works(&container)?;
    let restarts = member.machine.number("NRestarts")?;
    check(restarts == 0, || member.machine.log())?;
    member.machine.is_restarted_after("KILL")?;
    member.works(&container)?;
    member.has_its_files()?;
    network.etcd.kill();
    let restarted = member.machine.0.systemctl(&format!("restart {SERVICE}"));
    restarted.map_err(|error| error.hint(member.machine.log()))?;
    member.works(&container)?;
    let again = member.subnet_env("FLANNEL_SUBNET=")?;
    check(again == subnet, || format!("{subnet}, then {again}"))?;
    stop_service(&member.machine)?;
    let rules = member.machine.0.tell("nft list ruleset")?;
    check(rules.is_empty(), || rules.clone())?;
    // The test's own, which goes with the container some time later.
    ip(network.host(0), "link delete cni0")?;
    nothing_left(network.host(0), &before)?;
    drop(member);
    stop(far.tunnel).map(drop)
}
