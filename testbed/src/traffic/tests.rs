//! The traffic tools over a bare veth pair. These tests need root.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::{Pair, UNDERLAY_NAME};

const SHORT: Duration = Duration::from_millis(300);

fn example() -> Pair {
    let net = |text: &str| text.parse().unwrap();
    let addresses = [
        (net("10.8.0.1/24"), net("10.8.0.2/24")),
        (net("fd00:8::1/64"), net("fd00:8::2/64")),
    ];
    crate::pair(&addresses, 1500).unwrap()
}

/// The same over IPv4 and IPv6.
fn both_families(test: impl Fn(Between<'_>, &Watch)) {
    let pair = example();
    for address in ["10.8.0.2", "fd00:8::2"] {
        let between = Between {
            client: &pair.a,
            server: &pair.b,
            address: address.parse().unwrap(),
        };
        test(between, &Watch::default());
    }
}

#[test]
fn bulk_data_arrives_intact() {
    both_families(|between, watch| {
        let bytes = 50_000_001;
        let bulk = Bulk::new(3, BulkLimit::BytesPerStream(bytes));
        let report = tcp_bulk(between, bulk, watch).unwrap();
        assert_eq!(report.bytes, 3 * bytes);
    });
}

#[test]
fn bulk_data_can_go_the_other_way_and_uncompared() {
    let pair = example();
    let between = Between {
        client: &pair.a,
        server: &pair.b,
        address: "10.8.0.2".parse().unwrap(),
    };
    let bytes_of_a = || {
        let mut netlink = pair.a.netlink().unwrap();
        let index = netlink.link_index(UNDERLAY_NAME).unwrap().unwrap();
        let stats = netlink.link_by_index(index).unwrap().unwrap().stats;
        (stats.tx_bytes, stats.rx_bytes)
    };
    for (reverse, verify) in [(false, false), (true, true), (true, false)] {
        let before = bytes_of_a();
        let bulk = Bulk {
            streams: 2,
            limit: BulkLimit::BytesPerStream(5_000_000),
            reverse,
            verify,
        };
        let report = tcp_bulk(between, bulk, &Watch::default()).unwrap();
        assert_eq!(report.bytes, 10_000_000);
        let after = bytes_of_a();
        let (sent, received) = (after.0 - before.0, after.1 - before.1);
        let (much, little) = if reverse {
            (received, sent)
        } else {
            (sent, received)
        };
        assert!(much > 10_000_000 && little < 5_000_000, "{bulk:?}");
    }
}

#[test]
fn bulk_data_ends_in_time() {
    both_families(|between, watch| {
        let bulk = Bulk::new(1, BulkLimit::Time(SHORT));
        let report = tcp_bulk(between, bulk, watch).unwrap();
        assert!(report.bytes > 0);
        assert!(report.elapsed >= SHORT && report.elapsed < 10 * SHORT);
    });
}

#[test]
fn traffic_stops_when_told() {
    let pair = example();
    let between = Between {
        client: &pair.a,
        server: &pair.b,
        address: "10.8.0.2".parse().unwrap(),
    };
    let watch = Watch::default();
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SHORT);
            watch.stop.store(true, Ordering::Relaxed);
        });
        let bulk = Bulk::new(2, BulkLimit::Time(Duration::from_secs(30)));
        tcp_bulk(between, bulk, &watch).unwrap_err();
    });
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_error_names_the_address_that_nobody_has() {
    let pair = example();
    let address = "10.8.0.77".parse().unwrap();
    let error = ping(&pair.a, address, 8, SHORT).unwrap_err();
    assert!(error.to_string().contains("10.8.0.77"), "{error}");
    let error = ping(&pair.a, "192.0.2.1".parse().unwrap(), 8, SHORT).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENETUNREACH));
}

#[test]
fn pings_of_all_sizes_come_back() {
    both_families(|between, _| {
        for bytes in [0, 1, 56, 1472, 1473, 9000, PING_BYTES_MAX] {
            ping_up_to(5, between.client, between.address, bytes, 3 * SHORT).unwrap();
        }
        assert!(ping(between.client, between.address, 66_000, SHORT).is_err());
    });
}

#[test]
fn ping_pong_measures() {
    both_families(|between, watch| {
        for bytes in [8, 64] {
            let test = PingPong {
                bytes,
                time: SHORT,
                patience: SHORT,
            };
            for latency in [
                tcp_ping_pong(between, test, watch).unwrap(),
                udp_ping_pong(between, test, watch).unwrap(),
            ] {
                assert!(latency.exchanges > 10 && latency.p50_ns > 0);
                assert!(latency.p50_ns <= latency.p99_ns);
                assert!(latency.p99_ns <= latency.p999_ns);
                assert!(latency.lost <= latency.exchanges / 100, "{latency:?}");
            }
        }
    });
}

#[test]
fn a_flood_at_a_modest_rate_arrives() {
    both_families(|between, watch| {
        let flood = Flood {
            bytes: 64,
            time: SHORT,
            rate_pps: Some(10_000),
        };
        // A veth puts packets into the backlog of the CPU that sends them, which all
        // tests share: while others fill it, it drops what comes, and a sender that is
        // moved to another CPU may overtake itself. So some of many floods must arrive.
        let has_arrived = (0..100).any(|_| {
            let report = udp_flood(between, flood, watch).unwrap();
            // A sender that waits for its core sends less, and never more.
            let most = (report.elapsed.as_secs_f64() * 10_000.0) as u64;
            assert!((1..=most).contains(&report.offered), "{report:?}");
            assert!(report.delivered <= report.offered, "{report:?}");
            assert_eq!(report.corrupt, 0, "{report:?}");
            report.delivered >= report.offered * 9 / 10 && report.reordered <= report.offered / 10
        });
        assert!(has_arrived);
    });
}
