//! What goes in at one end comes out at the other.

use fastvpn::error::Result;
use fastvpn::lab::traffic::ping;

use crate::support::{PATIENCE, TUNNEL, Test, check, hosts, tunnel_between};

/// The tests of this file.
pub fn tests() -> Vec<Test> {
    vec![("pings_of_all_sizes", pings_of_all_sizes)]
}

fn pings_of_all_sizes() -> Result<()> {
    let hosts = hosts(1500)?;
    let [a, b] = tunnel_between(&hosts, &[])?;
    for bytes in [0, 1, 56, 1400, 1444, 1445, 20_000, 65_000] {
        ping(&hosts.a, TUNNEL[1].into(), bytes, PATIENCE)?;
        ping(&hosts.b, TUNNEL[0].into(), bytes, PATIENCE)?;
    }
    for end in [a, b] {
        let ended = end.stop()?;
        check(ended.status.success(), || ended.log.clone())?;
    }
    Ok(())
}
