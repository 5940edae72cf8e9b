//! Whether an address may be a peer's, and a prefix behind it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::error::{Error, Result};
use crate::host::path;
use crate::routing::overlay::Overlay;

/// Makes sure that sockets on `listen` can send to `endpoint`, and that it is
/// another host's. One that cannot be reached now may be later.
///
/// # Errors
/// When it is not the address of a host, of an IP version that the sockets are not for,
/// or this host's own; names it.
pub fn check_endpoint(listen: SocketAddr, overlay: &Overlay, endpoint: SocketAddr) -> Result<()> {
    check_configured(listen, overlay, endpoint)?;
    // The kernel knows of addresses that no interface has, such as those of a
    // `local` route.
    match path::local_address(listen.ip(), endpoint) {
        Ok(local) => path::check_other(listen, endpoint, local),
        Err(_) => Ok(()),
    }
}

/// As [`check_endpoint`], by the own addresses that the overlay has: for a change
/// of these, of which the kernel knows nothing yet.
///
/// # Errors
/// As [`check_endpoint`].
pub fn check_configured(listen: SocketAddr, overlay: &Overlay, endpoint: SocketAddr) -> Result<()> {
    if !path::is_host(endpoint) {
        return Err(Error::new(format!(
            "{endpoint} is not the address of a host"
        )));
    }
    let is_dual_stack = listen.is_ipv6() && listen.ip().is_unspecified();
    if !is_dual_stack && listen.is_ipv6() != endpoint.is_ipv6() {
        let error = Error::new(format!("cannot send to {endpoint} from {listen}"));
        return Err(error.hint("start with --listen [::] to have peers of both IP versions"));
    }
    match overlay.leads_back(listen, endpoint) {
        true => path::check_other(listen, endpoint, endpoint.ip()),
        false => Ok(()),
    }
}

/// Makes sure that no prefix is just one of this host's `own` addresses, to which
/// a peer's prefixes never apply.
///
/// # Errors
/// Names the prefix.
pub fn check_prefixes(
    own: &BTreeSet<IpAddr>,
    mut prefixes: impl Iterator<Item = IpNet>,
) -> Result<()> {
    let is_own =
        |net: &IpNet| net.prefix_len() == net.max_prefix_len() && own.contains(&net.addr());
    match prefixes.find(is_own) {
        Some(net) => Err(
            Error::new(format!("{net} is this host's own address, not a peer's"))
                .hint("leave it out of the peer's prefixes"),
        ),
        None => Ok(()),
    }
}
