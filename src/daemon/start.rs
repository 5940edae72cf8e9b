//! The start of a tunnel: names resolved, port and device claimed or taken
//! over.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use ipnet::IpNet;

use super::host::{own_addresses, suspend_inside};
use super::reach;
use crate::config::DEFAULT_PORT;
use crate::config::{Config, Settled};
use crate::config::{Listen, PeerName};
use crate::control::client;
use crate::daemon::engine::Engine;
use crate::daemon::workers::Setup;
use crate::dataplane::inbound::ReceivedProbe;
use crate::dataplane::table::Table;
use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::Netlink;
use crate::host::path;
use crate::host::routes;
use crate::io::tun;
use crate::io::udp::{self, WorkerSockets};
use crate::packet::coalesce;
use crate::packet::train::Limits;
use crate::routing::dns::{self, Answer, Names};
use crate::routing::overlay::{Origin, Overlay, Peer};

/// How long, and how often, a killed predecessor's port and device are waited
/// for. Longer than the kernel takes; short enough for who has mistyped.
const PREDECESSOR_WAIT_MAX: Duration = Duration::from_secs(1);
/// The same for one that died while it handed over, on a machine that may be busy.
const TAKEOVER_WAIT_MAX: Duration = Duration::from_secs(5);
const PREDECESSOR_WAIT_STEP: Duration = Duration::from_millis(10);

/// How long names have at the start. What does not resolve until then is
/// waited for while the tunnel runs.
const NAMES_WAIT_MAX: Duration = Duration::from_secs(5);

/// Addresses of peers by name, `HOST:PORT`, that a predecessor knows.
pub type Known = HashMap<String, SocketAddr>;

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
    pub settled: Settled,
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
        let listen = self.settled.listen;
        set_known(&mut self.overlay, &self.known, listen);
        resolve_now(&mut self.overlay, &mut self.names, listen);
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
        let (own, addresses) = (self.device, &self.settled.link.addresses);
        let named: Vec<_> = self
            .overlay
            .peers()
            .filter(|(_, peer)| peer.name.literal().is_none())
            .filter_map(|(hop, peer)| Some((hop, peer.name.clone(), peer.endpoint?)))
            .collect();
        for (hop, name, peer) in named {
            let is_suspended = self.suspended.contains(&peer);
            let netlink = &mut self.netlink;
            let other = self.overlay.check_other(self.settled.listen, peer);
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
    let (mut overlay, mut unresolved) = resolve(&config, &mut names, &known, own)?;
    // The way through the tunnel says nothing of the paths outside.
    let inside = match config.takeover {
        true => suspend_inside(&mut overlay, &mut netlink, device),
        false => Vec::new(),
    };
    let endpoints = endpoints(&config, &overlay);
    let mut settled = config.settle(&endpoints).map_err(|error| {
        // Why nothing is known of the peers says more than that there is
        // nothing to derive an address from.
        let is_for_lack_of_peers = endpoints.is_empty() && config.addresses.is_empty();
        let inside = inside.first().copied().map(way_is_inside);
        match unresolved.drain(..).next().or(inside) {
            Some(reason) if is_for_lack_of_peers => reason,
            _ => error,
        }
    })?;
    let mut unusable = std::mem::take(&mut settled.unreachable);
    unusable.extend(unresolved);
    let addresses = &settled.link.addresses;
    let present = own_addresses(&mut netlink, &[])?;
    let literal = |peer: &&Peer| peer.name.literal().is_some();
    let literals = overlay.peers().map(|(_, peer)| peer).filter(literal);
    reach::check_addresses(addresses, &present, literals)?;
    if !settled.address_is_derived {
        link::check_networks(&mut netlink, device, addresses)?;
    }
    let own: BTreeSet<_> = addresses.iter().map(IpNet::addr).collect();
    reach::check_prefixes(&own, overlay.prefixes().map(|(prefix, ..)| prefix))?;
    overlay.set_own_addresses(present.into_iter().chain(own).collect());
    let literals = overlay.peers().map(|(_, peer)| peer).filter(literal);
    literals
        .filter_map(|peer| peer.endpoint)
        .try_for_each(|endpoint| overlay.check_other(settled.listen, endpoint))?;
    Ok(Prepared {
        config,
        settled,
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
        settled,
        overlay,
        netlink,
        unusable,
        device,
        ..
    } = &mut prepared;
    let (own, addresses) = (*device, &settled.link.addresses);
    if settled.address_is_derived {
        check_derived(netlink, settled, own)?;
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

/// What all workers have in common.
pub fn setup(
    config: &Config,
    tun: coalesce::TunOffloads,
    udp: udp::UdpOffloads,
    table: &Arc<Table>,
    probes: Sender<ReceivedProbe>,
) -> Setup {
    Setup {
        tun,
        limits: Limits {
            segments_max: if udp.segment {
                Limits::FULL.segments_max
            } else {
                1
            },
            ..Limits::FULL
        },
        engine: Engine::choose(config.io),
        busy_poll: config.busy_poll,
        cores: config.cores.clone(),
        table: Arc::clone(table),
        probes,
    }
}

/// The configured peers, with the addresses of those that are known or whose
/// names resolve now, and why the others do not. `own`: this host's addresses.
///
/// # Errors
/// When the configuration contradicts itself.
fn resolve(
    config: &Config,
    names: &mut Names,
    known: &Known,
    own: BTreeSet<IpAddr>,
) -> Result<(Overlay, Vec<Error>)> {
    let mut overlay = Overlay::new(0);
    for spec in &config.peers {
        overlay.add_peer(spec, Origin::Config)?;
    }
    overlay.set_own_addresses(own);
    // Where there are names, sockets are for both IP versions unless it is said
    // otherwise.
    let any = Listen {
        ip: Ipv6Addr::UNSPECIFIED.into(),
        port: DEFAULT_PORT,
    };
    let Listen { ip, port } = config.listen.unwrap_or(any);
    let listen = SocketAddr::new(ip, port);
    set_known(&mut overlay, known, listen);
    let failed = resolve_now(&mut overlay, names, listen);
    Ok((overlay, failed))
}

/// The prefixes that the kernel should route into the tunnel.
pub fn kernel_routes(config: &Config, overlay: &Overlay) -> BTreeSet<IpNet> {
    let mut wanted = match config.no_routes {
        true => Default::default(),
        false => overlay.kernel_routes(),
    };
    wanted.extend(config.routes.iter().map(IpNet::trunc));
    wanted
}

/// Gives peers that have no address yet theirs, as far as names resolve within
/// a few seconds; tells why the others do not. Names that did not resolve a
/// moment ago are not waited for again. An address that cannot be a peer's, for
/// sockets on `listen`, is as good as none.
fn resolve_now(overlay: &mut Overlay, names: &mut Names, listen: SocketAddr) -> Vec<Error> {
    let now = Instant::now();
    set_literals(overlay);
    let is_named = |peer: &&Peer| peer.name.literal().is_none();
    let all = overlay.peers().map(|(_, peer)| peer);
    names.watch(all.filter(is_named).map(|peer| &peer.name), now);
    let mut waiting: HashSet<PeerName> = overlay
        .peers_by_name()
        .filter(|peer| peer.endpoint.is_none() && names.is_expected(&peer.name, now))
        .map(|peer| peer.name.clone())
        .collect();
    let deadline = now + NAMES_WAIT_MAX;
    let mut failed: Vec<(PeerName, Error)> = Vec::new();
    while !waiting.is_empty() {
        let now = Instant::now();
        names.tick(now);
        let Ok(answer) = names
            .answers()
            .recv_timeout(deadline.saturating_duration_since(now))
        else {
            let late = overlay.peers_by_name().map(|peer| &peer.name);
            failed.extend(
                late.filter(|name| waiting.contains(name))
                    .map(|name| (name.clone(), no_answer_yet(name))),
            );
            break;
        };
        // One that failed may have been asked for again in the meantime: its
        // answer is not one of those that are still to come.
        let Answer { name, result } = answer;
        waiting.remove(&name);
        failed.retain(|(failed, _)| *failed != name);
        let Some((hop, peer)) = overlay.find(&name) else {
            continue;
        };
        let endpoint = result.and_then(|addresses| {
            let addresses = dns::in_order(addresses, peer.endpoint, false);
            let check = |endpoint| reach::check_endpoint(listen, overlay, endpoint);
            dns::first_usable(&name, addresses, check)
        });
        names.heard(&name, endpoint.is_ok(), Instant::now());
        match endpoint {
            Ok(endpoint) => {
                overlay.set_endpoint(hop, Some(endpoint));
            }
            Err(error) => failed.push((name, error)),
        }
    }
    failed.into_iter().map(|(_, error)| error).collect()
}

fn no_answer_yet(name: &PeerName) -> Error {
    Error::new(format!("cannot resolve peer {}: no answer yet", name.host))
        .hint("check the name, or give the address")
}

/// Gives peers the addresses that are known already. Their names are asked for
/// all the same, but nobody waits for the answers.
fn set_known(overlay: &mut Overlay, known: &Known, listen: SocketAddr) {
    let found: Vec<_> = overlay
        .peers_by_name()
        .filter(|peer| peer.endpoint.is_none())
        .filter_map(|peer| Some((peer.name.clone(), *known.get(&peer.name.to_string())?)))
        .filter(|(_, endpoint)| overlay.check_other(listen, *endpoint).is_ok())
        .collect();
    for (name, endpoint) in found {
        if let Some((hop, _)) = overlay.find(&name) {
            let mut configured = endpoint;
            configured.set_port(name.port);
            overlay.set_endpoint(hop, Some(configured));
            if configured != endpoint {
                overlay.set_learned_port(hop, Some(endpoint.port()));
            }
        }
    }
}

/// Gives peers whose names are addresses these.
pub fn set_literals(overlay: &mut Overlay) {
    let literals: Vec<_> = overlay
        .peers()
        .filter(|(_, peer)| peer.endpoint.is_none())
        .filter_map(|(hop, peer)| Some((hop, peer.name.literal()?)))
        .collect();
    for (hop, endpoint) in literals {
        overlay.set_endpoint(hop, Some(endpoint));
    }
}

/// Endpoints of the peers that have one, in the order of the configuration.
pub fn endpoints(config: &Config, overlay: &Overlay) -> Vec<SocketAddr> {
    config
        .peers
        .iter()
        .filter_map(|spec| overlay.find(&spec.name)?.1.endpoint_in_use())
        .collect()
}

/// What exists once in a namespace: the port and the device.
pub struct Claimed {
    /// The workers' sockets.
    pub sockets: Vec<WorkerSockets>,
    /// Offloads of the sockets.
    pub udp: udp::UdpOffloads,
    /// The device.
    pub device: tun::Tun,
}

/// Claims the port and the device, and waits a moment for those of a process
/// that was just killed: io_uring lets go of them on a kernel workqueue
/// (`io_ring_exit_work` in `io_uring/io_uring.c`), some milliseconds after the
/// process.
///
/// # Errors
/// When another has them, or they are not to be had.
pub fn claim(config: &Config, settled: &Settled, netlink: &mut Netlink) -> Result<Claimed> {
    let wait_max = match config.takeover {
        true => TAKEOVER_WAIT_MAX,
        false => PREDECESSOR_WAIT_MAX,
    };
    let deadline = Instant::now() + wait_max;
    loop {
        let name_taken = netlink.link_index(&config.tun)?.is_some();
        match claim_now(config, settled, netlink) {
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

fn claim_now(config: &Config, settled: &Settled, netlink: &mut Netlink) -> Result<Claimed> {
    if settled.address_is_derived {
        check_derived(netlink, settled, None)?;
    }
    // Sockets first: they fail without a trace when the port is in use.
    let (sockets, udp) = udp::open(settled.listen, config.queues, config.wanted.udp)?;
    let device = tun::create(&config.tun, config.queues, config.wanted.tun)?;
    Ok(Claimed {
        sockets,
        udp,
        device,
    })
}

/// `own`: the device, if the tunnel has it already.
fn check_derived(netlink: &mut Netlink, settled: &Settled, own: Option<u32>) -> Result<()> {
    settled
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
    use super::*;

    const ANY: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), DEFAULT_PORT);

    fn name(host: &str) -> PeerName {
        PeerName {
            host: host.to_string(),
            port: 8285,
        }
    }

    /// An overlay with peers of these names.
    fn overlay(hosts: &[&str]) -> Overlay {
        let mut overlay = Overlay::new(0);
        for (host, number) in hosts.iter().zip(0..) {
            let prefix = ipnet::IpNet::from(std::net::IpAddr::from([10, 0, 0, number]));
            overlay
                .insert_peer(&name(host), false, &[prefix], Origin::Config)
                .unwrap();
        }
        overlay
    }

    fn endpoint(overlay: &Overlay, host: &str) -> Option<SocketAddr> {
        overlay.find(&name(host)).unwrap().1.endpoint
    }

    fn answer(host: &str, address: Option<&str>) -> Answer {
        Answer {
            name: name(host),
            result: match address {
                Some(address) => Ok(address.split(' ').map(|one| one.parse().unwrap()).collect()),
                None => Err(Error::new(format!("no {host}"))),
            },
        }
    }

    /// The second answer about one name is not taken for that about another.
    #[test]
    fn a_name_that_fails_twice_keeps_no_other_from_being_waited_for() {
        let (mut names, asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["bad", "slow", "slower"]);
        let server = std::thread::spawn(move || {
            let mut first: Vec<_> = asked.iter().take(3).map(|name| name.host).collect();
            first.sort();
            answers.send(answer("bad", None)).unwrap();
            // Until "bad" is due again, at the next look.
            std::thread::sleep(Duration::from_millis(1100));
            answers.send(answer("slow", Some("10.1.0.1:8285"))).unwrap();
            let again = asked.recv().unwrap().host;
            answers.send(answer(&again, None)).unwrap();
            answers
                .send(answer("slower", Some("10.1.0.2:8285")))
                .unwrap();
            (first, again)
        });
        let failed = resolve_now(&mut overlay, &mut names, ANY);
        let (first, again) = server.join().unwrap();
        assert_eq!(first, ["bad", "slow", "slower"]);
        assert_eq!(again, "bad");
        assert_eq!(endpoint(&overlay, "bad"), None);
        for (host, address) in [("slow", "10.1.0.1:8285"), ("slower", "10.1.0.2:8285")] {
            assert_eq!(endpoint(&overlay, host), Some(address.parse().unwrap()));
        }
        let failed: Vec<_> = failed.iter().map(ToString::to_string).collect();
        assert_eq!(failed, ["no bad"]);
    }

    /// Not even a name server that is silent holds up a successor.
    #[test]
    fn what_is_known_is_asked_for_but_not_waited_for() {
        let (mut names, asked, _answers) = Names::without_threads();
        let mut overlay = overlay(&["known"]);
        let other = ("other:8285".to_string(), "10.1.0.9:8285".parse().unwrap());
        let known = ("known:8285".to_string(), "10.1.0.1:8285".parse().unwrap());
        set_known(&mut overlay, &Known::from([other, known.clone()]), ANY);
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        assert_eq!(endpoint(&overlay, "known"), Some(known.1));
        names.tick(Instant::now());
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("known")]);
    }

    /// A successor's peers stay where they are if they may be there.
    #[test]
    fn what_is_known_stays_while_it_is_among_the_answers() {
        let (mut names, _asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["kept", "moved", "new"]);
        let known = ["kept", "moved"]
            .map(|host| (format!("{host}:8285"), "10.1.0.2:8285".parse().unwrap()));
        set_known(&mut overlay, &known.into(), ANY);
        for (host, addresses) in [
            ("kept", "10.1.0.3:8285 10.1.0.1:8285 10.1.0.2:8285"),
            ("moved", "10.1.0.3:8285 10.1.0.1:8285"),
            ("new", "10.1.0.3:8285 10.1.0.1:8285 10.1.0.2:8285"),
        ] {
            answers.send(answer(host, Some(addresses))).unwrap();
        }
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        for (host, address) in [
            ("kept", "10.1.0.2:8285"),
            ("moved", "10.1.0.3:8285"),
            ("new", "10.1.0.3:8285"),
        ] {
            assert_eq!(
                endpoint(&overlay, host),
                Some(address.parse().unwrap()),
                "{host}"
            );
        }
    }

    /// As a successor does, for the peers that it inherits.
    #[test]
    fn what_was_asked_for_in_vain_is_not_waited_for_again() {
        let (mut names, asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["bad", "good"]);
        answers.send(answer("bad", None)).unwrap();
        answers.send(answer("good", Some("10.1.0.1:8285"))).unwrap();
        assert_eq!(resolve_now(&mut overlay, &mut names, ANY).len(), 1);
        assert_eq!(asked.try_iter().count(), 2);
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        assert_eq!(asked.try_iter().count(), 0);
        // One that is new is.
        overlay
            .insert_peer(&name("new"), true, &[], Origin::Runtime)
            .unwrap();
        answers.send(answer("new", Some("10.1.0.3:8285"))).unwrap();
        assert!(resolve_now(&mut overlay, &mut names, ANY).is_empty());
        assert_eq!(asked.try_iter().collect::<Vec<_>>(), [name("new")]);
        assert!(endpoint(&overlay, "new").is_some());
    }

    #[test]
    fn who_is_late_is_named() {
        let (mut names, _asked, answers) = Names::without_threads();
        let mut overlay = overlay(&["early", "late"]);
        answers
            .send(answer("early", Some("10.1.0.1:8285")))
            .unwrap();
        // Nobody will answer any more, which is as good as too late.
        drop(answers);
        let failed = resolve_now(&mut overlay, &mut names, ANY);
        let failed: Vec<_> = failed.iter().map(ToString::to_string).collect();
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert!(failed[0].starts_with("cannot resolve peer late: no answer yet"));
    }
}
