//! The start of a tunnel: names resolved, port and device claimed, and everything
//! set up. A takeover ([`super::handoff`]) begins in the same way.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::announce;
use super::host::own_addresses;
use super::manifest::Manifest;
use super::metrics;
use super::plan::{Plan, check_derived, check_own_key, kernel_routes};
use super::registry::{self, Registry};
use super::resolve;
use super::settings::{Settings, endpoints, own_identity};
use super::tunnel::Tunnel;
use super::uapi;
use super::workers::Claimed;
use crate::config::{Config, DEFAULT_PORT, Feature};
use crate::control::metrics::Server as MetricsServer;
use crate::control::server::Server;
use crate::control::uapi::server::Server as UapiServer;
use crate::error::{Error, Result};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Source};
use crate::host::routes;
use crate::io::tun;
use crate::io::udp::{self, UdpOffloads};
use crate::packet::coalesce::TunOffloads;
use crate::routing::dns::Names;
use crate::routing::overlay::{Origin, Overlay};

/// How long, and how often, a killed old process's port and device are waited
/// for. Longer than the kernel takes, and short enough after a typing error.
const PREDECESSOR_WAIT_MAX: Duration = Duration::from_secs(1);
/// The same for one that died while it handed over, on a machine that may be busy.
const TAKEOVER_WAIT_MAX: Duration = Duration::from_secs(5);
const PREDECESSOR_WAIT_STEP: Duration = Duration::from_millis(10);

/// Peers that cannot be used yet, and are named one by one. More are counted.
const UNUSABLE_NAMED_MAX: usize = 16;

/// What any start begins with: what is wanted, and what follows from it here
/// and now.
pub struct Prepared<C> {
    plan: Plan,
    /// In the tunnel's network namespace.
    netlink: Netlink,
    names: Names,
    claimed: C,
    /// Peers that cannot be used yet, and why.
    unusable: Vec<Error>,
}

impl Prepared<Claimed> {
    /// Makes everything but what others see of a tunnel. Logs which peers cannot be used
    /// yet.
    ///
    /// # Errors
    /// As [`Tunnel::new`].
    pub fn into_tunnel(mut self) -> Result<Tunnel> {
        let more = self.unusable.len().saturating_sub(UNUSABLE_NAMED_MAX);
        for error in self.unusable.iter().take(UNUSABLE_NAMED_MAX) {
            tracing::warn!(%error, "{error}; trying again");
        }
        if more > 0 {
            tracing::warn!(
                count = more,
                "{more} more peers cannot be used yet; trying again"
            );
        }
        // If any port would do, it is known now.
        let port = self.claimed.sockets.port();
        self.plan.settings.listen.set_port(port);
        Tunnel::new(self.plan, self.names, self.netlink, self.claimed)
    }
}

/// Resolves the peers' names, settles what the configuration leaves open, claims port and
/// device, and checks all of it against this host. `old`: the tunnel that is to be taken
/// over, with its device, what was added to it, and what it knows of its peers. `own`: the
/// device of the tunnel, if it has one of another name than the configuration says.
///
/// # Errors
/// When the configuration does not work on this host.
pub fn prepare<C>(
    mut config: Config,
    old: Option<&Manifest>,
    own: Option<u32>,
    claim: impl FnOnce(&Config, &Settings, &mut Netlink) -> Result<C>,
) -> Result<Prepared<C>> {
    let mut netlink = Netlink::open()?;
    netlink.fwmark = config.fwmark;
    let local = config.listen.map(|listen| listen.ip());
    let mut names = Names::new(move |name| path::resolve(&name.host, name.port, local));
    let addresses = own_addresses(&mut netlink, &config.addresses)?;
    let (mut overlay, listen) = overlay(&config, addresses, old)?;
    let mut unusable = resolve::resolve_now(&mut overlay, &mut names, listen);
    let device = match (old, own) {
        (Some(old), _) => old.tun_index,
        (None, Some(own)) => Some(own),
        (None, None) => netlink.link_index(&config.tun)?,
    };
    if old.is_some() {
        // The path through the tunnel says nothing of those outside.
        unusable.extend(suspend_inside(&mut overlay, &mut netlink, device));
    }
    let endpoints = endpoints(&config, &overlay);
    if config.needs_identity() {
        match old.and_then(|old| old.identity.clone()) {
            // Its peers know this host by that.
            Some(identity) => config.set_identity(identity)?,
            None => {
                let source = Source {
                    listen: listen.ip(),
                    mark: config.fwmark,
                };
                config.set_identity_address(own_identity(source, &endpoints)?)?;
            }
        }
    }
    if let Some(old) = old {
        old.keep_private_key(&mut config)?;
    }
    check_own_key(&config, &overlay)?;
    let prefixes = overlay.prefixes().map(|(prefix, ..)| prefix);
    let settings = Settings::at_start(&config, &endpoints, prefixes, &mut netlink);
    let (settings, unreachable) = settings.map_err(|error| {
        // Why nothing is known of the peers says more than that there is nothing to
        // derive an address from.
        let is_for_lack_of_peers = endpoints.is_empty() && config.addresses.is_empty();
        match unusable.drain(..).next() {
            Some(reason) if is_for_lack_of_peers => reason,
            _ => error,
        }
    })?;
    unusable.extend(unreachable);
    let mut plan = Plan {
        config,
        settings,
        overlay,
    };
    let mut aside = plan.check_addresses(&mut netlink, device, &[])?;
    let claimed = claim(&plan.config, &plan.settings, &mut netlink)?;
    // A device in another namespace has no routes here.
    if old.is_none() || device.is_some() {
        let wanted = kernel_routes(&plan.config, &plan.overlay);
        routes::check_free(&mut netlink, device, &wanted)?;
        let peers = old.iter().flat_map(|old| &old.peers);
        let suspended = peers.filter(|peer| peer.is_suspended);
        let suspended = suspended.filter_map(|peer| peer.endpoint).collect();
        aside.extend(plan.check_paths(&mut netlink, device, &suspended)?);
    }
    for (name, error) in aside {
        names.note_answer(&name, false, Instant::now());
        unusable.push(error);
    }
    Ok(Prepared {
        plan,
        netlink,
        names,
        claimed,
        unusable,
    })
}

/// The configured peers, and those that were added to the `old` tunnel, with the
/// addresses that it knows; and the address to listen on, as far as it is known before
/// names are resolved.
fn overlay(
    config: &Config,
    own: BTreeSet<IpAddr>,
    old: Option<&Manifest>,
) -> Result<(Overlay, SocketAddr)> {
    // Where there are names, sockets are for both IP versions unless it is said
    // otherwise.
    let port = config.listen_port.unwrap_or(DEFAULT_PORT);
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let listen = config.listen.unwrap_or(any);
    let mut overlay = Overlay::default();
    for spec in &config.peers {
        overlay.add_peer(spec, spec.prefixes.is_empty(), Origin::Config)?;
    }
    overlay.set_own_addresses(own);
    if let Some(old) = old {
        old.add_to(&mut overlay, config.shared_preshared_key().as_ref());
        let known = old.known(&overlay);
        resolve::set_known(&mut overlay, &known, listen);
    }
    Ok((overlay, listen))
}

/// Whether a tunnel could start with this configuration, or a running one take it
/// over, as far as can be told without changing anything: tells which peers could
/// not be used. `own`: the device of the running one, if there is one.
///
/// # Errors
/// What would keep it from that.
pub fn rehearse(mut config: Config, own: Option<u32>) -> Result<Vec<Error>> {
    if config.has_registry() {
        // What the network would give this host is not known before it joins.
        registry::rehearse(&mut config)?;
    }
    let prepared = prepare(config, None, own, |config, settings, netlink| {
        let own = match own {
            Some(own) => Some(own),
            None => netlink.link_index(&config.tun)?,
        };
        check_derived(netlink, config, &settings.link.addresses, own)
    });
    Ok(prepared?.unusable)
}

/// Suspends the peers to whom the path leads through the device `own`, before a new
/// process's workers send anything; tells which.
fn suspend_inside(overlay: &mut Overlay, netlink: &mut Netlink, own: Option<u32>) -> Vec<Error> {
    let mut inside = Vec::new();
    if own.is_none() {
        return inside;
    }
    let peers = overlay.peers();
    let peers = peers.filter_map(|(hop, peer)| Some((hop, peer.endpoint?)));
    for (hop, endpoint) in peers.collect::<Vec<_>>() {
        match netlink.interface_to(endpoint) {
            Ok(interface) if interface == own => {
                overlay.set_suspended(hop, true);
                let what = format!("the path to peer {endpoint} leads through the tunnel itself");
                inside.push(Error::new(what));
            }
            Ok(_) => {}
            Err(error) => tracing::debug!("{error}"),
        }
    }
    inside
}

/// What a process runs.
pub struct Begun {
    /// The tunnel.
    pub tunnel: Tunnel,
    /// The control socket, if there is one.
    pub control: Option<Server>,
    /// The socket for `wg`, if it is open already.
    pub uapi: Option<UapiServer>,
    /// Serves metrics, if that is wanted.
    pub metrics: Option<MetricsServer>,
}

/// Starts a tunnel where there is none.
///
/// # Errors
/// When something is missing or in the way; then nothing is left behind.
pub fn start(config: Config, registry: Option<Registry>) -> Result<Begun> {
    // First: the process that had the interface before has nothing more once it is free.
    let uapi = uapi::claim(&config)?;
    // Before anything of the tunnel is seen, as somebody else may have the port.
    let metrics = metrics::listen(&config, None)?;
    let mut tunnel = prepare(config, None, None, claim)?.into_tunnel()?;
    tunnel.enter_registry(registry)?;
    // First, so that whoever finds the tunnel working finds it, too. Requests wait.
    let control = serve_control(&tunnel.config, None)?;
    // The device takes no packet before it is up. What comes meanwhile, from either side,
    // waits in the queues.
    match tunnel.config.interface {
        Some(_) => tunnel.prepare_device()?,
        None => tunnel.bring_up(&[])?,
    }
    tunnel.go()?;
    tunnel.host.start_routes(&tunnel.settings.link.addresses)?;
    tunnel.set_first_routes()?;
    tunnel.open_to_containers()?;
    tunnel.poll();
    announce::announce(&tunnel);
    Ok(Begun {
        tunnel,
        control,
        uapi,
        metrics: metrics.map(metrics::serve).transpose()?,
    })
}

/// Opens the control socket, or goes on with another process's `listener`.
///
/// # Errors
/// When it was asked for and cannot be opened.
pub fn serve_control(config: &Config, listener: Option<OwnedFd>) -> Result<Option<Server>> {
    let path = &config.control_path();
    let server = match listener {
        Some(listener) => Server::from_listener(listener, path),
        None => Server::start(path),
    };
    match server {
        Ok(server) => {
            tracing::debug!("control socket: {}", path.display());
            Ok(Some(server))
        }
        // Nobody asked for it, as where /run cannot be written to.
        Err(error) if config.control.is_none() => {
            tracing::warn!(%error, "no control socket: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Claims the port and the device, and waits a moment for those of a process
/// that was just killed: io_uring lets go of them on a kernel workqueue
/// (`io_ring_exit_work` in `io_uring/io_uring.c`), some milliseconds after the
/// process.
fn claim(config: &Config, settings: &Settings, netlink: &mut Netlink) -> Result<Claimed> {
    let wait_max = match config.takeover {
        true => TAKEOVER_WAIT_MAX,
        false => PREDECESSOR_WAIT_MAX,
    };
    let deadline = Instant::now() + wait_max;
    loop {
        let name_taken = netlink.link_index(&config.tun)?.is_some();
        match claim_now(config, settings, netlink) {
            Err(error)
                if (name_taken || error.errno() == Some(libc::EADDRINUSE))
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(PREDECESSOR_WAIT_STEP);
            }
            result => return result,
        }
    }
}

fn claim_now(config: &Config, settings: &Settings, netlink: &mut Netlink) -> Result<Claimed> {
    check_derived(netlink, config, &settings.link.addresses, None)?;
    // Sockets first: they fail without a trace when the port is in use.
    let udp_wanted = UdpOffloads {
        segment: config.uses(Feature::UdpSegment),
        gro: config.uses(Feature::UdpGro),
    };
    let tun_wanted = TunOffloads {
        tcp: config.uses(Feature::Tso),
        udp: config.uses(Feature::Uso),
    };
    let sockets = udp::open(settings.listen, config.queues, udp_wanted, config.mode())?;
    let device = tun::create(&config.tun, config.queues, tun_wanted)?;
    Ok(Claimed { sockets, device })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::testbed::pair;
    use crate::wire::wireguard::secret::SharedSecret;

    /// A tunnel that is taken over.
    fn manifest(identity: Option<&str>) -> Manifest {
        Manifest {
            ok: true,
            pid: 4711,
            version: "0.1.0".into(),
            tun: "fastvpn0".into(),
            tun_index: None,
            own_ports: vec![false],
            listen: "0.0.0.0:8285".parse().unwrap(),
            is_encrypted: true,
            is_interface: false,
            private_key: None,
            is_listen_set: false,
            fwmark: None,
            identity: identity.map(str::to_string),
            tun_offloads: [true; 2],
            udp_offloads: [true; 2],
            metrics: None,
            without: Vec::new(),
            is_steered: true,
            addresses: Vec::new(),
            peers: Vec::new(),
        }
    }

    /// The address that datagrams to the peer will have, by the rules for their mark.
    #[test]
    fn an_identity_is_looked_up_with_the_mark() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), SharedSecret::generate()).unwrap();
        let secret = file.path().display();
        let flags = format!("--secret-file {secret} --address 10.7.0.1/24 --peer 10.1.0.2");
        let net = |text: &str| text.parse().unwrap();
        let addresses = [
            (net("10.1.0.1/24"), net("10.1.0.2/24")),
            (net("10.1.0.5/32"), net("10.1.0.6/32")),
        ];
        let hosts = pair(&addresses, 1500).unwrap();
        for words in [
            "route add 10.1.0.2 dev underlay0 src 10.1.0.5 table 7",
            "rule add fwmark 7 table 7",
        ] {
            let mut ip = std::process::Command::new("ip");
            ip.args(words.split(' '));
            assert!(hosts.a.run(move || ip.status().unwrap().success()));
        }
        for (mark, identity) in [(0, "10.1.0.1"), (7, "10.1.0.5")] {
            let flags = format!("{flags} --fwmark {mark}");
            let config = Config::from_words(flags.split_whitespace().map(OsStr::new)).unwrap();
            let prepared = hosts.a.run(|| {
                let prepared = prepare(config, None, None, |_, _, _| Ok(()));
                prepared.map(|prepared| prepared.plan.config).unwrap()
            });
            assert_eq!(prepared.own_identity.as_deref(), Some(identity));
        }
    }

    /// Its peers would not know the new process by another.
    #[test]
    fn a_tunnel_that_is_taken_over_keeps_its_identity() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), SharedSecret::generate()).unwrap();
        let secret = file.path().display();
        let flags = format!("--secret-file {secret} --address 10.7.0.1/24 --peer 10.1.0.2");
        let config = Config::from_words(flags.split_whitespace().map(OsStr::new)).unwrap();
        let net = |text: &str| text.parse().unwrap();
        let hosts = pair(&[(net("10.1.0.1/24"), net("10.1.0.2/24"))], 1500).unwrap();
        for (old, identity) in [
            (None, "10.1.0.1"),
            // As it was before its address changed, or an old version that does not tell.
            (Some(manifest(Some("10.1.0.9"))), "10.1.0.9"),
            (Some(manifest(None)), "10.1.0.1"),
        ] {
            let prepared = hosts.a.run(|| {
                let prepared = prepare(config.clone(), old.as_ref(), None, |_, _, _| Ok(()));
                prepared.map(|prepared| prepared.plan.config).unwrap()
            });
            assert_eq!(prepared.own_identity.as_deref(), Some(identity));
            assert_eq!(prepared.public_key(), config.key_of(identity));
        }
    }
}
