//! Whether an address may be a peer's.

use std::net::SocketAddr;

use crate::control::overlay::Overlay;
use crate::error::{Error, Result};
use crate::transport::path;

/// Makes sure that sockets on `listen` can send to `endpoint`, and that it is
/// another host's. One that cannot be reached now may be later.
///
/// # Errors
/// When it is no host's address, of an IP version that the sockets are not for,
/// or this host's own; names it.
pub fn check_endpoint(listen: SocketAddr, overlay: &Overlay, endpoint: SocketAddr) -> Result<()> {
    if endpoint.ip().is_unspecified() || endpoint.ip().is_multicast() {
        return Err(Error::new(format!("{endpoint} is no address of a host")));
    }
    let is_dual_stack = listen.is_ipv6() && listen.ip().is_unspecified();
    if !is_dual_stack && listen.is_ipv6() != endpoint.is_ipv6() {
        let error = Error::new(format!("cannot send to {endpoint} from {listen}"));
        return Err(error.hint("start with --listen [::] to have peers of both IP versions"));
    }
    // The kernel answers for now, but for the address that it would send from
    // alone; the overlay knows them all, as of its last look.
    if let Ok(local) = path::local_address(listen.ip(), endpoint) {
        path::check_other(listen, endpoint, local)?;
    }
    overlay.check_other(listen, endpoint)
}
