//! fastvpn at one end, somebody else's WireGuard at the other.

use fastvpn::error::Result;
use testbed::Pair;
use testbed::wireguard::{BORINGTUN, GOTATUN, Implementation, WIREGUARD_GO};

use super::ends::{End, Keys, Kind, Underlay, hosts, stop, tunnel};
use crate::datagrams::{Order, exchange, exchange_batches};
use crate::dataplane::traffic::{batches, directions, pings, transfer, transfer_both_ways};
use crate::support::{FAMILIES, check};

/// All that must work between the hosts, with an MTU of 1420 bytes inside.
pub fn work(hosts: &Pair) -> Result<()> {
    pings(hosts, &[0, 1, 15, 16, 17, 56, 1392, 1393, 9000])?;
    for [from, to] in directions(hosts) {
        let full = if to.1.is_ipv6() { 1372 } else { 1392 };
        let whole: Vec<usize> = (0..full).step_by(13).chain([full]).collect();
        exchange(from, to, &whole, Order::Any)?;
        exchange(from, to, &[full + 1, 3000, 20_000], Order::Any)?;
        transfer(from.0, to.0, to.1, 1, 10_000_000)?;
    }
    transfer_both_ways(hosts, FAMILIES[0], 4, 10_000_000)
}

fn between(kinds: [Kind; 2], is_preshared: bool, underlay: Underlay) -> Result<()> {
    let hosts = hosts()?;
    let ends = tunnel(&hosts, &Keys::new(is_preshared)?, kinds, underlay)?;
    work(&hosts)?;
    for [from, to] in directions(&hosts) {
        let full = if to.1.is_ipv6() { 1372 } else { 1392 };
        exchange_batches(from, to, &batches(full)[..6])?;
    }
    for (end, host) in ends.iter().zip([1, 0]) {
        if let End::Other(other) = end {
            let endpoint = other.says("endpoint")?;
            check(endpoint == underlay.endpoint(host).to_string(), || {
                format!("the peer is at {endpoint}")
            })?;
        }
    }
    stop(ends)
}

/// fastvpn calls it, with a preshared key over IPv4, and it calls fastvpn, without one
/// over IPv6.
fn with(other: &'static Implementation) -> Result<()> {
    let other = Kind::Other(other);
    between([Kind::Fastvpn, other], true, Underlay::V4)?;
    between([other, Kind::Fastvpn], false, Underlay::V6)
}

/// What these tests are made of: without fastvpn.
#[testbed::trial(long, wireguard_go)]
fn wireguard_go_with_itself() -> Result<()> {
    let other = Kind::Other(&WIREGUARD_GO);
    for underlay in [Underlay::V4, Underlay::V6] {
        between([other; 2], true, underlay)?;
    }
    Ok(())
}

/// The same.
#[testbed::trial(long, boringtun)]
fn boringtun_with_itself() -> Result<()> {
    between([Kind::Other(&BORINGTUN); 2], true, Underlay::V4)
}

/// The same.
#[testbed::trial(long, gotatun)]
fn gotatun_with_itself() -> Result<()> {
    between([Kind::Other(&GOTATUN); 2], true, Underlay::V4)
}

#[testbed::trial(each_engine, wireguard_go)]
fn wireguard_go_with_fastvpn() -> Result<()> {
    with(&WIREGUARD_GO)
}

#[testbed::trial(each_engine, long, boringtun)]
fn boringtun_with_fastvpn() -> Result<()> {
    with(&BORINGTUN)
}

#[testbed::trial(each_engine, long, gotatun)]
fn gotatun_with_fastvpn() -> Result<()> {
    with(&GOTATUN)
}
