//! The start of a tunnel: names resolved, port and device claimed, and everything
//! set up; or taken over ([`super::handoff`]).

use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, tick};
use ipnet::IpNet;

use super::control_socket::ControlSocket;
use super::host::own_addresses;
use super::resolve::{self, Known};
use super::settings::Settings;
use super::tunnel::{Plan, Tunnel, endpoints, kernel_routes};
use super::workers::Claimed;
use super::{announce, reach};
use crate::config::Config;
use crate::control::client;
use crate::control::server::Call;
use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::Netlink;
use crate::host::path;
use crate::host::routes;
use crate::io::tun;
use crate::io::udp::{self, UdpOffloads};
use crate::packet::coalesce::TunOffloads;
use crate::routing::dns::{self, Names};
use crate::routing::overlay::{Overlay, Peer};

/// How often it is said how far a long start is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// How long, and how often, a killed predecessor's port and device are waited
/// for. Longer than the kernel takes; short enough for who has mistyped.
const PREDECESSOR_WAIT_MAX: Duration = Duration::from_secs(1);
/// The same for one that died while it handed over, on a machine that may be busy.
const TAKEOVER_WAIT_MAX: Duration = Duration::from_secs(5);
const PREDECESSOR_WAIT_STEP: Duration = Duration::from_millis(10);

/// Addresses of peers to whom a predecessor sends nothing, because the way there
/// leads through the tunnel itself.
pub type Suspended = HashSet<SocketAddr>;

/// What the tunnel that is to be taken over knows of its peers. If it does not
/// say, their names are resolved as at any start.
pub fn ask_predecessor(config: &Config) -> (Known, Suspended) {
    let peers = match client::peers(&config.control, PREDECESSOR_WAIT_MAX) {
        Ok(peers) => peers.peers,
        Err(error) => {
            tracing::debug!("{error}");
            return Default::default();
        }
    };
    let suspended = peers.iter().filter(|peer| peer.is_suspended);
    let suspended = suspended.filter_map(|peer| peer.endpoint).collect();
    let known = peers
        .into_iter()
        .filter_map(|peer| Some((peer.peer, peer.endpoint?)));
    (known.collect(), suspended)
}

/// What any start begins with: what is wanted, and what follows from it here
/// and now.
pub struct Prepared {
    /// The configuration.
    pub config: Config,
    /// What it left open.
    pub settings: Settings,
    /// The configured peers.
    pub overlay: Overlay,
    /// In the tunnel's network namespace.
    pub netlink: Netlink,
    /// Asks for the peers' names.
    pub names: Names,
    /// Index of the device that there is already, if it is in this namespace.
    pub device: Option<u32>,
    /// To whom the tunnel that is to be taken over sends nothing.
    pub suspended: Suspended,
    known: Known,
    /// Peers that cannot be used yet, and why.
    unusable: Vec<Error>,
}

impl Prepared {
    /// Gives peers that were added since their addresses.
    pub fn resolve_now(&mut self) {
        let listen = self.settings.listen;
        resolve::set_known(&mut self.overlay, &self.known, listen);
        resolve::resolve_now(&mut self.overlay, &mut self.names, listen);
    }

    /// Takes those addresses of named peers for none that are this host's, or to
    /// which the tunnel's routes will lead: their names are asked for again.
    pub fn set_aside(&mut self) {
        self.find_unusable();
        for error in self.unusable.drain(..) {
            tracing::warn!("{error}; trying again");
        }
    }

    fn find_unusable(&mut self) {
        let routes = kernel_routes(&self.config, &self.overlay);
        let (own, addresses) = (self.device, &self.settings.link.addresses);
        let named: Vec<_> = self
            .overlay
            .peers()
            .filter(|(_, peer)| peer.name.literal().is_none())
            .filter_map(|(hop, peer)| Some((hop, peer.name.clone(), peer.endpoint?)))
            .collect();
        for (hop, name, peer) in named {
            let is_suspended = self.suspended.contains(&peer);
            let netlink = &mut self.netlink;
            let other = self.overlay.check_other(self.settings.listen, peer);
            let usable = other.and_then(|()| {
                link::check_will_be_outside(netlink, own, peer, addresses, &routes, is_suspended)
            });
            if let Err(error) = usable {
                self.overlay.set_endpoint(hop, None);
                self.names.heard(&name, false, Instant::now());
                self.unusable.push(dns::cannot_use(&name, &error));
            }
        }
    }

    /// The tunnel on this device and these sockets, with workers that wait.
    ///
    /// # Errors
    /// As [`Tunnel::new`].
    pub fn build(self, claimed: Claimed) -> Result<Tunnel> {
        let plan = Plan {
            config: self.config,
            settings: self.settings,
            overlay: self.overlay,
        };
        Tunnel::new(plan, self.names, self.netlink, claimed)
    }

    /// Forgets to whom the way led through a device that goes with a process that
    /// is not there any more.
    pub fn suspend_nobody(&mut self) {
        let hops: Vec<_> = self.overlay.peers().map(|(hop, _)| hop).collect();
        for hop in hops {
            self.overlay.set_suspended(hop, false);
        }
    }
}

/// Looks the peers up and settles what the configuration leaves open.
///
/// # Errors
/// When the configuration cannot be had on this host.
pub fn prepare(config: Config) -> Result<Prepared> {
    let mut netlink = Netlink::open()?;
    let listen = config.listen.map(|listen| listen.ip);
    let mut names = Names::start(move |name| path::resolve_all(&name.host, name.port, listen))?;
    let (known, suspended) = match config.takeover {
        true => ask_predecessor(&config),
        false => Default::default(),
    };
    let device = present_device(&config, &mut netlink)?;
    let own = own_addresses(&mut netlink, &config.addresses)?;
    let (mut overlay, mut unresolved) = resolve::resolve(&config, &mut names, &known, own)?;
    // The way through the tunnel says nothing of the paths outside.
    let inside = match config.takeover {
        true => suspend_inside(&mut overlay, &mut netlink, device),
        false => Vec::new(),
    };
    let endpoints = endpoints(&config, &overlay);
    let (settings, mut unusable) =
        Settings::at_start(&config, &endpoints, &mut netlink).map_err(|error| {
            // Why nothing is known of the peers says more than that there is
            // nothing to derive an address from.
            let is_for_lack_of_peers = endpoints.is_empty() && config.addresses.is_empty();
            let inside = inside.first().copied().map(way_is_inside);
            match unresolved.drain(..).next().or(inside) {
                Some(reason) if is_for_lack_of_peers => reason,
                _ => error,
            }
        })?;
    unusable.extend(unresolved);
    let addresses = &settings.link.addresses;
    let present = own_addresses(&mut netlink, &[])?;
    let literal = |peer: &&Peer| peer.name.literal().is_some();
    let literals = overlay.peers().map(|(_, peer)| peer).filter(literal);
    reach::check_addresses(addresses, &present, literals)?;
    if !settings.address_is_derived {
        link::check_networks(&mut netlink, device, addresses)?;
    }
    let own: BTreeSet<_> = addresses.iter().map(IpNet::addr).collect();
    reach::check_prefixes(&own, overlay.prefixes().map(|(prefix, ..)| prefix))?;
    overlay.set_own_addresses(present.into_iter().chain(own).collect());
    let literals = overlay.peers().map(|(_, peer)| peer).filter(literal);
    literals
        .filter_map(|peer| peer.endpoint)
        .try_for_each(|endpoint| overlay.check_other(settings.listen, endpoint))?;
    Ok(Prepared {
        config,
        settings,
        overlay,
        netlink,
        names,
        device,
        suspended,
        known,
        unusable,
    })
}

/// Index of the device of this name, or of that which is to be taken over, whatever
/// it is called by now.
fn present_device(config: &Config, netlink: &mut Netlink) -> Result<Option<u32>> {
    if config.takeover {
        match client::status(&config.control, PREDECESSOR_WAIT_MAX) {
            Ok(status) => return Ok(status.tun_index),
            Err(error) => tracing::debug!("{error}"),
        }
    }
    netlink.link_index(&config.tun)
}

/// Whether a tunnel could start with this configuration, or a running one take it
/// over, as far as can be told without changing anything: tells which peers could
/// not be used.
///
/// # Errors
/// What would keep it from that.
pub fn rehearse(mut config: Config) -> Result<Vec<Error>> {
    config.takeover = false;
    let mut prepared = prepare(config)?;
    prepared.find_unusable();
    let Prepared {
        config,
        settings,
        overlay,
        netlink,
        unusable,
        device,
        ..
    } = &mut prepared;
    let (own, addresses) = (*device, &settings.link.addresses);
    if settings.address_is_derived {
        check_derived(netlink, settings, own)?;
    }
    let routes = kernel_routes(config, overlay);
    for (_, peer) in overlay.peers() {
        if let Some(endpoint) = peer.endpoint {
            link::check_will_be_outside(netlink, own, endpoint, addresses, &routes, false)?;
        }
    }
    routes::check_free(netlink, own, &routes)?;
    Ok(std::mem::take(unusable))
}

fn way_is_inside(peer: SocketAddr) -> Error {
    Error::new(format!(
        "there is nothing to derive a tunnel address from: the way to peer {peer} leads through \
         the tunnel itself"
    ))
    .hint("give this host's tunnel address with --address")
}

/// Suspends the peers to whom the way leads through the device `own`, and no
/// others: for a successor, before its workers send anything. Returns the peers'
/// addresses.
pub fn suspend_inside(
    overlay: &mut Overlay,
    netlink: &mut Netlink,
    own: Option<u32>,
) -> Vec<SocketAddr> {
    if own.is_none() {
        return Vec::new();
    }
    let peers: Vec<_> = overlay
        .peers()
        .filter_map(|(hop, peer)| Some((hop, peer.endpoint?)))
        .collect();
    let mut inside = Vec::new();
    for (hop, endpoint) in peers {
        match netlink.interface_to_endpoint(endpoint) {
            Ok(way) => {
                let is_inside = way == own;
                overlay.set_suspended(hop, is_inside);
                inside.extend(is_inside.then_some(endpoint));
            }
            Err(error) => tracing::debug!("{error}"),
        }
    }
    inside
}

/// Starts a tunnel where there is none.
///
/// # Errors
/// When it cannot be had; then nothing is left behind.
pub fn start(mut prepared: Prepared) -> Result<(Tunnel, ControlSocket)> {
    let (config, settings) = (&prepared.config, &prepared.settings);
    let claimed = claim(config, settings, &mut prepared.netlink)?;
    prepared.set_aside();
    let (mut tunnel, mut control) = (prepared.build(claimed)?, ControlSocket::default());
    match open(&mut tunnel, &mut control) {
        Ok(()) => Ok((tunnel, control)),
        Err(error) => {
            tunnel.take_down();
            control.close(true);
            Err(error)
        }
    }
}

/// What the host sees of a tunnel.
fn open(tunnel: &mut Tunnel, control: &mut ControlSocket) -> Result<()> {
    // Packets that come the moment the link is up find their worker.
    tunnel.workers.go();
    tunnel.bring_up(&[])?;
    tunnel.host.start_routes(&tunnel.settings.link.addresses)?;
    control.open(&tunnel.config, None)?;
    set_first_routes(tunnel, control)?;
    tunnel.check_outside(&tunnel.peers.overlay.clone())?;
    announce::announce(tunnel);
    Ok(())
}

/// Sets the routes. Many take their time: how far it is goes to the log, and
/// to whoever asks by the control socket.
fn set_first_routes(tunnel: &mut Tunnel, control: &ControlSocket) -> Result<()> {
    let wanted = tunnel.kernel_routes();
    let (tun, count) = (&tunnel.config.tun, wanted.len());
    let routes = tunnel.host.routes()?;
    let set = routes.begin_set(wanted.clone())?;
    report_until(&set, &control.calls(), &tick(PROGRESS_INTERVAL), || {
        format!("{tun} is starting: {count} routes are being set")
    })?;
    tunnel.host.note_routes(wanted);
    Ok(())
}

/// Waits for an answer. From the first tick on, logs the `progress` at each, and
/// refuses `calls` with it.
fn report_until(
    done: &Receiver<Result<()>>,
    calls: &Receiver<Call>,
    ticks: &Receiver<Instant>,
    progress: impl Fn() -> String,
) -> Result<()> {
    let mut refused = never();
    loop {
        select! {
            recv(done) -> result => {
                return result.unwrap_or_else(|_| Err(Error::new("the routes were not set")));
            }
            recv(ticks) -> _ => {
                tracing::info!("{}", progress());
                refused = calls.clone();
            }
            recv(refused) -> call => match call {
                Ok(Call::Request(_, reply)) => {
                    reply.send(Err(Error::new(progress()).hint("try again in a moment")));
                }
                Ok(Call::Takeover { .. }) => tracing::warn!(
                    "another process wants to take over while this one starts: refused"
                ),
                Err(_) => refused = never(),
            },
        }
    }
}

/// Claims the port and the device, and waits a moment for those of a process
/// that was just killed: io_uring lets go of them on a kernel workqueue
/// (`io_ring_exit_work` in `io_uring/io_uring.c`), some milliseconds after the
/// process.
///
/// # Errors
/// When another has them, or they are not to be had.
pub fn claim(config: &Config, settings: &Settings, netlink: &mut Netlink) -> Result<Claimed> {
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
    if settings.address_is_derived {
        check_derived(netlink, settings, None)?;
    }
    // Sockets first: they fail without a trace when the port is in use.
    let udp_wanted = UdpOffloads {
        segment: config.wanted.udp_segment,
        gro: config.wanted.udp_gro,
    };
    let tun_wanted = TunOffloads {
        tcp: config.wanted.tso,
        udp: config.wanted.uso,
    };
    let (sockets, udp) = udp::open(settings.listen, config.queues, udp_wanted)?;
    let device = tun::create(&config.tun, config.queues, tun_wanted)?;
    Ok(Claimed {
        sockets,
        udp,
        device,
    })
}

/// `own`: the device, if the tunnel has it already.
fn check_derived(netlink: &mut Netlink, settings: &Settings, own: Option<u32>) -> Result<()> {
    settings
        .link
        .addresses
        .iter()
        .try_for_each(|address| match address {
            IpNet::V4(address) => link::check_free(netlink, *address, own),
            IpNet::V6(_) => Ok(()),
        })
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::control::client;
    use crate::control::server::Server;

    /// Nobody who asks has to wait for the end of it.
    #[test]
    fn a_long_start_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.sock");
        let server = Server::start(&path).unwrap();
        let (ticks, ticked) = bounded(1);
        let (done, set) = bounded(1);
        let asking = std::thread::spawn(move || {
            ticks.send(Instant::now()).unwrap();
            let answers = [(); 2].map(|()| client::peers(&path, Duration::from_secs(30)));
            done.send(Ok(())).unwrap();
            answers.map(|answer| answer.unwrap_err().to_string())
        });
        report_until(&set, server.calls(), &ticked, || "starting: 3 of 9".into()).unwrap();
        for answer in asking.join().unwrap() {
            assert!(answer.contains("starting: 3 of 9; try again"), "{answer}");
        }
        let (refused, set) = bounded(1);
        refused.send(Err(Error::new("no room"))).unwrap();
        let result = report_until(&set, &never(), &never(), String::new);
        assert_eq!(result.unwrap_err().to_string(), "no room");
    }
}
