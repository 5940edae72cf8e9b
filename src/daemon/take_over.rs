//! A tunnel taken over from another process.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use ipnet::IpNet;

use super::control_socket::ControlSocket;
use super::start::{Prepared, Suspended, suspend_inside};
use super::takeover::Inherited;
use super::tunnel::Tunnel;
use super::workers::Claimed;
use super::{announce, inherit};
use crate::error::Result;
use crate::host::link;
use crate::host::routes;
use crate::io::tun;

/// Takes a tunnel over. What is likely to fail fails while the predecessor still
/// carries the tunnel, and changes nothing that it relies on. Tells also whether a
/// reload is due.
///
/// # Errors
/// When the predecessor carries on.
pub fn take_over(
    mut prepared: Prepared,
    inherited: Inherited,
) -> Result<(Tunnel, ControlSocket, bool)> {
    let Inherited {
        manifest,
        device,
        sockets,
        udp,
        listener,
        mut predecessor,
    } = inherited;
    inherit::check(&prepared.config, &prepared.settings, &manifest)?;
    inherit::keep_wanted(&mut prepared.config.wanted, &manifest);
    let mtu_bytes = prepared.settings.link.mtu_bytes;
    inherit::inherit(&mut prepared.overlay, &manifest, mtu_bytes)?;
    prepared.resolve_now();
    let own = tun::index_of(device.queues[0].as_fd())?;
    prepared.device = own;
    prepared.set_aside();
    let suspended = std::mem::take(&mut prepared.suspended);
    let (overlay, netlink) = (&mut prepared.overlay, &mut prepared.netlink);
    log_inside(&suspend_inside(overlay, netlink, own));
    let claimed = Claimed {
        sockets,
        udp,
        device,
    };
    let mut tunnel = prepared.build(claimed)?;
    check_routes(&mut tunnel, &suspended)?;
    let (old, new) = (&manifest.addresses, &tunnel.settings.link.addresses);
    let (index, netlink) = (tunnel.host.device.index, &mut tunnel.host.netlink);
    let added = match index {
        Some(index) => link::addresses_to_add(netlink, index, old, new)?,
        None => Vec::new(),
    };
    predecessor.will_add(&added)?;
    if let Some(index) = index {
        link::add_addresses(netlink, index, &added)?;
    }
    let stopped = predecessor.stop().inspect_err(|_| {
        if let Some(index) = index {
            link::remove_addresses(netlink, index, &added);
        }
    });
    let is_reload_due = stopped?;
    let control = go_on(&mut tunnel, &manifest.addresses, listener);
    tracing::info!(
        "took over from process {}, fastvpn {}",
        manifest.pid,
        manifest.version
    );
    Ok((tunnel, control, is_reload_due))
}

/// Whether the kernel's routes will be what is wanted, and no peer in the
/// tunnel but those that are `suspended` in a predecessor's, as far as can be
/// told while its routes are in force.
///
/// # Errors
/// Names the route that is in the way, or the peer.
fn check_routes(tunnel: &mut Tunnel, suspended: &Suspended) -> Result<()> {
    let wanted = tunnel.kernel_routes();
    let own = tunnel.host.device.index;
    if own.is_none() {
        return Ok(());
    }
    let addresses = &tunnel.settings.link.addresses;
    let netlink = &mut tunnel.host.netlink;
    let peers = tunnel.peers.overlay.peers();
    for endpoint in peers.filter_map(|(_, peer)| peer.endpoint_learned()) {
        let is_suspended = suspended.contains(&endpoint);
        link::check_will_be_outside(netlink, own, endpoint, addresses, &wanted, is_suspended)?;
    }
    routes::check_free(netlink, own, &wanted)
}

/// There is nobody to go back to, and the tunnel carries, so each step is taken
/// whatever comes of the others. Operators before routes, which they can fix.
fn go_on(tunnel: &mut Tunnel, old_addresses: &[IpNet], listener: Option<OwnedFd>) -> ControlSocket {
    let mut control = ControlSocket::default();
    tunnel.workers.go();
    let brought_up = tunnel.bring_up(old_addresses);
    let served = control.open(&tunnel.config, listener);
    let routed = tunnel.take_over_routes();
    // Who cannot be reached from outside is suspended, and no more.
    tunnel.refresh_host();
    for result in [brought_up, served, routed] {
        if let Err(error) = result {
            tracing::error!("taken over, but not in full: {error}");
        }
    }
    announce::announce(tunnel);
    control
}

/// Tells of peers to whom nothing will be sent at first.
fn log_inside(inside: &[SocketAddr]) {
    let until = "through the tunnel itself: nothing is sent there until there is another";
    match inside {
        [] => {}
        [peer] => tracing::warn!("the way to peer {peer} leads {until}"),
        [peer, more @ ..] => {
            let more = more.len();
            tracing::warn!("the way to peer {peer} (and to {more} more) leads {until}");
        }
    }
}
