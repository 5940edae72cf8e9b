//! Ends that move: behind a NAT, to another address, and through a restart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fastvpn::error::Result;
use testbed::wireguard::WIREGUARD_GO;
use testbed::{Pair, UNDERLAY_NAME, ip};

use super::ends::{End, Keys, Kind, PORT, Reach, Underlay, hosts, inside, stop, tunnel};
use super::wire::{INITIATION, NonceWatch, Wire};
use crate::relay::{FACES, Ports, Relay};
use crate::support::{FAMILIES, UNDERLAY, bulk, check, fail, wait_for, wait_until};
use crate::tools::Stream;

/// Another address of host B.
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 211, 55, 151);

/// The same, IPv6.
const SECOND_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x55, 0, 0, 0, 0, 0, 0x151);

/// Where host A goes.
const MOVED: Ipv4Addr = Ipv4Addr::new(10, 211, 55, 150);

/// Host B is behind a NAT, which host A cannot call; what host B sends every second
/// keeps it open.
#[testbed::trial(each_engine)]
fn keepalives_keep_a_nat_open() -> Result<()> {
    behind_a_nat([Kind::Fastvpn; 2])
}

fn behind_a_nat(kinds: [Kind; 2]) -> Result<()> {
    let relay = Relay::start(Ports::Rewritten, true)?;
    let keys = Keys::new(true)?;
    let open = keys.start(&relay.a, 0, kinds[0], Reach::UNKNOWN)?;
    let behind = Reach {
        endpoint: Some((FACES[1], PORT).into()),
        keepalive_s: Some(1),
    };
    let hidden = keys.start(&relay.b, 1, kinds[1], behind)?;
    // Nobody behind the NAT has anything to send.
    for addresses in FAMILIES {
        wait_for(&relay.a, addresses[1])?;
    }
    for _ in 0..3 {
        relay.take_ports(1);
        wait_until("host B says something by itself", || {
            Ok(!relay.take_ports(1).is_empty())
        })?;
    }
    bulk(&relay.a, &relay.b, inside(1), 5)?;
    bulk(&relay.b, &relay.a, inside(0), 5)?;
    stop([open, hidden])?;
    relay.stop()
}

/// Takes host A's address away and gives it another one.
fn move_host_a(hosts: &Pair) -> Result<()> {
    ip(
        &hosts.a,
        &format!("address del {}/24 dev {UNDERLAY_NAME}", UNDERLAY[0]),
    )?;
    ip(
        &hosts.a,
        &format!("address add {MOVED}/24 dev {UNDERLAY_NAME}"),
    )
}

/// A stream goes on, whoever sends it, while the one that has called moves.
fn roams(kinds: [Kind; 2]) -> Result<()> {
    let hosts = hosts()?;
    let ends = tunnel(&hosts, &Keys::new(true)?, kinds, Underlay::V4)?;
    let streams = [
        Stream::start(&hosts.a, &hosts.b, inside(1))?,
        Stream::start(&hosts.b, &hosts.a, inside(0))?,
    ];
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    move_host_a(&hosts)?;
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    for stream in streams {
        stream.finish()?;
    }
    if let End::Other(other) = &ends[1] {
        let endpoint = other.says("endpoint")?;
        check(endpoint == format!("{MOVED}:{PORT}"), || {
            format!("the peer is at {endpoint}")
        })?;
    }
    stop(ends)
}

#[testbed::trial(each_engine)]
fn the_caller_moves() -> Result<()> {
    roams([Kind::Fastvpn; 2])
}

#[testbed::trial(each_engine, wireguard_go)]
fn the_caller_moves_and_wireguard_go_follows() -> Result<()> {
    roams([Kind::Fastvpn, Kind::Other(&WIREGUARD_GO)])
}

/// When its address is gone, wireguard-go sends nothing until it calls anew, 15 s later or
/// more. By then TCP may wait for longer than anybody: what is new goes on.
#[testbed::trial(each_engine, wireguard_go)]
fn wireguard_go_moves_and_fastvpn_follows() -> Result<()> {
    let hosts = hosts()?;
    let kinds = [Kind::Other(&WIREGUARD_GO), Kind::Fastvpn];
    let ends = tunnel(&hosts, &Keys::new(true)?, kinds, Underlay::V4)?;
    move_host_a(&hosts)?;
    wait_for(&hosts.a, inside(1))?;
    wait_for(&hosts.b, inside(0))?;
    bulk(&hosts.a, &hosts.b, inside(1), 5)?;
    bulk(&hosts.b, &hosts.a, inside(0), 5)?;
    stop(ends)
}

/// Host B is called at another address than its route to host A says, and answers from there,
/// for as long as it has it. Then it goes on from the one that it has.
#[testbed::trial(each_engine)]
fn answers_come_from_the_address_that_was_called() -> Result<()> {
    for (underlay, second, prefix_len) in [
        (Underlay::V4, IpAddr::from(SECOND), 24),
        (Underlay::V6, IpAddr::from(SECOND_V6), 64),
    ] {
        let (hosts, keys) = (hosts()?, Keys::new(false)?);
        let address = |verb: &str, options: &str| {
            let on_cable = format!("dev {UNDERLAY_NAME}{options}");
            let command = format!("address {verb} {second}/{prefix_len} {on_cable}");
            ip(&hosts.b, &command)
        };
        // Not one to send from, unless somebody says so.
        let options = match underlay {
            Underlay::V4 => "",
            Underlay::V6 => " nodad preferred_lft 0",
        };
        address("add", options)?;
        let called = keys.start(&hosts.b, 1, Kind::Fastvpn, Reach::UNKNOWN)?;
        let calls = Reach::at((second, PORT).into());
        let caller = keys.start(&hosts.a, 0, Kind::Fastvpn, calls)?;
        let is_at = |expected: SocketAddr| {
            let answer = keys.ask(0, "peers")?;
            Ok(answer["peers"][0]["endpoint"] == expected.to_string())
        };
        wait_for(&hosts.a, inside(1))?;
        bulk(&hosts.a, &hosts.b, inside(1), 5)?;
        bulk(&hosts.b, &hosts.a, inside(0), 5)?;
        let has_stayed = is_at((second, PORT).into())?;
        check(has_stayed, || "host A has followed host B".to_string())?;
        address("delete", "")?;
        wait_for(&hosts.b, inside(0))?;
        wait_until("host A has followed", || is_at(underlay.endpoint(1)))?;
        bulk(&hosts.a, &hosts.b, inside(1), 5)?;
        bulk(&hosts.b, &hosts.a, inside(0), 5)?;
        stop([caller, called])?;
    }
    Ok(())
}

/// New processes take over at both ends, one after the other, while streams go on. They make
/// sessions of their own: no key seals with a nonce twice.
#[testbed::trial(each_engine)]
fn new_processes_take_over() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let reach = [
        Reach::at(Underlay::V4.endpoint(1)),
        Reach::at(Underlay::V4.endpoint(0)),
    ];
    let watches = [NonceWatch::at(&hosts.a)?, NonceWatch::at(&hosts.b)?];
    let mut a = keys.start(&hosts.a, 0, Kind::Fastvpn, reach[0])?;
    let mut b = keys.start(&hosts.b, 1, Kind::Fastvpn, reach[1])?;
    wait_for(&hosts.a, inside(1))?;
    wait_for(&hosts.b, inside(0))?;
    let streams = [
        Stream::start(&hosts.a, &hosts.b, inside(1))?,
        Stream::start(&hosts.b, &hosts.a, inside(0))?,
    ];
    for _ in 0..3 {
        streams.iter().try_for_each(Stream::wait_for_progress)?;
        a = keys.take_over(&hosts.a, 0, a, reach[0])?;
        streams.iter().try_for_each(Stream::wait_for_progress)?;
        b = keys.take_over(&hosts.b, 1, b, reach[1])?;
    }
    for stream in streams {
        stream.finish()?;
    }
    for watch in watches {
        let sessions = watch.finish()?;
        check(sessions > 3, || format!("{sessions} sessions were seen"))?;
    }
    stop([a, b])
}

/// A new process makes sessions of its own at once: the peer does not know that those that
/// it has are of no more use, and would be heard only when it gives them up.
#[testbed::trial(each_engine)]
fn a_new_process_calls_its_peers() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let reach = Reach::at(Underlay::V4.endpoint(1));
    let a = keys.start(&hosts.a, 0, Kind::Fastvpn, reach)?;
    let b = keys.start(&hosts.b, 1, Kind::Fastvpn, Reach::UNKNOWN)?;
    wait_for(&hosts.a, inside(1))?;
    // Host B has learned where host A is; its new process is told by the old one.
    let wire = Wire::at(&hosts.a)?;
    let b = keys.take_over(&hosts.b, 1, b, Reach::UNKNOWN)?;
    wire.next(INITIATION)?;
    wait_for(&hosts.a, inside(1))?;
    stop([a, b])
}

/// The caller is killed and comes back: its first packet makes a new session, which the
/// other end takes although it has one.
fn caller_restarts(kinds: [Kind; 2]) -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let [mut caller, called] = tunnel(&hosts, &keys, kinds, Underlay::V4)?;
    let calls = Reach::at(Underlay::V4.endpoint(1));
    for _ in 0..2 {
        // Without a word.
        drop(caller);
        caller = keys.start(&hosts.a, 0, kinds[0], calls)?;
        wait_for(&hosts.a, inside(1))?;
        wait_for(&hosts.b, inside(0))?;
        bulk(&hosts.b, &hosts.a, inside(0), 5)?;
    }
    stop([caller, called])
}

#[testbed::trial(each_engine)]
fn the_caller_is_killed() -> Result<()> {
    caller_restarts([Kind::Fastvpn; 2])
}

#[testbed::trial(each_engine, wireguard_go)]
fn the_caller_of_wireguard_go_is_killed() -> Result<()> {
    caller_restarts([Kind::Fastvpn, Kind::Other(&WIREGUARD_GO)])
}

/// The one that was called is killed and comes back, knowing nothing of its peer's
/// place: the caller hears nothing for 15 seconds and calls again.
fn called_restarts(kinds: [Kind; 2]) -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let [caller, mut called] = tunnel(&hosts, &keys, kinds, Underlay::V4)?;
    drop(called);
    called = keys.start(&hosts.b, 1, kinds[1], Reach::UNKNOWN)?;
    wait_for(&hosts.a, inside(1)).or_else(|error| {
        let said = [&caller, &called].map(End::said);
        fail(format!(
            "{error}\nthe caller:\n{}\nthe called:\n{}",
            said[0], said[1]
        ))
    })?;
    wait_for(&hosts.b, inside(0))?;
    bulk(&hosts.b, &hosts.a, inside(0), 5)?;
    stop([caller, called])
}

#[testbed::trial(long, each_engine)]
fn the_called_is_killed() -> Result<()> {
    called_restarts([Kind::Fastvpn; 2])
}

#[testbed::trial(long, each_engine, wireguard_go)]
fn the_called_wireguard_go_is_killed() -> Result<()> {
    called_restarts([Kind::Fastvpn, Kind::Other(&WIREGUARD_GO)])
}

/// What the tests above are made of.
#[testbed::trial(long, wireguard_go)]
fn wireguard_go_moves_with_itself() -> Result<()> {
    let both = [Kind::Other(&WIREGUARD_GO); 2];
    behind_a_nat(both)?;
    roams(both)?;
    caller_restarts(both)?;
    called_restarts(both)
}
