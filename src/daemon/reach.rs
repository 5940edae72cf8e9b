//! Whether an address may be a peer's, and a prefix one of a peer's prefixes.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_peer_is_another_hosts_and_can_be_sent_to() {
        let mut overlay = Overlay::default();
        overlay.set_own_addresses(BTreeSet::from(["10.0.0.1".parse().unwrap()]));
        let check = |listen: &str, endpoint: &str| {
            let (listen, endpoint) = (listen.parse().unwrap(), endpoint.parse().unwrap());
            let checked = check_endpoint(listen, &overlay, endpoint);
            checked.map_err(|error| error.to_string())
        };
        for (listen, endpoint) in [
            ("0.0.0.0:1", "10.0.0.2:1"),
            ("0.0.0.0:1", "10.0.0.1:2"),
            ("[::]:1", "10.0.0.2:1"),
            ("[::]:1", "[fd00::2]:1"),
            ("10.0.0.3:1", "10.0.0.1:1"),
        ] {
            assert_eq!(check(listen, endpoint), Ok(()));
        }
        for (listen, endpoint, part) in [
            ("0.0.0.0:1", "0.0.0.0:1", "not the address of a host"),
            ("0.0.0.0:1", "[fd00::2]:1", "--listen [::]"),
            ("[fd00::1]:1", "10.0.0.2:1", "--listen [::]"),
            ("0.0.0.0:1", "10.0.0.1:1", "this host itself"),
            ("[::]:1", "127.0.0.1:1", "this host itself"),
            ("10.0.0.3:1", "10.0.0.3:1", "this host itself"),
        ] {
            let refused = check(listen, endpoint).unwrap_err();
            assert!(refused.contains(part), "{refused}");
        }
    }
}
