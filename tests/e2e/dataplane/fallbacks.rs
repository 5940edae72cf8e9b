//! Every kernel feature that fastvpn can do without, left out on one end and
//! on both: slower, and otherwise the same.

use fastvpn::error::Result;

use crate::datagrams::{Order, exchange, exchange_batches};
use crate::dataplane::traffic::{batches, directions, pings, transfer_both_ways};
use crate::support::{Ended, FAMILIES, all_cores, check, dual_stack_tunnels, hosts, stop_all};

#[testbed::trial(each_engine)]
fn without_tso() -> Result<()> {
    without("tso")
}

#[testbed::trial(each_engine)]
fn without_uso() -> Result<()> {
    without("uso")
}

#[testbed::trial(each_engine)]
fn without_udp_segment() -> Result<()> {
    without("udp-segment")
}

#[testbed::trial(each_engine)]
fn without_udp_gro() -> Result<()> {
    without("udp-gro")
}

#[testbed::trial(each_engine)]
fn without_all_of_them() -> Result<()> {
    without("tso,uso,udp-segment,udp-gro")
}

/// What the log calls the features.
const NAMES: [(&str, &str); 4] = [
    ("tso", "TSO"),
    ("uso", "USO"),
    ("udp-segment", "UDP_SEGMENT"),
    ("udp-gro", "UDP_GRO"),
];

fn without(features: &str) -> Result<()> {
    let cores = all_cores();
    let with: &[&str] = &["--cores", &cores];
    let without: &[&str] = &["--cores", &cores, "--without", features];
    for flags in [[without, with], [with, without], [without, without]] {
        let hosts = hosts(1500)?;
        let tunnels = dual_stack_tunnels(&hosts, flags)?;
        pings(&hosts, &[0, 1, 56, 1444, 1445, 20_000, 65_000])?;
        for [from, to] in directions(&hosts) {
            let full = if to.1.is_ipv6() { 1424 } else { 1444 };
            let whole: Vec<usize> = (0..full).step_by(31).chain([full]).collect();
            exchange(from, to, &whole, Order::Kept)?;
            let fragmented: Vec<usize> = (full..3000).step_by(53).chain([65_000]).collect();
            exchange(from, to, &fragmented, Order::Any)?;
            exchange_batches(from, to, &batches(full))?;
        }
        for (addresses, streams) in FAMILIES.into_iter().zip([1, 4]) {
            transfer_both_ways(&hosts, addresses, streams, 10_000_000)?;
        }
        let ended = stop_all(tunnels)?;
        for (end, flags) in ended.iter().zip(flags) {
            is_left_out(end, if flags.len() > 2 { features } else { "" })?;
        }
    }
    Ok(())
}

/// Whether exactly `features` were off, as far as there are such.
fn is_left_out(end: &Ended, features: &str) -> Result<()> {
    for (feature, name) in NAMES {
        let on = !features.split(',').any(|off| off == feature);
        let words = format!("{name} {}", if on { "on" } else { "off" });
        check(end.log.contains(&words), || {
            format!("no {words:?} in:\n{}", end.log)
        })?;
    }
    Ok(())
}
