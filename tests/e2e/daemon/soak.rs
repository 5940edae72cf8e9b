//! All of it at once, at full load and for a while: streams, peers that come and
//! go, reloads, operators good and bad, kernel routes deleted, takeovers; and in
//! the end no byte wrong, no memory lost, and no packet dropped without a reason.
//!
//! `FASTVPN_SOAK_SECONDS` makes it longer; `--nocapture` shows what came of it.

use std::collections::VecDeque;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fastvpn::daemon::handoff::PROTOCOL;
use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use nix::sys::signal::Signal;
use serde_json::json;
use testbed::{StaticRoutes, rss_bytes};

use crate::host::routes::kernel_agrees;
use crate::memory::Mappings;
use crate::operator::Operator;
use crate::site::{
    ALL_PREFIXES, Site, Sites, addresses, inside, peer, prefixes, sites, underlay,
    wait_for_each_other,
};
use crate::support::{Ended, Tunnel, check, link, tried, wait_until};
use crate::tools::{Stream, inventory, nothing_left};

/// How long it goes on, unless the environment says otherwise.
const SOAK_SECONDS: u64 = 60;

/// From event to event.
const TICK: Duration = Duration::from_millis(250);

/// A stream of which nothing arrives for so long stands still. Generous: the
/// machine has other tests to run.
const STALL_MAX: Duration = Duration::from_secs(10);

/// The same toward the peer that comes and goes, whose absence TCP answers with
/// longer and longer pauses (RFC 6298).
const STALL_OF_THE_FLAPPING_MAX: Duration = Duration::from_secs(20);

/// How often the hub's memory is looked at.
const SAMPLES: u32 = 8;

/// Memory that the hub may have got and kept from a quarter of the time to the
/// end, when all that is made once is made.
const GROWTH_BYTES_MAX: u64 = 2 << 20;

/// The packet buffers of its two queues, of which any may be touched late.
const BUFFERS_BYTES: u64 = 2 * (9 << 20);

/// Reasons for which packets may be dropped here: multicast of the hosts' own
/// has no route, nor what was under way to a peer that has been removed; what
/// the hub's kernel says about routes that were deleted comes from addresses
/// that are not the tunnel's; queues and receive buffers are full while a process
/// is away.
const REASONS: [&str; 4] = [
    "no-route",
    "tun-queue-full",
    "source-not-allowed",
    "at-socket",
];

const HUB: usize = 0;
const TAKEN_OVER: usize = 1;
const STEADY: usize = 2;
const FLAPPING: usize = 3;

/// Who is running, and with what.
struct Soak {
    network: Sites,
    hub: Operator,
    /// Of the spoke that is taken over.
    spoke: Operator,
    tunnels: Vec<Option<Tunnel>>,
    hostile: VecDeque<UnixStream>,
    ended: Vec<Ended>,
}

impl Soak {
    fn start() -> Result<Self> {
        let mut soak = Self {
            network: sites(4)?,
            hub: Operator::new()?,
            spoke: Operator::new()?,
            tunnels: (0..4).map(|_| None).collect(),
            hostile: VecDeque::new(),
            ended: Vec::new(),
        };
        soak.write_config(0)?;
        for place in [HUB, TAKEN_OVER, STEADY, FLAPPING] {
            soak.tunnels[place] = Some(soak.start_site(place, &[])?);
        }
        for spoke in &soak.network.all[1..] {
            wait_for_each_other(&soak.network.all[HUB], spoke)?;
        }
        Ok(soak)
    }

    fn site(&self, place: usize) -> &Site {
        &self.network.all[place]
    }

    fn start_site(&self, place: usize, more: &[&str]) -> Result<Tunnel> {
        let site = self.site(place);
        if place == HUB {
            let (socket, file) = (self.hub.socket_text(), self.hub.path("fastvpn.toml"));
            let file = file.display().to_string();
            let flags = [
                &["--config", &file, "--control", &socket, "--queues", "2"],
                more,
            ]
            .concat();
            return Tunnel::start(&site.host, &flags);
        }
        let socket = match place {
            TAKEN_OVER => self.spoke.socket_text(),
            _ => self
                .spoke
                .path(&format!("{place}.sock"))
                .display()
                .to_string(),
        };
        let to_hub = format!("{}={ALL_PREFIXES}", underlay(1));
        site.start(
            &[to_hub],
            &[&["--control", &socket, "--queues", "2"], more].concat(),
        )
    }

    /// The hub's file: the spokes, and every other time a peer with some
    /// prefixes that nobody has.
    fn write_config(&self, version: usize) -> Result<()> {
        let mut peers: Vec<String> = (2..=4).map(peer).collect();
        if version % 2 == 1 {
            let more: Vec<_> = (0..200).map(|n| format!("10.77.{n}.0/24")).collect();
            peers.push(format!("10.211.55.77={}", more.join(",")));
        }
        let mut text = format!("address = {}\n", json!(addresses(1)));
        for peer in &peers {
            let (endpoint, prefixes) = peer.split_once('=').unwrap_or_default();
            let prefixes: Vec<_> = prefixes.split(',').collect();
            text += &format!(
                "[[peer]]\nendpoint = \"{endpoint}\"\nprefixes = {}\n",
                json!(prefixes)
            );
        }
        self.hub.write("fastvpn.toml", &text).map(drop)
    }

    /// By signal and by command in turn; and now and then a file that is bad.
    fn reload(&mut self, count: usize) -> Result<()> {
        if count % 5 == 4 {
            self.hub.write("fastvpn.toml", "nonsense")?;
            return self.hub.refuses("reload", &["fastvpn.toml:1:"]);
        }
        self.write_config(count)?;
        if count.is_multiple_of(2) {
            self.hub.tell("reload")?;
        } else if let Some(hub) = &mut self.tunnels[HUB] {
            hub.child().signal(Signal::SIGHUP);
        }
        Ok(())
    }

    fn operate(&self, count: usize) -> Result<()> {
        let prefix = format!("10.88.{}.0/24", count % 256);
        let to = underlay(3).to_string();
        for (command, members) in [
            ("route-add", json!({"peer": to, "prefixes": [prefix]})),
            (
                "peer-add",
                json!({"peer": "10.211.55.99", "prefixes": ["10.89.0.0/16"]}),
            ),
            ("peer-del", json!({"peer": "10.211.55.99"})),
            ("route-del", json!({"prefixes": [prefix]})),
            ("peers", json!({})),
            ("status", json!({})),
        ] {
            let mut request = members;
            request["command"] = command.into();
            let answer = self.hub.request(&request.to_string())?;
            check(answer["ok"] == true, || format!("{request}: {answer}"))?;
        }
        Ok(())
    }

    /// Some stay for a while, and do nothing more.
    fn annoy(&mut self, count: usize) -> Result<()> {
        const KEPT_MAX: usize = 6;
        let mut client = self.hub.connect()?;
        let garbage = match count % 5 {
            0 => b"{\"command\":".to_vec(),
            1 => b"\xff\0[[[[\n".repeat(100),
            2 => b"{\"command\":\"route-list\"}\n".repeat(1000),
            3 => format!("{{\"command\":\"takeover\",\"protocol\":{PROTOCOL}}}\n").into_bytes(),
            _ => vec![b' '; 1 << 20],
        };
        tried("set a timeout", client.set_write_timeout(Some(TICK)))?;
        let _ = client.write_all(&garbage);
        // A takeover that nobody goes on with would keep operators from changes.
        if count % 5 != 3 {
            self.hostile.push_back(client);
        } else {
            drop(client);
            let nothing = r#"{"command":"route-del","prefixes":[]}"#;
            wait_until("it is given up", || {
                Ok(self.hub.request(nothing)?["ok"] == true)
            })?;
        }
        if self.hostile.len() > KEPT_MAX {
            self.hostile.pop_front();
        }
        Ok(())
    }

    /// Somebody deletes the kernel routes to a site; they are there again.
    fn delete_routes(&self, number: u8) -> Result<()> {
        let host = &self.site(HUB).host;
        let index = link(host, "fastvpn0")?.index;
        let mut netlink = host.netlink()?;
        for prefix in prefixes(number).split(',') {
            let net: IpNet = prefix.parse().map_err(|_| Error::new(prefix))?;
            netlink.del_route(net, None, Some(index))?;
        }
        wait_until("the routes are back", || {
            Ok(kernel_agrees(host, &self.hub).is_ok())
        })
    }

    fn take_over(&mut self) -> Result<()> {
        let new_process = self.start_site(TAKEN_OVER, &["--takeover"])?;
        let Some(old) = self.tunnels[TAKEN_OVER].replace(new_process) else {
            return Ok(());
        };
        let ended = old.wait()?;
        let is_well = ended.status.success() && ended.log.contains("handed over");
        check(is_well, || format!("{}:\n{}", ended.status, ended.log))?;
        self.ended.push(ended);
        Ok(())
    }

    /// Stops all, in order.
    fn stop(&mut self) -> Result<()> {
        for tunnel in self.tunnels.iter_mut().filter_map(Option::take) {
            self.ended.push(crate::support::stop(tunnel)?);
        }
        Ok(())
    }
}

/// What the hub's process holds.
#[derive(Debug)]
struct Held {
    rss_bytes: u64,
    descriptors: usize,
    threads: usize,
}

impl Held {
    fn by(pid: u32) -> Result<Self> {
        let count = |what: &str| -> Result<usize> {
            let path = format!("/proc/{pid}/{what}");
            Ok(tried(&path, std::fs::read_dir(&path))?.count())
        };
        Ok(Self {
            rss_bytes: rss_bytes(pid)?,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }
}

/// A stream, and when something last arrived on it.
struct Watched {
    name: &'static str,
    stream: Stream,
    stall_max: Duration,
    arrived_bytes: u64,
    since: Instant,
    longest: Duration,
}

impl Watched {
    fn look(&mut self) -> Result<()> {
        let arrived_bytes = self.stream.arrived_bytes();
        self.longest = self.longest.max(self.since.elapsed());
        if arrived_bytes > self.arrived_bytes {
            self.arrived_bytes = arrived_bytes;
            self.since = Instant::now();
        }
        check(self.since.elapsed() < self.stall_max, || {
            format!("{}: nothing arrives after {arrived_bytes} bytes", self.name)
        })
    }
}

#[testbed::trial(mixed, long)]
fn a_minute_of_everything() -> Result<()> {
    let seconds = std::env::var("FASTVPN_SOAK_SECONDS").ok();
    let seconds = seconds
        .and_then(|text| text.parse().ok())
        .unwrap_or(SOAK_SECONDS);
    let time = Duration::from_secs(seconds);
    let mut soak = Soak::start()?;
    let mut streams = Vec::new();
    for (name, from, to, family, stall_max) in [
        ("hub to the spoke taken over", HUB, TAKEN_OVER, 0, STALL_MAX),
        ("steady spoke to hub", STEADY, HUB, 1, STALL_MAX),
        ("spoke to spoke", TAKEN_OVER, STEADY, 0, STALL_MAX),
        (
            "hub to the one that flaps",
            HUB,
            FLAPPING,
            0,
            STALL_OF_THE_FLAPPING_MAX,
        ),
        (
            "the one that flaps to a spoke",
            FLAPPING,
            STEADY,
            1,
            STALL_OF_THE_FLAPPING_MAX,
        ),
    ] {
        let (from, to) = (soak.site(from), soak.site(to));
        let address: IpAddr = inside(to.number)[family];
        streams.push(Watched {
            name,
            stream: Stream::start_fast(&from.container, &to.container, address)?,
            stall_max,
            arrived_bytes: 0,
            since: Instant::now(),
            longest: Duration::ZERO,
        });
    }
    let hub_pid = soak.tunnels[HUB]
        .as_ref()
        .map(Tunnel::pid)
        .unwrap_or_default();
    let before: Vec<_> = soak
        .network
        .all
        .iter()
        .map(|site| inventory(&site.host))
        .collect();
    let mut held: Vec<Held> = Vec::new();
    let mut mapped = None;
    let start = Instant::now();
    for tick in 0.. {
        if start.elapsed() > time {
            break;
        }
        // Every four seconds the one that flaps is killed, for one.
        match tick % 16 {
            8 => soak.tunnels[FLAPPING] = None,
            12 => soak.tunnels[FLAPPING] = Some(soak.start_site(FLAPPING, &[])?),
            _ => {}
        }
        match tick % 8 {
            1 => soak.reload(tick / 8)?,
            3 => soak.operate(tick / 8)?,
            5 => soak.annoy(tick / 8)?,
            // Not so often that the hub takes it for contention, in which it waits.
            7 if tick % 16 == 7 => soak.delete_routes(2 + (tick / 16 % 2) as u8)?,
            _ => {}
        }
        if tick % 40 == 22 {
            soak.take_over()?;
        }
        streams.iter_mut().try_for_each(Watched::look)?;
        if start.elapsed() > time * (held.len() as u32 + 1) / SAMPLES {
            soak.hostile.clear();
            std::thread::sleep(TICK);
            held.push(Held::by(hub_pid)?);
            if held.len() == 2 {
                mapped = Some(Mappings::of(hub_pid)?);
            }
        }
        std::thread::sleep(TICK);
    }
    if soak.tunnels[FLAPPING].is_none() {
        soak.tunnels[FLAPPING] = Some(soak.start_site(FLAPPING, &[])?);
    }
    soak.hostile.clear();
    for watched in streams {
        let bytes = watched.stream.finish()?;
        let (name, longest) = (watched.name, watched.longest);
        eprintln!(
            "{name}: {} MB, at most {longest:.1?} without any",
            bytes / 1_000_000
        );
        check(bytes > 0, || format!("{name}: nothing"))?;
    }
    eprintln!("the hub, each {:?}: {held:?}", time / SAMPLES);
    let (Some(first), Some(mapped)) = (held.get(1), mapped) else {
        return Err(Error::new("too short to say anything of memory"));
    };
    // The crowd's threads end when they see that it has gone.
    let mut last = Held::by(hub_pid)?;
    wait_until("the hub lets go", || {
        last = Held::by(hub_pid)?;
        Ok(last.descriptors <= first.descriptors && last.threads <= first.threads)
    })
    .map_err(|error| Error::new(format!("{error}: {first:?}, {last:?}")))?;
    let growth_bytes = Mappings::of(hub_pid)?.growth_bytes(&mapped);
    eprintln!("the hub has got {growth_bytes} bytes since the second look");
    let rss_bytes_max = first.rss_bytes + BUFFERS_BYTES + GROWTH_BYTES_MAX;
    check(
        growth_bytes < GROWTH_BYTES_MAX && last.rss_bytes < rss_bytes_max,
        || format!("the hub has got {growth_bytes} bytes: {held:?}, then {last:?}"),
    )?;
    kernel_agrees(&soak.site(HUB).host, &soak.hub)?;
    soak.stop()?;
    for ended in &soak.ended {
        let reasons = ended
            .log
            .lines()
            .find_map(|line| line.split_once("dropped: "));
        let (_, reasons) = reasons.ok_or_else(|| Error::new(ended.log.clone()))?;
        let (sent, received) = ended.packets("total")?;
        eprintln!("{sent} packets sent, {received} received, dropped: {reasons}");
        let is_little = ended.all_dropped() * 100 < sent + received + 10_000;
        check(is_little, || format!("dropped too much:\n{}", ended.log))?;
        for reason in reasons.split(", ").filter(|reason| *reason != "none") {
            let known = REASONS
                .iter()
                .any(|known| reason.starts_with(&format!("{known} ")));
            check(known, || format!("dropped for {reason}:\n{}", ended.log))?;
        }
    }
    // What is left is less than there was with tunnels.
    for (site, before) in soak.network.all.iter().zip(before) {
        let (before, after) = (before?, inventory(&site.host)?);
        nothing_left(&site.host, &before)?;
        let is_gone = !after.iter().any(|item| item.contains("fastvpn0"));
        check(is_gone && after.len() < before.len(), || {
            format!("{after:?}")
        })?;
    }
    Ok(())
}
