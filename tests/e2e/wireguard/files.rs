//! What hosts are told in files of other programs.

use fastvpn::error::Result;
use nix::sys::signal::Signal;

use super::ends::{Keys, Reach, Underlay, hosts, inside};
use crate::packets::TUNNEL_NAME;
use crate::support::{FAMILIES, Tunnel, bulk, check, link, stop, wait_for, wait_until};

/// Both hosts have a file of wg-quick's. One is marked, and is read again.
#[testbed::trial(each_engine)]
fn files_of_wg_quick() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let reach = [Reach::at(Underlay::V4.endpoint(1)), Reach::UNKNOWN];
    let start = |own: usize, more: &str| {
        let file = keys.wg_quick_file(own, reach[own], more)?;
        let host = [&hosts.a, &hosts.b][own];
        Tunnel::start(host, &["--wg-config", &file.display().to_string()])
    };
    let called = start(1, "DNS = 192.0.2.53")?;
    let mut caller = start(0, "FwMark = 0xca6c")?;
    for addresses in FAMILIES {
        wait_for(&hosts.a, addresses[1])?;
        wait_for(&hosts.b, addresses[0])?;
    }
    bulk(&hosts.a, &hosts.b, inside(1), 5)?;
    keys.wg_quick_file(0, reach[0], "FwMark = 0xca6c\nMTU = 1300")?;
    caller.child().signal(Signal::SIGHUP);
    wait_until("the device has the MTU of the file", || {
        Ok(link(&hosts.a, TUNNEL_NAME)?.mtu == 1300)
    })?;
    bulk(&hosts.b, &hosts.a, inside(0), 5)?;
    stop(caller)?;
    let log = stop(called)?.log;
    check(log.contains("DNS 192.0.2.53 is not set"), || log.clone())
}
