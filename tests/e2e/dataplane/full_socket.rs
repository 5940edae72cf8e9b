//! The UDP socket is full: packets wait outside it and nothing is lost for lack of room
//! in it, what comes in is carried, and a peer whose datagrams do not leave does not
//! stop those of others.

use std::net::IpAddr;

use fastvpn::error::Result;
use fastvpn::host::netlink::LinkStats;
use ipnet::IpNet;
use testbed::{Namespace, UNDERLAY_NAME};

use crate::datagrams::{Order, exchange};
use crate::operator::Operator;
use crate::packets::TUNNEL_NAME;
use crate::site::{inside, peer, sites, underlay};
use crate::support::{check, link, stop, tried, udp, wait_for, wait_until};

/// Datagrams wait in the kernel, and take up the send buffer, while it asks for
/// the link-layer address of a host that does not answer.
#[testbed::trial(each_engine)]
fn a_full_send_buffer() -> Result<()> {
    let network = sites(3)?;
    let [near, silent, other] = &network.all[..] else {
        return crate::support::fail("three sites");
    };
    for (setting, value) in [
        // More than the send buffer holds.
        ("unres_qlen_bytes", "268435456"),
        ("mcast_solicit", "1000"),
    ] {
        let path = format!("net/ipv4/neigh/{UNDERLAY_NAME}/{setting}");
        near.host.sysctl(&path, value)?;
    }
    let address = IpNet::new_assert(underlay(2).into(), 24);
    let index = link(&silent.host, UNDERLAY_NAME)?.index;
    silent.host.netlink()?.del_address(index, address)?;

    let operator = Operator::new()?;
    let flags = ["--queues", "1", "--control", &operator.socket_text()];
    let tunnel = near.start(&[peer(2), peer(3)], &flags)?;
    let far = other.start(&[peer(1)], &["--queues", "1"])?;
    operator.wait()?;
    wait_for(&near.container, inside(3)[0])?;

    let sender = udp(&near.container, inside(1)[0], 0)?;
    let flood = |datagrams: usize| {
        (0..datagrams).try_for_each(|_| {
            let sent = sender.send_to(&[7; 1400], (inside(2)[0], 9));
            tried("send a datagram", sent.map(drop))
        })
    };
    wait_until("packets wait", || {
        flood(1000)?;
        Ok(operator.dropped("queue-full")? > 0 || tun_stats(&near.host)?.tx_dropped > 0)
    })?;

    // What comes in is carried, and so is what goes to the other peer.
    for _ in 0..3 {
        flood(1000)?;
        let to: (&Namespace, IpAddr) = (&near.container, inside(1)[0]);
        exchange(
            (&other.container, inside(3)[0]),
            to,
            &[1000; 20],
            Order::Kept,
        )?;
        wait_for(&near.container, inside(3)[0])?;
    }

    // The silent host answers: what waits for it leaves.
    silent.host.netlink()?.add_address(index, address)?;
    wait_until("nothing waits any more", || {
        Ok(operator.counter("queue_backlog_bytes")? == 0)
    })?;
    wait_for(&near.container, inside(3)[0])?;
    check(operator.dropped("send-full")? == 0, || {
        "packets were lost for lack of room in the socket".into()
    })?;
    // What was dropped while it waited was not sent to its peer.
    wait_until("the peers' drops add up", || {
        let peers = operator.ask("peers")?;
        let full = |peer: &serde_json::Value| peer["drops"]["queue_full"].as_u64();
        let peers = peers["peers"].as_array();
        let sum: u64 = peers.into_iter().flatten().filter_map(full).sum();
        Ok(sum == operator.dropped("queue-full")?)
    })?;
    stop(tunnel)?;
    stop(far).map(drop)
}

fn tun_stats(host: &Namespace) -> Result<LinkStats> {
    Ok(link(host, TUNNEL_NAME)?.stats)
}
