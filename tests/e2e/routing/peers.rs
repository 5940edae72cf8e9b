//! Peers that come, go, and are slow.

use std::time::Duration;

use fastvpn::error::Result;

use crate::support::{
    TUNNEL, answers, bulk, check, fastvpn, hosts, link, snmp, stop, tried, tunnel_between, udp,
    wait_for, wait_until,
};
use crate::tools::{Stream, slow_down, speed_up};

/// Connections outlast the tunnel, whichever way their data goes.
#[testbed::trial(each_engine)]
fn a_killed_peer_comes_back_under_load() -> Result<()> {
    let hosts = hosts(1500)?;
    let [a, mut b] = tunnel_between(&hosts, &[])?;
    let streams = [
        Stream::start(&hosts.a, &hosts.b, TUNNEL[1].into())?,
        Stream::start(&hosts.b, &hosts.a, TUNNEL[0].into())?,
    ];
    for _ in 0..2 {
        streams.iter().try_for_each(Stream::wait_for_progress)?;
        // Dropped is killed (SIGKILL) and waited for.
        drop(b);
        let refused = snmp(&hosts.b, "Udp", "NoPorts")?;
        wait_until("the survivor sends to a closed port", || {
            Ok(snmp(&hosts.b, "Udp", "NoPorts")? > refused)
        })?;
        b = fastvpn(&hosts.b, "--peer 10.211.55.122")?;
        streams.iter().try_for_each(Stream::wait_for_progress)?;
    }
    for stream in streams {
        stream.finish()?;
    }
    stop(a)?;
    stop(b).map(drop)
}

/// Sending into the void, with "port unreachable" for each datagram, neither
/// stops nor slows the one end that is there.
#[testbed::trial(each_engine)]
fn a_peer_that_is_not_there_yet() -> Result<()> {
    const BATCH: u64 = 200;
    const SENT: u64 = 100 * BATCH;
    let hosts = hosts(1500)?;
    // Unlimited, and before the first of them.
    hosts.b.sysctl("net/ipv4/icmp_ratelimit", "0")?;
    let a = fastvpn(&hosts.a, "--queues 1 --peer 10.211.55.123")?;
    wait_until("the interface has its address", || {
        let addresses = hosts.a.netlink()?.addresses()?;
        Ok(addresses.iter().any(|(_, net)| net.addr() == TUNNEL[0]))
    })?;
    let source = udp(&hosts.a, TUNNEL[0], 0)?;
    for batch in 1..=SENT / BATCH {
        for _ in 0..BATCH {
            // Before the link is up there is no route yet.
            wait_until("a route into the tunnel", || {
                Ok(source.send_to(&[7; 1000], (TUNNEL[1], 9)).is_ok())
            })?;
        }
        // No more at once than the queues on the way hold.
        wait_until("the survivor goes on sending", || {
            Ok(link(&hosts.a, "fastvpn0")?.stats.tx_packets >= batch * BATCH * 9 / 10)
        })?;
    }
    // One for each batch, which is at most a batch.
    check(
        snmp(&hosts.a, "Icmp", "InDestUnreachs")? > SENT / BATCH / 2,
        || "the peer's host has not complained".into(),
    )?;

    let b = fastvpn(&hosts.b, "--queues 1 --peer 10.211.55.122")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    answers(&hosts.b, TUNNEL[0].into(), 1400)?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 20)?;
    bulk(&hosts.b, &hosts.a, TUNNEL[0].into(), 20)?;
    let ended = stop(a)?;
    let (sent, _) = ended.packets("total")?;
    check(
        sent >= SENT * 9 / 10 && ended.dropped("send-error") == 0,
        || ended.log,
    )?;
    stop(b).map(drop)
}

/// The line out is so slow that the socket's buffer fills and the worker has to
/// wait for room: what comes in must still pass. The other way around cannot be
/// had, since the kernel never makes a writer to a TUN wait.
#[testbed::trial(each_engine)]
fn a_blocked_way_out_leaves_the_way_in() -> Result<()> {
    const WANTED: u64 = 5_000;
    let hosts = hosts(1500)?;
    // Answers to ARP will wait on the slow line, too: B has to believe what it
    // knows of A for longer than the test lasts (in seconds).
    let believed = "net/ipv4/neigh/underlay0/delay_first_probe_time";
    hosts.b.sysctl(believed, "600")?;
    let [a, b] = tunnel_between(&hosts, &["--queues", "1"])?;
    let sink = udp(&hosts.a, TUNNEL[0], 0)?;
    let port = tried("read an address", sink.local_addr())?.port();
    slow_down(&hosts.a, "underlay0", 100_000)?;
    let source = udp(&hosts.a, TUNNEL[0], 0)?;
    let send_out = || {
        (0..100).try_for_each(|_| {
            let sent = source.send_to(&[7; 1400], (TUNNEL[1], 9));
            tried("send", sent).map(drop)
        })
    };
    // More than may wait in the socket, before it and in the TUN queue.
    (0..100).try_for_each(|_| send_out())?;

    let far_source = udp(&hosts.b, TUNNEL[1], 0)?;
    tried(
        "set a timeout",
        sink.set_read_timeout(Some(Duration::from_millis(1))),
    )?;
    let mut arrived = 0;
    wait_until("what comes in still passes", || {
        send_out()?;
        for _ in 0..50 {
            tried("send", far_source.send_to(&[8; 1000], (TUNNEL[0], port)))?;
        }
        while sink.recv(&mut [0; 1500]).is_ok() {
            arrived += 1;
        }
        Ok(arrived >= WANTED)
    })?;
    // The line is fast again: so is what goes out.
    speed_up(&hosts.a, "underlay0")?;
    answers(&hosts.a, TUNNEL[1].into(), 56)?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 20)?;
    let ended = stop(a)?;
    let lost = ended.dropped("queue-full") + ended.dropped("tun-queue-full");
    check(lost > 0, || ended.log)?;
    stop(b).map(drop)
}
