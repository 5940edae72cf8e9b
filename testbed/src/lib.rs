//! What fastvpn's tests and benches need of a network inside one machine, beyond
//! what the demo does: hosts on a switch and containers behind hosts, more kinds
//! of traffic, and what processes cost. The rest is fastvpn's own, see
//! [`fastvpn::testbed`].

#[doc(hidden)]
pub use inventory;
pub use testbed_macros::trial;

pub mod etcd;
pub mod package;
pub mod process;
pub mod program;
mod routes;
pub mod systemd;
pub mod traffic;
pub mod wireguard;

pub use fastvpn::testbed::{
    Child, Namespace, Pair, UNDERLAY_NAME, configure, enter_user_namespace_if_needed, join, pair,
};
pub use process::{cpu_ns, rss_bytes, rss_peak_bytes};
pub use routes::StaticRoutes;

use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use fastvpn::error::{Error, Result};
use fastvpn::testbed::enter;
use ipnet::IpNet;

/// An end-to-end test, as [`macro@trial`] makes it of a function.
pub struct Trial {
    /// The function's name.
    pub name: &'static str,
    /// The function.
    pub run: fn() -> Result<()>,
    /// Whether it is run on each engine, rather than on any.
    pub each_engine: bool,
    /// Whether it is run with another engine at each end.
    pub mixed: bool,
    /// Whether it cannot be run in a user namespace.
    pub needs_root: bool,
    /// Whether it is in the long tier: what takes minutes, or needs more than Rust,
    /// a C compiler and iproute2.
    pub long: bool,
    /// Why it cannot be run here, where a program is missing that it needs.
    pub needs: Option<fn() -> Option<String>>,
}

inventory::collect!(Trial);

/// All of them, by name.
pub fn trials() -> Vec<&'static Trial> {
    let mut trials: Vec<_> = inventory::iter::<Trial>.into_iter().collect();
    trials.sort_by_key(|trial| trial.name);
    trials
}

/// Names of the interfaces of the calling thread's network namespace.
///
/// # Errors
/// When the kernel does not list them.
pub fn interfaces() -> Result<Vec<String>> {
    let path = "/proc/thread-self/net/dev";
    let table = std::fs::read_to_string(path)
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    // Two lines of headings.
    let names = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_string()).collect())
}

/// Name of the interface inside a [`container`].
pub const CONTAINER_NAME: &str = "eth0";

/// Hosts on one switch.
pub struct Switch {
    /// The switch: a bridge whose ports are `port0`, `port1` and so on, one for
    /// each host.
    pub bridge: Namespace,
    /// The hosts, whose interfaces are called [`UNDERLAY_NAME`].
    pub hosts: Vec<Namespace>,
}

/// Makes as many namespaces as there are lists of addresses, each joined to one
/// switch by a veth pair of this MTU in bytes.
///
/// # Errors
/// As [`pair`]; when the kernel has no bridges.
pub fn switch(addresses: &[Vec<IpNet>], mtu: u32) -> Result<Switch> {
    const BRIDGE_NAME: &str = "switch0";
    let bridge = Namespace::new()?;
    ip(&bridge, &format!("link add {BRIDGE_NAME} type bridge"))?;
    configure(&bridge, BRIDGE_NAME, &[], mtu)?;
    let mut hosts = Vec::with_capacity(addresses.len());
    for (number, addresses) in addresses.iter().enumerate() {
        let (host, port) = (Namespace::new()?, format!("port{number}"));
        join(&host, &bridge, UNDERLAY_NAME, &port)?;
        configure(&bridge, &port, &[], mtu)?;
        ip(&bridge, &format!("link set {port} master {BRIDGE_NAME}"))?;
        configure(&host, UNDERLAY_NAME, addresses, mtu)?;
        hosts.push(host);
    }
    Ok(Switch { bridge, hosts })
}

/// Puts a container behind a host: a namespace whose interface
/// [`CONTAINER_NAME`] is joined to the host's interface `host_name`, with
/// default routes to the host's addresses. Switches forwarding on in the host.
///
/// `addresses` are pairs of the host's and the container's address.
///
/// # Errors
/// As [`pair`].
pub fn container(
    host: &Namespace,
    host_name: &str,
    addresses: &[(IpNet, IpNet)],
    mtu: u32,
) -> Result<Namespace> {
    let container = Namespace::new()?;
    let (to_host, to_container): (Vec<_>, Vec<_>) = addresses.iter().copied().unzip();
    join(host, &container, host_name, CONTAINER_NAME)?;
    configure(host, host_name, &to_host, mtu)?;
    configure(&container, CONTAINER_NAME, &to_container, mtu)?;
    for router in to_host {
        let forwarding = match router {
            IpNet::V4(_) => "net/ipv4/ip_forward",
            IpNet::V6(_) => "net/ipv6/conf/all/forwarding",
        };
        host.sysctl(forwarding, "1")?;
        ip(
            &container,
            &format!("route add default via {}", router.addr()),
        )?;
    }
    Ok(container)
}

/// What an operator does to interfaces, addresses and routes: ip(8) in the
/// namespace, with these words.
///
/// # Errors
/// When there is no such program, or it refuses; with what it says.
pub fn ip(namespace: &Namespace, words: &str) -> Result<()> {
    tool(namespace, "ip", words)
}

/// Runs such a program in the namespace, with these words: ip(8), tc(8), ethtool(8).
///
/// # Errors
/// As [`ip`].
pub fn tool(namespace: &Namespace, program: &str, words: &str) -> Result<()> {
    let mut command = Command::new(program);
    command
        .args(words.split_whitespace())
        .stderr(Stdio::piped());
    let child = namespace.spawn(command);
    let mut child = child.map_err(|error| match error.errno() {
        Some(libc::ENOENT) => error.hint("install the packages iproute2 and ethtool"),
        _ => error,
    })?;
    let mut said = String::new();
    if let Some(mut stderr) = child.process().stderr.take() {
        let _ = stderr.read_to_string(&mut said);
    }
    match child.process().wait() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Error::new(format!("{program} {words}: {}", said.trim()))),
    }
}

/// Moves an interface to another namespace; it loses its addresses and goes down.
///
/// # Errors
/// When there is no such interface, or its name is taken over there.
pub fn move_link(from: &Namespace, name: &str, to: &Namespace) -> Result<()> {
    // A namespace without a name is named by a process in it.
    let mut command = Command::new("sleep");
    command.arg("60");
    let inside = to.spawn(command)?;
    ip(from, &format!("link set {name} netns {}", inside.pid()))
}

/// Starts a thread inside a namespace.
///
/// # Errors
/// When there are no more descriptors or threads.
pub fn spawn_thread<T: Send + 'static>(
    namespace: &Namespace,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let cannot = |cause| Error::os(format!("cannot start thread {name}"), cause);
    let fd = namespace.fd().try_clone_to_owned().map_err(cannot)?;
    let inside = move || {
        enter(fd.as_fd()).expect("the process that made the namespace may enter it");
        work()
    };
    let thread = thread::Builder::new().name(name.into()).spawn(inside);
    thread.map_err(cannot)
}

#[cfg(test)]
mod tests;
