//! That the bench's links over other people's tunnels, and over fastvpn's own with
//! many and with changing prefixes, are what they seem: they carry TCP both ways
//! and every byte of it, in packets that fit the cable, and leave nothing behind.
//! One that is not installed is shown as ignored.

// The bench uses what these tests do not, and without the harness nothing runs
// the tests of its modules; tests/bench_parts.rs does.
#![allow(dead_code, unused_imports)]

#[path = "../benches/tunnel/targets/mod.rs"]
mod targets;
#[path = "../benches/tunnel/variant.rs"]
mod variant;

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use libtest_mimic::{Arguments, Failed, Trial};
use targets::{
    TUNNEL, Target, UNDERLAY, UNDERLAY_MTU_BYTES, UNDERLAY_PREFIX, fastvpn::built_in,
    others::others, overlay::Overlay,
};
use testbed::traffic::{Between, Bulk, BulkLimit, Watch, ping, snmp_counter, tcp_bulk};
use testbed::{Namespace, Pair, UNDERLAY_NAME};

const BYTES: u64 = 60_000_000;

const ETHERNET_HEADER_BYTES: u64 = 14;
/// IPv4 and ICMP.
const PING_HEADER_BYTES: usize = 20 + 8;
const PING_TIMEOUT: Duration = Duration::from_secs(1);
const PINGS_MAX: usize = 10;
const GONE_MAX: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before the first thread: only a process with one thread may enter a
    // user namespace.
    if let Err(error) = testbed::enter_user_namespace_if_needed() {
        eprintln!("the tests of other tunnels cannot run: {error}");
        return ExitCode::FAILURE;
    }
    let trials = tested().into_iter().map(|target| {
        let missing = target.missing();
        let kind = missing.clone().unwrap_or_default();
        let name = target.key();
        Trial::test(name, move || check(name))
            .with_kind(kind)
            .with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn tested() -> Vec<Box<dyn Target>> {
    let mut tested = others();
    let encrypted = built_in().unwrap_or_default().into_iter();
    let encrypted = encrypted.filter(|target| target.key() == "uring-encrypted");
    tested.extend(encrypted.map(|target| Box::new(target) as Box<dyn Target>));
    tested.push(Box::new(Overlay::Prefixes));
    tested.push(Box::new(Overlay::Changes));
    tested
}

fn check(key: &str) -> Result<(), Failed> {
    let target: Box<dyn Target> = tested()
        .into_iter()
        .find(|target| target.key() == key)
        .ok_or("gone")?;
    println!("{}: {}", target.title(), target.detail());
    let net = |own: usize| IpNet::new(UNDERLAY[own].into(), UNDERLAY_PREFIX);
    let pair = testbed::pair(&[(net(0)?, net(1)?)], UNDERLAY_MTU_BYTES)?;
    let link = target.start(&pair)?;

    fills_the_cable(&pair, link.address)?;
    transfer(&pair.a, &pair.b, link.address)?;
    transfer(&pair.b, &pair.a, TUNNEL[0].into())?;
    for host in [&pair.a, &pair.b] {
        let fragments = snmp_counter(host, "Ip", "FragCreates")?;
        if fragments != 0 {
            return Err(format!("{fragments} packets were cut to fit the cable").into());
        }
    }
    if let Some(changes) = &link.changes {
        let made = changes.made()?;
        if made == 0 {
            return Err("no prefixes have changed".into());
        }
        println!("prefixes changed {made} times meanwhile");
    }
    leaves_nothing(&pair, link)
}

/// That the largest packet makes the largest vnet packet: no byte of the MTU is lost.
fn fills_the_cable(pair: &Pair, address: IpAddr) -> Result<(), Failed> {
    let mut netlink = pair.a.netlink()?;
    let tunnel = netlink
        .interface_to((address, 0).into())?
        .ok_or("no route")?;
    let mtu = netlink.link_by_index(tunnel)?.ok_or("no interface")?.mtu;
    let cable = netlink.link_index(UNDERLAY_NAME)?.ok_or("no cable")?;
    let vnet_packet_bytes = u64::from(UNDERLAY_MTU_BYTES) + ETHERNET_HEADER_BYTES;
    let mut sent = Vec::new();
    for _ in 0..PINGS_MAX {
        let mut sent_bytes = || -> Result<u64, Failed> {
            let link = netlink.link_by_index(cable)?.ok_or("no cable")?;
            Ok(link.stats.tx_bytes)
        };
        let before = sent_bytes()?;
        ping(
            &pair.a,
            address,
            mtu as usize - PING_HEADER_BYTES,
            PING_TIMEOUT,
        )?;
        sent.push(sent_bytes()? - before);
        // What a tunnel says beside the packet comes on top, but not each time.
        if sent.contains(&vnet_packet_bytes) {
            return Ok(());
        }
    }
    Err(format!("no vnet packet of {vnet_packet_bytes} bytes with MTU {mtu}: {sent:?}").into())
}

fn transfer(client: &Namespace, server: &Namespace, address: IpAddr) -> Result<(), Failed> {
    let between = Between {
        client,
        server,
        address,
    };
    let bulk = Bulk::new(1, BulkLimit::BytesPerStream(BYTES));
    let report = tcp_bulk(between, bulk, &Watch::default())?;
    println!("to {address}: {:.2} Gbit/s", report.gigabits_per_second());
    match report.bytes == BYTES {
        true => Ok(()),
        false => Err(format!("{report:?}").into()),
    }
}

fn leaves_nothing(pair: &Pair, link: targets::Link) -> Result<(), Failed> {
    let processes = link.processes.iter().flatten();
    let mut traces: Vec<PathBuf> = processes
        .map(|child| format!("/proc/{}", child.pid()).into())
        .collect();
    let directory = link.configuration.as_ref();
    traces.extend(directory.map(|directory| directory.path().to_path_buf()));
    if traces.len() < 2 || !traces.iter().all(|trace| trace.exists()) {
        return Err(format!("expected traces of a running tunnel: {traces:?}").into());
    }
    drop(link);
    traces.push("/var/run/wireguard/wireguard0.sock".into());
    traces.retain(|trace| trace.exists());
    if !traces.is_empty() {
        return Err(format!("left behind: {traces:?}").into());
    }
    // The kernel closes what a killed io_uring holds a moment after the process.
    let deadline = Instant::now() + GONE_MAX;
    for host in [&pair.a, &pair.b] {
        loop {
            let links = host.run(testbed::interfaces)?;
            if links.len() == 2 {
                break;
            }
            if Instant::now() > deadline {
                return Err(format!("interfaces left behind: {links:?}").into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}
