//! The start of a tunnel: names resolved, port and device claimed or taken
//! over.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::config::{Config, Settled};
use crate::control::names::Names;
use crate::control::overlay::{Origin, Overlay, Peer};
use crate::device::{link, tun};
use crate::error::{Error, Result};
use crate::netlink::Netlink;
use crate::transport::socket::{self, WorkerSockets};

/// How long, and how often, a killed predecessor's port and device are waited
/// for. Longer than the kernel takes; short enough for who has mistyped.
const PREDECESSOR_WAIT_MAX: Duration = Duration::from_secs(1);
const PREDECESSOR_WAIT_STEP: Duration = Duration::from_millis(10);

/// How long names have at the start. What does not resolve until then is
/// waited for while the tunnel runs.
const NAMES_WAIT_MAX: Duration = Duration::from_secs(5);

/// The configured peers, with the addresses of those whose names resolve now,
/// and why the others do not.
///
/// # Errors
/// When the configuration contradicts itself.
pub fn resolve(config: &Config, names: &mut Names) -> Result<(Overlay, Vec<Error>)> {
    let mut overlay = Overlay::new(0);
    for spec in &config.peers {
        overlay.add_peer(spec, Origin::Config)?;
    }
    let failed = resolve_now(&mut overlay, names);
    Ok((overlay, failed))
}

/// Gives peers that have no address yet theirs, as far as names resolve within
/// a few seconds; tells why the others do not.
pub fn resolve_now(overlay: &mut Overlay, names: &mut Names) -> Vec<Error> {
    let now = Instant::now();
    set_literals(overlay);
    let unknown = |peer: &Peer| peer.name.literal().is_none();
    let all = overlay.peers().map(|(_, peer)| peer);
    names.watch(all.filter(|peer| unknown(peer)).map(|peer| &peer.name), now);
    let named: Vec<_> = overlay
        .peers()
        .filter(|(_, peer)| unknown(peer) && peer.endpoint.is_none())
        .map(|(_, peer)| peer.name.clone())
        .collect();
    let deadline = now + NAMES_WAIT_MAX;
    let mut failed = Vec::new();
    let mut waiting = named.len();
    while waiting > 0 {
        let now = Instant::now();
        names.tick(now);
        let Ok(answer) = names
            .answers()
            .recv_timeout(deadline.saturating_duration_since(now))
        else {
            let first = named.first().map(|name| name.host.as_str());
            failed.push(
                Error::new(format!(
                    "cannot resolve peer {}: no answer yet",
                    first.unwrap_or_default()
                ))
                .hint("check the name, or give the address"),
            );
            break;
        };
        waiting -= 1;
        names.heard(&answer, Instant::now());
        match answer.result {
            Ok(endpoint) => {
                if let Some((hop, _)) = overlay.find(&answer.name) {
                    overlay.set_endpoint(hop, Some(endpoint));
                }
            }
            Err(error) => failed.push(error),
        }
    }
    failed
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
        .filter_map(|spec| overlay.find(&spec.endpoint)?.1.endpoint)
        .collect()
}

/// What exists once in a namespace: the port and the device.
pub struct Claimed {
    /// The workers' sockets.
    pub sockets: Vec<WorkerSockets>,
    /// Offloads of the sockets.
    pub udp: socket::Offloads,
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
    let deadline = Instant::now() + PREDECESSOR_WAIT_MAX;
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
        for address in &settled.link.addresses {
            if let ipnet::IpNet::V4(address) = address {
                link::check_free(netlink, *address)?;
            }
        }
    }
    // Sockets first: they fail without a trace when the port is in use.
    let (sockets, udp) = socket::open(settled.listen, config.queues, config.wanted.udp)?;
    let device = tun::create(&config.tun, config.queues, config.wanted.tun)?;
    Ok(Claimed {
        sockets,
        udp,
        device,
    })
}
