//! The start of a tunnel: names resolved, port and device claimed, and everything
//! set up; or taken over ([`super::handoff`]).

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::announce;
use super::control_socket::ControlSocket;
use super::host::own_addresses;
use super::plan::{Plan, SetAside, check_derived, kernel_routes};
use super::resolve::{self, Known};
use super::settings::{Settings, endpoints};
use super::tunnel::Tunnel;
use super::workers::Claimed;
use crate::config::{Config, Feature};
use crate::control::client;
use crate::error::{Error, Result};
use crate::host::netlink::Netlink;
use crate::host::path;
use crate::host::routes;
use crate::io::tun;
use crate::io::udp::{self, UdpOffloads};
use crate::packet::coalesce::TunOffloads;
use crate::routing::dns::Names;
use crate::routing::overlay::Overlay;

/// How long, and how often, a killed old process's port and device are waited
/// for. Longer than the kernel takes; short enough for who has mistyped.
const PREDECESSOR_WAIT_MAX: Duration = Duration::from_secs(1);
/// The same for one that died while it handed over, on a machine that may be busy.
const TAKEOVER_WAIT_MAX: Duration = Duration::from_secs(5);
const PREDECESSOR_WAIT_STEP: Duration = Duration::from_millis(10);

/// Addresses of peers to whom an old process sends nothing, because the way there
/// leads through the tunnel itself.
pub type Suspended = HashSet<SocketAddr>;

/// What the tunnel that is to be taken over knows of its peers. If it does not
/// say, their names are resolved as at any start.
pub fn ask_predecessor(config: &Config) -> (Known, Suspended) {
    let peers = match client::peers(&config.control_path(), PREDECESSOR_WAIT_MAX) {
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
    /// What the tunnel is to be.
    pub plan: Plan,
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
        let (listen, overlay) = (self.plan.settings.listen, &mut self.plan.overlay);
        resolve::set_known(overlay, &self.known, listen);
        resolve::resolve_now(overlay, &mut self.names, listen);
    }

    /// Makes sure that the routes will be the tunnel's and that no peer is reached by
    /// them, as far as can be told before they are there. Logs who cannot be used
    /// yet.
    ///
    /// # Errors
    /// Names the route or the peer.
    pub fn check_routes(&mut self) -> Result<()> {
        self.find_unusable()?;
        for error in self.unusable.drain(..) {
            tracing::warn!("{error}; trying again");
        }
        Ok(())
    }

    fn find_unusable(&mut self) -> Result<()> {
        let (netlink, device) = (&mut self.netlink, self.device);
        let wanted = kernel_routes(&self.plan.config, &self.plan.overlay);
        routes::check_free(netlink, device, &wanted)?;
        let aside = self.plan.check_ways(netlink, &self.suspended)?;
        self.set_aside(aside);
        Ok(())
    }

    fn set_aside(&mut self, aside: SetAside) {
        for (name, error) in aside {
            self.names.note_answer(&name, false, Instant::now());
            self.unusable.push(error);
        }
    }

    /// Forgets to whom the way led through a device that goes with a process that
    /// is not there any more.
    pub fn suspend_nobody(&mut self) {
        let overlay = &mut self.plan.overlay;
        let hops: Vec<_> = overlay.peers().map(|(hop, _)| hop).collect();
        for hop in hops {
            overlay.set_suspended(hop, false);
        }
    }
}

/// Looks the peers up and settles what the configuration leaves open.
///
/// # Errors
/// When the configuration cannot be had on this host.
pub fn prepare(config: Config) -> Result<Prepared> {
    let mut netlink = Netlink::open()?;
    let listen = config.listen.map(|listen| listen.ip());
    let mut names = Names::new(move |name| path::resolve(&name.host, name.port, listen));
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
    let mut plan = Plan {
        config,
        settings,
        overlay,
    };
    let aside = plan.check_addresses(&mut netlink, device, &[])?;
    let mut prepared = Prepared {
        plan,
        netlink,
        names,
        device,
        suspended,
        known,
        unusable,
    };
    prepared.set_aside(aside);
    Ok(prepared)
}

/// Index of the device of this name, or of that which is to be taken over, whatever
/// it is called by now.
fn present_device(config: &Config, netlink: &mut Netlink) -> Result<Option<u32>> {
    if config.takeover {
        match client::status(&config.control_path(), PREDECESSOR_WAIT_MAX) {
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
    let (netlink, own) = (&mut prepared.netlink, prepared.device);
    let plan = &prepared.plan;
    check_derived(netlink, &plan.config, &plan.settings.link.addresses, own)?;
    prepared.find_unusable()?;
    Ok(prepared.unusable)
}

fn way_is_inside(peer: SocketAddr) -> Error {
    Error::new(format!(
        "there is nothing to derive a tunnel address from: the way to peer {peer} leads through \
         the tunnel itself"
    ))
    .hint("give this host's tunnel address with --address")
}

/// Suspends the peers to whom the way leads through the device `own`, and no
/// others: for a new process, before its workers send anything. Returns the peers'
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
        match netlink.interface_to(endpoint) {
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
    let (config, settings) = (&prepared.plan.config, &prepared.plan.settings);
    let claimed = claim(config, settings, &mut prepared.netlink)?;
    prepared.check_routes()?;
    let Prepared {
        plan,
        names,
        netlink,
        ..
    } = prepared;
    let mut tunnel = Tunnel::new(plan, names, netlink, claimed)?;
    let mut control = ControlSocket::default();
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
    // First, so that whoever finds the tunnel working finds it, too. Requests wait.
    control.open(&tunnel.config, None)?;
    // Packets that come the moment the link is up find their worker.
    tunnel.workers.go();
    tunnel.bring_up(&[])?;
    tunnel.host.start_routes(&tunnel.settings.link.addresses)?;
    tunnel.host.set_routes(tunnel.kernel_routes())?;
    tunnel.poll();
    announce::announce(tunnel);
    Ok(())
}

/// Claims the port and the device, and waits a moment for those of a process
/// that was just killed: io_uring lets go of them on a kernel workqueue
/// (`io_ring_exit_work` in `io_uring/io_uring.c`), some milliseconds after the
/// process.
///
/// # Errors
/// When another has them, or they are not available.
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
    let (sockets, udp) = udp::open(settings.listen, config.queues, udp_wanted)?;
    let device = tun::create(&config.tun, config.queues, tun_wanted)?;
    Ok(Claimed {
        sockets,
        udp,
        device,
    })
}
