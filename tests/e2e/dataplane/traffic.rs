//! What goes in at one end comes out at the other: pings, TCP and UDP as
//! programs use them.

use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use testbed::cpu_ns;
use testbed::traffic::{Between, Bulk, BulkLimit, Watch, ping, tcp_bulk};
use testbed::{Namespace, Pair};

use crate::datagrams::{Channel, Order, exchange, exchange_batches};
use crate::packets::Tap;
use crate::support::{
    FAMILIES, PATIENCE, all_cores, check, dual_stack_tunnels, fail, hosts, stop_all,
    without_backlog_drops,
};

/// Workers that spin carry everything, and stop to spin when nothing comes.
#[testbed::trial(each_engine)]
fn busy_polling_ends_with_the_traffic() -> Result<()> {
    for how in ["auto", "200"] {
        let hosts = hosts(1500)?;
        let flags: &[&str] = &["--busy-poll", how];
        let tunnels = dual_stack_tunnels(&hosts, [flags, flags])?;
        pings(&hosts, &[0, 56, 1444, 20_000])?;
        transfer_both_ways(&hosts, FAMILIES[0], 2, 50 * MB)?;
        // Whatever the hosts still say of their own is over soon.
        thread::sleep(Duration::from_secs(1));
        let pids = tunnels.each_ref().map(|tunnel| tunnel.pid());
        let before = pids.map(cpu_ns);
        thread::sleep(Duration::from_secs(1));
        for (before, pid) in before.into_iter().zip(pids) {
            // A spinning worker would have used a thousand milliseconds.
            let used_ms = (cpu_ns(pid)? - before?) / 1_000_000;
            check(used_ms < 50, || {
                format!("--busy-poll {how}: {used_ms} ms of CPU time in a silent second")
            })?;
        }
        stop_all(tunnels)?;
    }
    Ok(())
}

/// Payload of a packet of the tunnel's full MTU, 1472: UDP over IPv4, IPv6.
const FULL: [usize; 2] = [1444, 1424];

const MB: u64 = 1_000_000;

/// Of each transfer: a thousand GSO packets and more.
const BULK_BYTES: u64 = 64 * MB;

/// Both directions between the hosts in both families.
pub fn directions(hosts: &Pair) -> Vec<[(&Namespace, IpAddr); 2]> {
    let both = |[a, b]: [IpAddr; 2]| {
        let (a, b) = ((&hosts.a, a), (&hosts.b, b));
        [[a, b], [b, a]]
    };
    FAMILIES.into_iter().flat_map(both).collect()
}

/// Pings of some sizes, both directions, both families.
pub fn pings(hosts: &Pair, sizes: &[usize]) -> Result<()> {
    for [(from, _), (_, to)] in directions(hosts) {
        for &bytes in sizes {
            without_backlog_drops(|| ping(from, to, bytes, PATIENCE))?;
        }
    }
    Ok(())
}

/// A TCP transfer whose every byte must arrive.
pub fn transfer(
    client: &Namespace,
    server: &Namespace,
    address: IpAddr,
    streams: usize,
    bytes: u64,
) -> Result<()> {
    let between = Between {
        client,
        server,
        address,
    };
    let limit = BulkLimit::BytesPerStream(bytes / streams as u64);
    let report = tcp_bulk(between, Bulk::new(streams, limit), &Watch::default())?;
    check(
        report.bytes == bytes / streams as u64 * streams as u64,
        || {
            format!(
                "TCP to {address}: {} bytes of {bytes} arrived",
                report.bytes
            )
        },
    )
}

/// Transfers in both directions at the same time.
pub fn transfer_both_ways(
    hosts: &Pair,
    addresses: [IpAddr; 2],
    streams: usize,
    bytes: u64,
) -> Result<()> {
    thread::scope(|scope| {
        let (a, b) = (&hosts.a, &hosts.b);
        let there = scope.spawn(|| transfer(a, b, addresses[1], streams, bytes));
        let back = scope.spawn(|| transfer(b, a, addresses[0], streams, bytes));
        match (there.join(), back.join()) {
            (Ok(there), Ok(back)) => there.and(back),
            _ => fail("a transfer panicked"),
        }
    })
}

#[testbed::trial(each_engine, mixed)]
fn pings_of_all_sizes() -> Result<()> {
    let hosts = hosts(1500)?;
    let tunnels = dual_stack_tunnels(&hosts, [&[], &[]])?;
    // Around one packet's MTU, around two fragments', and up to the longest.
    let mut sizes: Vec<usize> = (0..=65).chain(1400..=1480).chain(2870..=2910).collect();
    sizes.extend((3000..65_000).step_by(2003));
    sizes.extend([64_999, 65_000]);
    pings(&hosts, &sizes)?;
    stop_all(tunnels)?;
    Ok(())
}

#[testbed::trial(each_engine)]
fn tcp_one_stream() -> Result<()> {
    let hosts = hosts(1500)?;
    let tunnels = dual_stack_tunnels(&hosts, [&[], &[]])?;
    for [(client, _), (server, address)] in directions(&hosts) {
        transfer(client, server, address, 1, BULK_BYTES)?;
    }
    stop_all(tunnels)?;
    Ok(())
}

#[testbed::trial(each_engine)]
fn tcp_many_streams() -> Result<()> {
    let hosts = hosts(1500)?;
    let tunnels = dual_stack_tunnels(&hosts, [&[], &[]])?;
    for [(client, _), (server, address)] in directions(&hosts) {
        transfer(client, server, address, 8, BULK_BYTES)?;
    }
    stop_all(tunnels)?;
    Ok(())
}

#[testbed::trial(each_engine, mixed)]
fn tcp_both_directions_at_once() -> Result<()> {
    let hosts = hosts(1500)?;
    let tunnels = dual_stack_tunnels(&hosts, [&[], &[]])?;
    for addresses in FAMILIES {
        for streams in [1, 8] {
            transfer_both_ways(&hosts, addresses, streams, BULK_BYTES)?;
        }
    }
    stop_all(tunnels)?;
    Ok(())
}

#[testbed::trial(each_engine)]
fn udp_of_every_size() -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let flags: &[&str] = &["--cores", &cores];
    let tunnels = dual_stack_tunnels(&hosts, [flags, flags])?;
    for [from, to] in directions(&hosts) {
        let full = FULL[usize::from(to.1.is_ipv6())];
        let whole: Vec<usize> = (0..=full).collect();
        exchange(from, to, &whole, Order::Kept)?;
        // An empty one next to its opposite.
        exchange(from, to, &[0, full, 0, 0, 1, 0], Order::Kept)?;
        let longest = if to.1.is_ipv6() { 65_487 } else { 65_507 };
        let fragmented: Vec<usize> = (full..=3000)
            .chain([4321, 9000, 20_000, 60_000, longest - 1, longest, 1])
            .collect();
        exchange(from, to, &fragmented, Order::Any)?;
    }
    let ended = stop_all(tunnels)?;
    for end in ended {
        check(
            end.dropped("length") + end.dropped("tun-malformed") == 0,
            || end.log.clone(),
        )?;
    }
    Ok(())
}

/// Batches of `(bytes, segment)` around the limits: one and two datagrams, the
/// kernel's 64 and 128, the largest datagrams, a shorter one at the end.
pub fn batches(full: usize) -> Vec<(usize, usize)> {
    vec![
        (1, 1),
        (2, 1),
        (64, 1),
        (65, 1),
        (128, 1),
        (127 * 8 + 3, 8),
        (64 * 100, 100),
        (65 * 100 - 1, 100),
        (50 * 512 + 1, 512),
        (128 * 511, 511),
        (1000, 1000),
        (1001, 1000),
        (2 * full, full),
        (2 * full - 1, full),
        (44 * full, full),
        (44 * full + 1, full),
        (65_487, full),
    ]
}

#[testbed::trial(each_engine, mixed)]
fn udp_batches_keep_their_boundaries() -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let flags: &[&str] = &["--cores", &cores];
    let tunnels = dual_stack_tunnels(&hosts, [flags, flags])?;
    for [from, to] in directions(&hosts) {
        let full = FULL[usize::from(to.1.is_ipv6())];
        exchange_batches(from, to, &batches(full))?;
    }
    stop_all(tunnels)?;
    Ok(())
}

/// Zero in the checksum field means that there is none (RFC 768). It must
/// neither be filled in nor be mistaken for a sum.
#[testbed::trial(each_engine)]
fn udp_without_checksum() -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let flags: &[&str] = &["--cores", &cores];
    let tunnels = dual_stack_tunnels(&hosts, [flags, flags])?;
    for [from, to] in &directions(&hosts)[..2] {
        let tap = Tap::on_tunnel(to.0)?;
        let channel = Channel::open(*from, *to)?;
        setsockopt(&channel.sender, NoChecksum, &true)
            .map_err(|errno| Error::os("no SO_NO_CHECK", errno.into()))?;
        let sizes = [0, 1, 2, 3, 100, 100, 100, 1443, FULL[0], FULL[0], FULL[0]];
        channel.exchange(&sizes, Order::Kept)?;
        for bytes in sizes {
            let packet = tap.next(|packet| packet[9] == 17)?;
            check(
                packet.len() == 28 + bytes && packet[26..28] == [0, 0],
                || format!("{bytes} bytes arrived as {:x?}", &packet[..28]),
            )?;
        }
    }
    stop_all(tunnels)?;
    Ok(())
}

sockopt_impl!(
    NoChecksum,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_NO_CHECK,
    bool
);
