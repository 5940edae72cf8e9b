//! Longest-prefix match: `cargo bench --bench packet -- prefixes/`.
//!
//! Prefixes have about the lengths of those in the Internet's routing tables.
//! Addresses are picked at random among those that some prefix holds, so that
//! the caches help no more than they would with many flows; addresses that no
//! prefix holds are found sooner.

use std::collections::HashSet;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use fastvpn::packet::batch::NextHop;
use fastvpn::packet::lpm::Prefixes;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Prefixes of a table.
const COUNTS: [usize; 3] = [1, 1_000, 100_000];

/// Prefixes of the table whose making is timed.
const LOADED: usize = 100_000;

/// Addresses of one run: far more than a cache's lines.
const ADDRESSES: usize = 1 << 18;

/// Next hops that the prefixes have.
const NEXT_HOPS: u64 = 1_000;

/// Allocations of addresses that IPv6 prefixes are from, /32 each.
const IPV6_SITES: u64 = 20_000;

/// Lengths and how many in a hundred prefixes have them.
const IPV4_LENGTHS: [(u8, u64); 13] = [
    (12, 1),
    (16, 2),
    (17, 1),
    (18, 1),
    (19, 3),
    (20, 4),
    (21, 5),
    (22, 11),
    (23, 8),
    (24, 60),
    (28, 1),
    (30, 1),
    (32, 2),
];
const IPV6_LENGTHS: [(u8, u64); 9] = [
    (32, 14),
    (36, 4),
    (40, 8),
    (44, 10),
    (48, 44),
    (56, 6),
    (64, 8),
    (96, 1),
    (128, 5),
];

type Entry = (IpNet, NextHop);

/// Draws a prefix of one family.
type Draw = fn(&mut Random) -> IpNet;

/// All groups.
pub fn bench(criterion: &mut Criterion) {
    let families: [(&str, Draw); 2] = [("4", net4), ("6", net6)];
    for (family, net) in families {
        let mut group = criterion.benchmark_group(format!("prefixes/lookup{family}"));
        for count in COUNTS {
            group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
                let mut random = Random(1);
                let prefixes = prefixes(count, net, &mut random);
                let addresses = addresses(&prefixes, &mut random);
                let table = Prefixes::new(prefixes);
                let found = addresses.iter().filter(|at| table.lookup(**at).is_some());
                assert_eq!(found.count(), ADDRESSES, "an address has no next hop");
                // One address per run; round and round.
                let mut next = addresses.iter().cycle();
                bencher.iter_custom(|runs| {
                    let start = Instant::now();
                    for _ in 0..runs {
                        if let Some(address) = next.next() {
                            black_box(table.lookup(*address));
                        }
                    }
                    start.elapsed()
                });
            });
        }
        group.finish();
    }
    let mut group = criterion.benchmark_group("prefixes/load");
    for (family, net) in families {
        group.bench_function(BenchmarkId::new(family, LOADED), |bencher| {
            let prefixes = prefixes(LOADED, net, &mut Random(1));
            bencher.iter_custom(|runs| {
                let mut elapsed = Duration::ZERO;
                for _ in 0..runs {
                    let start = Instant::now();
                    let table = black_box(table(&prefixes));
                    elapsed += start.elapsed();
                    drop(table);
                }
                elapsed
            });
        });
    }
    group.finish();
}

fn table(prefixes: &[Entry]) -> Prefixes {
    Prefixes::new(prefixes.iter().copied())
}

/// Numbers that look random and are the same in every run: SplitMix64.
struct Random(u64);

impl Random {
    fn bits64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.bits64() % end
    }

    fn bits128(&mut self) -> u128 {
        u128::from(self.bits64()) << 64 | u128::from(self.bits64())
    }

    fn length(&mut self, lengths: &[(u8, u64)]) -> u8 {
        let mut rest = self.below(lengths.iter().map(|(_, share)| share).sum());
        let chosen = lengths.iter().find(|(_, share)| {
            let here = rest < *share;
            rest = rest.saturating_sub(*share);
            here
        });
        chosen.map_or(0, |(length, _)| *length)
    }
}

/// Unicast, 1.0.0.0 to 222.255.255.255.
fn net4(random: &mut Random) -> IpNet {
    let bits = (1 << 24) + random.below(222 << 24) as u32;
    let length = random.length(&IPV4_LENGTHS);
    Ipv4Net::new_assert(Ipv4Addr::from_bits(bits), length).into()
}

/// Global unicast, 2000::/4, in allocations that are spread over it.
fn net6(random: &mut Random) -> IpNet {
    let site = Random(random.below(IPV6_SITES)).bits64() as u32 >> 4 | 2 << 28;
    let bits = u128::from(site) << 96 | random.bits128() >> 32;
    let length = random.length(&IPV6_LENGTHS);
    Ipv6Net::new_assert(Ipv6Addr::from_bits(bits), length).into()
}

/// So many distinct prefixes, in no order.
fn prefixes(count: usize, net: Draw, random: &mut Random) -> Vec<Entry> {
    let mut seen = HashSet::new();
    let mut prefixes = Vec::with_capacity(count);
    while prefixes.len() < count {
        let net = net(random).trunc();
        if seen.insert(net) {
            prefixes.push((net, random.below(NEXT_HOPS) as NextHop));
        }
    }
    prefixes
}

/// Addresses of prefixes picked at random.
fn addresses(prefixes: &[Entry], random: &mut Random) -> Vec<IpAddr> {
    let address = |_| match prefixes[random.below(prefixes.len() as u64) as usize].0 {
        IpNet::V4(net) => {
            let host = random.bits64() as u32 & net.hostmask().to_bits();
            Ipv4Addr::from_bits(net.network().to_bits() | host).into()
        }
        IpNet::V6(net) => {
            let host = random.bits128() & net.hostmask().to_bits();
            Ipv6Addr::from_bits(net.network().to_bits() | host).into()
        }
    };
    (0..ADDRESSES).map(address).collect()
}
