//! `fastvpn capture`: packets as they are, and traffic that does not mind.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};

use fastvpn::error::{Error, Result};
use nix::sys::signal::Signal;
use pcap_parser::pcapng::{Block, PcapNGOption, parse_block_le};
use testbed::program::TSHARK;
use testbed::{Child, Namespace, rss_bytes};

use crate::operator::{Operator, Said, said};
use crate::packets::transport;
use crate::support::{
    FASTVPN, TUNNEL, Tunnel, UNDERLAY, bulk, check, fail, fastvpn, hosts, stop, tried, udp,
    wait_for, wait_until,
};
use crate::tools::Stream;
use crate::wireguard::secrets::SECRETS;

/// Where the numbered datagrams go.
const PORT: u16 = 4000;

/// How many there are each way.
const DATAGRAMS: usize = 50;

/// Bytes of the first one. Each is longer than the one before, so that none are merged.
const DATAGRAM_BYTES: usize = 60;

/// A packet of a pcapng file.
struct Packet {
    worker: u32,
    is_inbound: bool,
    comment: String,
    packet_bytes: usize,
    data: Vec<u8>,
}

impl Packet {
    /// What is behind its UDP header.
    fn payload(&self) -> &[u8] {
        let (_, transport) = transport(&self.data).unwrap_or_default();
        transport.get(8..).unwrap_or_default()
    }
}

/// A pcapng file.
#[derive(Default)]
struct Captured {
    interfaces: Vec<String>,
    packets: Vec<Packet>,
    /// Packets that there were, those that were lost, and those that the filter took.
    statistics: [u64; 3],
}

fn option<'a>(options: &'a [PcapNGOption<'_>], code: u16) -> &'a [u8] {
    let found = options.iter().find(|option| option.code.0 == code);
    found.map_or(&[], |option| &option.value[..usize::from(option.len)])
}

impl Captured {
    fn read(mut bytes: &[u8]) -> Result<Self> {
        let mut captured = Self::default();
        while !bytes.is_empty() {
            let parsed = parse_block_le(bytes);
            let (rest, block) = parsed.map_err(|error| Error::new(format!("pcapng: {error}")))?;
            bytes = rest;
            match block {
                Block::InterfaceDescription(it) => {
                    let name = String::from_utf8_lossy(option(&it.options, 2));
                    captured.interfaces.push(name.into());
                }
                Block::EnhancedPacket(it) => captured.packets.push(Packet {
                    worker: it.if_id,
                    is_inbound: option(&it.options, 2) == 1_u32.to_le_bytes(),
                    comment: String::from_utf8_lossy(option(&it.options, 1)).into(),
                    packet_bytes: it.origlen as usize,
                    data: it.data[..it.caplen as usize].to_vec(),
                }),
                Block::InterfaceStatistics(it) => {
                    for (sum, code) in captured.statistics.iter_mut().zip(4..) {
                        let value = option(&it.options, code).try_into();
                        *sum += value.map_or(0, u64::from_le_bytes);
                    }
                }
                _ => {}
            }
        }
        Ok(captured)
    }

    fn of(path: &Path) -> Result<Self> {
        Self::read(&tried("read a capture", fs::read(path))?)
    }
}

/// `fastvpn capture WORDS` on the operator's tunnel, which has begun.
fn start(operator: &Operator, words: &[&str]) -> Result<Capture> {
    let mut command = Command::new(FASTVPN);
    let socket = operator.socket();
    command
        .arg("capture")
        .args(words)
        .arg("--control")
        .arg(socket);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let desk = Namespace::new()?;
    let child = desk.spawn(command)?;
    let capture = Capture { child };
    wait_until("the capture begins", || {
        Ok(operator.ask("status")?["capture"]["pid"] == capture.child.pid())
    })?;
    Ok(capture)
}

/// Such a process.
struct Capture {
    child: Child,
}

impl Capture {
    /// Its standard output.
    fn stdout(&mut self) -> Result<ChildStdout> {
        let stdout = self.child.process().stdout.take();
        stdout.ok_or_else(|| Error::new("no standard output"))
    }

    /// Waits for its end.
    fn end(mut self) -> Result<Said> {
        let text = |pipe: Option<Box<dyn Read>>| {
            let mut bytes = Vec::new();
            let read = pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut bytes));
            tried("read what it says", read)?;
            Ok::<_, Error>(String::from_utf8_lossy(&bytes).into_owned())
        };
        let process = self.child.process();
        let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
        let stdout = text(stdout.map(|pipe| Box::new(pipe) as _))?;
        let stderr = text(stderr.map(|pipe| Box::new(pipe) as _))?;
        Ok(Said {
            status: tried("wait for it", self.child.process().wait())?,
            stdout,
            stderr,
        })
    }
}

/// No capture is there any more.
fn is_over(operator: &Operator) -> Result<()> {
    wait_until("the capture is over", || {
        Ok(operator.ask("status")?["capture"].is_null())
    })
}

/// Both ends of a tunnel of one worker each, and the operator of the first.
fn pair(flags: &[&str]) -> Result<(testbed::Pair, Operator, [Tunnel; 2])> {
    let (hosts, operator) = (hosts(1500)?, Operator::new()?);
    let socket = operator.socket_text();
    let start = |namespace: &Namespace, peer: usize, more: &[&str]| {
        let peer = format!("{}={}/32", UNDERLAY[peer], TUNNEL[peer]);
        let own = ["--peer", &peer, "--queues", "1"];
        Tunnel::start(namespace, &[&own, flags, more].concat())
    };
    let tunnels = [
        start(&hosts.a, 1, &["--control", &socket])?,
        start(&hosts.b, 0, &[])?,
    ];
    wait_for(&hosts.a, TUNNEL[1].into())?;
    operator.wait()?;
    Ok((hosts, operator, tunnels))
}

fn datagram(number: usize) -> Vec<u8> {
    vec![number as u8; DATAGRAM_BYTES + number]
}

/// Sends the datagrams from A to B, and back.
fn send_datagrams(hosts: &testbed::Pair) -> Result<()> {
    let a = udp(&hosts.a, TUNNEL[0], PORT)?;
    let b = udp(&hosts.b, TUNNEL[1], PORT)?;
    for (from, to, address) in [(&a, &b, TUNNEL[1]), (&b, &a, TUNNEL[0])] {
        for number in 0..DATAGRAMS {
            let sent = from.send_to(&datagram(number), (address, PORT));
            tried("send a datagram", sent)?;
            let mut room = [0; 2000];
            let bytes = tried("receive a datagram", to.recv(&mut room))?;
            check(room[..bytes] == datagram(number), || number.to_string())?;
        }
    }
    Ok(())
}

/// Sent out and back, all are in the file: each with its direction, worker and peer.
fn all_are_there(packets: &[Packet], peer: &str) -> Result<()> {
    check(packets.len() == 2 * DATAGRAMS, || packets.len().to_string())?;
    for (index, packet) in packets.iter().enumerate() {
        let Packet {
            worker, comment, ..
        } = packet;
        let (is_inbound, number) = (index >= DATAGRAMS, index % DATAGRAMS);
        let as_sent = packet.payload() == datagram(number)
            && packet.packet_bytes == packet.data.len()
            && packet.is_inbound == is_inbound;
        check(as_sent, || format!("{index}: {:?}", packet.data))?;
        check(*worker == 0 && *comment == format!("peer {peer}"), || {
            format!("{index}: worker {worker}, {comment}")
        })?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn a_capture_has_packets_in_order() -> Result<()> {
    let (hosts, operator, tunnels) = pair(&[])?;
    let path = operator.path("it.pcapng");
    let (file, count) = (path.display().to_string(), (2 * DATAGRAMS).to_string());
    let filter = format!("udp port {PORT}");
    let peer = UNDERLAY[1].to_string();
    let words = [
        "-w", &file, "--filter", &filter, "--peer", &peer, "--count", &count,
    ];
    let capture = start(&operator, &words)?;
    // What is not wanted.
    wait_for(&hosts.a, TUNNEL[1].into())?;
    send_datagrams(&hosts)?;
    // It ends by itself, after the last one.
    let said = capture.end()?;
    check(said.status.success(), || format!("{said:?}"))?;
    check(
        said.stderr.contains(&format!("{count} packets captured")),
        || said.stderr.clone(),
    )?;
    let captured = Captured::of(&path)?;
    check(captured.interfaces == ["fastvpn0-0"], || {
        format!("{:?}", captured.interfaces)
    })?;
    all_are_there(&captured.packets, &format!("{peer}:8285"))?;
    check(captured.statistics[2] == 2 * DATAGRAMS as u64, || {
        format!("{:?}", captured.statistics)
    })?;
    let mode = tried("stat", fs::metadata(&path))?.permissions().mode();
    check(mode & 0o777 == 0o600, || format!("{mode:o}"))?;
    is_over(&operator)?;
    let [a, b] = tunnels;
    let log = stop(a)?.log;
    for line in ["captures packets", "has ended: its client has ended it"] {
        check(log.contains(line), || log.clone())?;
    }
    stop(b).map(drop)
}

/// What is in clear in the file, which keys protect on the wire.
#[testbed::trial(each_engine)]
fn a_capture_of_an_encrypted_tunnel_is_in_clear() -> Result<()> {
    let secret = Operator::new()?;
    let file = secret.write("secret", SECRETS[0])?;
    let protected = fs::set_permissions(&file, Permissions::from_mode(0o600));
    tried("protect a file", protected)?;
    let (hosts, operator, tunnels) = pair(&["--secret-file", &file])?;
    let path = operator.path("it.pcapng");
    let (file, count) = (path.display().to_string(), (2 * DATAGRAMS).to_string());
    let filter = format!("udp and port {PORT}");
    let capture = start(
        &operator,
        &["-w", &file, "--filter", &filter, "--count", &count],
    )?;
    send_datagrams(&hosts)?;
    check(capture.end()?.status.success(), || "it failed".into())?;
    all_are_there(&Captured::of(&path)?.packets, &UNDERLAY[1].to_string())?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A line for each packet, with the reason of one that is dropped.
#[testbed::trial(each_engine)]
fn a_capture_shows_why_a_packet_is_dropped() -> Result<()> {
    let (hosts, operator, tunnels) = pair(&[])?;
    let filter = "udp dst port 4000 or icmp and dst host 10.244.55.122";
    let mut capture = start(&operator, &["--filter", filter])?;
    let mut lines = BufReader::new(capture.stdout()?).lines();
    let a = udp(&hosts.a, TUNNEL[0], 5000)?;
    let nobody = "10.244.9.9:4000";
    tried("send a datagram", a.send_to(&[7; 100], nobody))?;
    let mut next = || tried("read a line", lines.next().transpose())?.ok_or(Error::new("no line"));
    let (dropped, told) = (next()?, next()?);
    let shown = "out udp 10.244.55.122:5000 -> 10.244.9.9:4000, 128 bytes (dropped: no_route)";
    check(dropped.ends_with(shown), || dropped.clone())?;
    // What its sender is told.
    let shown = "in  icmp 10.244.55.122 -> 10.244.55.122 type 3 code 0, 156 bytes";
    check(told.ends_with(shown), || told.clone())?;
    capture.child.signal(Signal::SIGINT);
    let said = capture.end()?;
    let wanted = said.status.success() && said.stderr.starts_with("2 packets captured");
    check(wanted, || format!("{said:?}"))?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Killed under load, a client leaves a tunnel as it was.
#[testbed::trial(each_engine)]
fn a_capture_whose_client_is_killed_leaves_nothing() -> Result<()> {
    /// Less than a ring.
    const RING_BYTES: u64 = 3 << 20;
    let (hosts, operator, tunnels) = pair(&[])?;
    let stream = Stream::start_fast(&hosts.a, &hosts.b, TUNNEL[1].into())?;
    stream.wait_for_progress()?;
    let mut capture = start(&operator, &["-w", "-"])?;
    let mut some = [0; 100_000];
    tried("read packets", capture.stdout()?.read_exact(&mut some))?;
    let pid = tunnels[0].pid();
    let with_ring = rss_bytes(pid)?;
    capture.child.signal(Signal::SIGKILL);
    is_over(&operator)?;
    wait_until("the ring's memory is given back", || {
        Ok(rss_bytes(pid)? + RING_BYTES < with_ring)
    })?;
    stream.wait_for_progress()?;
    stream.finish()?;
    // Another one may capture.
    let capture = start(&operator, &["--count", "1", "--filter", "icmp"])?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    check(capture.end()?.status.success(), || "it failed".into())?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Nobody reads the pipe: the capture loses packets and says so, and traffic goes on.
#[testbed::trial(each_engine)]
fn a_full_pipe_loses_the_capture_and_no_traffic() -> Result<()> {
    let (hosts, operator, tunnels) = pair(&[])?;
    // Whole GSO packets soon fill whatever there is.
    let mut capture = start(&operator, &["-w", "-", "--snaplen", "65535"])?;
    let mut pipe = capture.stdout()?;
    let stream = Stream::start_fast(&hosts.a, &hosts.b, TUNNEL[1].into())?;
    wait_until("packets are lost", || {
        stream.wait_for_progress()?;
        Ok(operator.ask("status")?["capture"]["lost"].as_u64() > Some(0))
    })?;
    for _ in 0..10 {
        stream.wait_for_progress()?;
    }
    stream.finish()?;
    capture.child.signal(Signal::SIGINT);
    let mut bytes = Vec::new();
    tried("read packets", pipe.read_to_end(&mut bytes))?;
    let said = capture.end()?;
    check(said.status.success(), || format!("{said:?}"))?;
    let captured = Captured::read(&bytes)?;
    let [received, lost, accepted] = captured.statistics;
    let adds_up = lost > 0 && received == accepted + lost;
    check(
        adds_up && said.stderr.contains(&format!("{lost} lost")),
        || format!("{:?} {}", captured.statistics, said.stderr),
    )?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Nobody reads any more, and no packet passes the filter: the capture ends all the same.
#[testbed::trial]
fn a_capture_whose_reader_has_gone_ends() -> Result<()> {
    let (_hosts, operator, tunnels) = pair(&[])?;
    for words in [&["-w", "-"][..], &[]] {
        let words = [words, &["--filter", "udp port 9"]].concat();
        let mut capture = start(&operator, &words)?;
        let mut pipe = capture.stdout()?;
        if words.len() > 2 {
            // The file's first block has been written.
            tried("read a block", pipe.read_exact(&mut [0; 28]))?;
        }
        drop(pipe);
        is_over(&operator)?;
        check(capture.end()?.status.success(), || "it failed".into())?;
    }
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A peer goes, and another one gets its number, while packets wait for a client that does not
/// read: they keep their peer's name.
#[testbed::trial]
fn a_capture_has_the_peers_of_their_time() -> Result<()> {
    let (other, place) = ("10.244.55.99", "10.211.55.99");
    let (hosts, operator, tunnels) = pair(&[])?;
    let path = operator.path("it.pcapng");
    let words = ["-w", &path.display().to_string(), "--snaplen", "65535"];
    let capture = start(&operator, &words)?;
    capture.child.signal(Signal::SIGSTOP);
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 10)?;
    operator.tell(&format!("peer del {}", UNDERLAY[1]))?;
    operator.tell(&format!("peer add {place}={other}/32"))?;
    capture.child.signal(Signal::SIGCONT);
    let (socket, marker) = (udp(&hosts.a, TUNNEL[0], PORT)?, b"to the other peer");
    wait_until("one to the other peer is captured", || {
        tried("send", socket.send_to(marker, (other, PORT)))?;
        let written = tried("read a capture", fs::read(&path))?;
        let end = &written[written.len().saturating_sub(10_000)..];
        Ok(end.windows(marker.len()).any(|bytes| bytes == marker))
    })?;
    capture.child.signal(Signal::SIGINT);
    check(capture.end()?.status.success(), || "it failed".into())?;
    let (mut old, mut new) = (0, 0);
    for packet in Captured::of(&path)?.packets {
        let is_new = packet.data.get(16..20) == Some(&[10, 244, 55, 99]);
        let wanted = match is_new {
            true => format!("peer {place}:8285"),
            false => format!("peer {}:8285", UNDERLAY[1]),
        };
        // Of what the host sends by itself none is known.
        let is_named = packet.comment.starts_with("peer");
        check(!is_named || packet.comment.starts_with(&wanted), || {
            format!("{}: {:?}", packet.comment, packet.data.get(..20))
        })?;
        *(if is_new { &mut new } else { &mut old }) += u64::from(is_named);
    }
    check(old > 10 && new > 0, || format!("{old} old, {new} new"))?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// TCP's packets, GSO packets and all, as they were sent: none is there twice, and none is
/// missing but those that are counted.
#[testbed::trial(each_engine)]
fn a_capture_under_load_adds_up() -> Result<()> {
    let (hosts, operator, tunnels) = pair(&[])?;
    let path = operator.path("it.pcapng");
    let capture = start(&operator, &["-w", &path.display().to_string()])?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 20)?;
    capture.child.signal(Signal::SIGINT);
    let said = capture.end()?;
    check(said.status.success(), || format!("{said:?}"))?;
    let captured = Captured::of(&path)?;
    let [received, lost, accepted] = captured.statistics;
    let adds_up = received == accepted + lost && captured.packets.len() as u64 == accepted;
    check(adds_up, || format!("{:?}", captured.statistics))?;
    let out = captured.packets.iter().filter(|packet| !packet.is_inbound);
    let bytes: usize = out.map(|packet| packet.packet_bytes).sum();
    check(lost > 0 || bytes > 20_000_000, || format!("{bytes} bytes"))?;
    let is_gso = |packet: &Packet| packet.comment.contains(", GSO ");
    check(captured.packets.iter().any(is_gso), || {
        "no GSO packet".into()
    })?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// What a takeover and the tunnel's end mean for a capture.
#[testbed::trial]
fn a_capture_ends_with_its_tunnel() -> Result<()> {
    let (hosts, operator, [a, b]) = pair(&[])?;
    let mut capture = start(&operator, &[])?;
    let mut out = capture.stdout()?;
    let flags = format!(
        "--peer {}={}/32 --queues 1 --takeover --control {}",
        UNDERLAY[1],
        TUNNEL[1],
        operator.socket_text()
    );
    let new = fastvpn(&hosts.a, &flags)?;
    let ended = a.wait()?;
    check(ended.status.success(), || ended.log.clone())?;
    let said = capture.end()?;
    let told = !said.status.success() && said.stderr.contains("has taken the tunnel over");
    check(told, || format!("{said:?}"))?;
    tried("read the rest", out.read_to_end(&mut Vec::new()))?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    let capture = start(&operator, &["-w", "-"])?;
    stop(new)?;
    let said = capture.end()?;
    let told = !said.status.success() && said.stderr.contains("the tunnel ends");
    check(told, || format!("{said:?}"))?;
    stop(b).map(drop)
}

#[testbed::trial]
fn captures_that_are_refused() -> Result<()> {
    let (_hosts, operator, tunnels) = pair(&[])?;
    let refuses = |words: &[&str], parts: &[&str]| -> Result<()> {
        let said = operator.run(&[&["capture"], words].concat())?;
        let has_all = parts.iter().all(|part| said.stderr.contains(part));
        check(!said.status.success() && has_all, || {
            format!("{words:?}: {said:?}")
        })
    };
    let file = operator.write("it.pcapng", "of yesterday")?;
    let to_file = ["-w", &file];
    refuses(
        &[&to_file[..], &["--peer", "10.9.9.9"]].concat(),
        &["no peer 10.9.9.9"],
    )?;
    // That one had begun.
    is_over(&operator)?;
    refuses(
        &[&to_file[..], &["--filter", "tcp prot 1"]].concat(),
        &["`prot`"],
    )?;
    refuses(&[&to_file[..], &["--snaplen", "1"]].concat(), &["128"])?;
    refuses(&["-w", "/nowhere/it.pcapng"], &["/nowhere/it.pcapng"])?;
    is_over(&operator)?;
    let request = r#"{"command":"capture","snaplen_bytes":7}"#;
    let answer = operator.request(request)?;
    check(answer["ok"] == false, || answer.to_string())?;
    let capture = start(&operator, &["-w", "-"])?;
    let pid = format!("process {}", capture.child.pid());
    refuses(&to_file, &[&pid, "captures already"])?;
    let kept = tried("read a file", fs::read_to_string(&file))?;
    check(kept == "of yesterday", || kept)?;
    let status = operator.tell("status")?;
    check(status.contains(&format!("by {pid} of user")), || status)?;
    capture.child.signal(Signal::SIGTERM);
    check(capture.end()?.status.success(), || "it failed".into())?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// What Wireshark's own reader makes of a capture under load.
#[testbed::trial(each_engine, long, tshark)]
fn tshark_reads_a_capture_under_load() -> Result<()> {
    let (hosts, operator, tunnels) = pair(&[])?;
    let path = operator.path("it.pcapng");
    let file = path.display().to_string();
    // The host sends more by itself.
    let capture = start(&operator, &["-w", &file, "--filter", "tcp"])?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 200)?;
    capture.child.signal(Signal::SIGINT);
    check(capture.end()?.status.success(), || "it failed".into())?;
    let [_, lost, accepted] = Captured::of(&path)?.statistics;
    let mut command = TSHARK.command()?;
    command.args(["-r", &file, "-T", "fields", "-e", "frame.interface_name"]);
    command.args(["-e", "frame.comment", "-e", "frame.packet_flags_direction"]);
    command.args(["-e", "ip.dst", "-e", "tcp.stream"]);
    let said = said(&Namespace::new()?, command)?;
    check(said.status.success(), || said.stderr.clone())?;
    let (mut frames, mut data) = (0, 0);
    for line in said.stdout.lines() {
        frames += 1;
        let fields: Vec<_> = line.split('\t').collect();
        let [interface, comment, direction, to, stream] = fields[..] else {
            return fail(line);
        };
        let peer = format!("peer {}:8285", UNDERLAY[1]);
        let is_out = to == TUNNEL[1].to_string();
        let wanted = interface == "fastvpn0-0"
            && comment.starts_with(&peer)
            && direction.ends_with(if is_out { "2" } else { "1" });
        check(wanted, || line.to_string())?;
        data += u64::from(is_out && !stream.is_empty());
    }
    check(frames == accepted && data > 1000, || {
        format!("{frames} frames, {data} of data, not {accepted}; {lost} lost")
    })?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}
