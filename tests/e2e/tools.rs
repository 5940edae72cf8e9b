//! Traffic and surroundings that only these tests need: a TCP stream that goes
//! on until it is told to end, a web server, NAT rules, a slow line.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use fastvpn::host::netlink::Route;
use ipnet::IpNet;
use netlink_sys::{Socket as NetlinkSocket, SocketAddr as NetlinkAddr};
use socket2::SockRef;
use testbed::Namespace;
use testbed::traffic;

use crate::support::{PATIENCE, check, fail, link, noise, tried, wait_until};

/// Bytes of each write and read of a [`Stream`] or a web page.
const BLOCK_BYTES: usize = 64 * 1024;

/// What a stream's receiver may hold unread: less than any wait asks for, so
/// that bytes which were there already are never taken for progress.
const RECEIVE_BUFFER_BYTES: usize = 256 * 1024;

/// Enough bytes to prove that a stream is alive.
pub const PROGRESS_BYTES: u64 = 4_000_000;

/// Between a block and the next: leaves the machine to others, too.
const PAUSE: Duration = Duration::from_millis(1);

/// A TCP stream that goes on, at a moderate rate unless it is to be fast, until
/// it is told to end.
pub struct Stream {
    go_on: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    /// The sender's socket, to ask it how it is.
    socket: TcpStream,
    sender: JoinHandle<io::Result<u64>>,
    receiver: JoinHandle<io::Result<u64>>,
}

impl Stream {
    /// Connects from `client` to `server`, which has `address`, and sends.
    pub fn start(client: &Namespace, server: &Namespace, address: IpAddr) -> Result<Self> {
        Self::start_with(client, server, address, Some(PAUSE))
    }

    /// The same, as fast as it goes.
    pub fn start_fast(client: &Namespace, server: &Namespace, address: IpAddr) -> Result<Self> {
        Self::start_with(client, server, address, None)
    }

    fn start_with(
        client: &Namespace,
        server: &Namespace,
        address: IpAddr,
        pause: Option<Duration>,
    ) -> Result<Self> {
        let connect = || {
            let listener = server.run(|| TcpListener::bind((address, 0)))?;
            SockRef::from(&listener).set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
            SockRef::from(&listener).set_read_timeout(Some(PATIENCE))?;
            let address = listener.local_addr()?;
            let sender = client.run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
            let (receiver, _) = listener.accept()?;
            sender.set_write_timeout(Some(PATIENCE))?;
            receiver.set_read_timeout(Some(PATIENCE))?;
            Ok((sender, receiver))
        };
        let (sender, receiver) = tried(&format!("connect to {address}"), connect())?;
        let socket = tried("duplicate a socket", sender.try_clone())?;
        let go_on = Arc::new(AtomicBool::new(true));
        let arrived = Arc::new(AtomicU64::new(0));
        let (going_on, arriving) = (Arc::clone(&go_on), Arc::clone(&arrived));
        Ok(Self {
            go_on,
            arrived,
            socket,
            sender: std::thread::spawn(move || send(sender, &going_on, pause)),
            receiver: std::thread::spawn(move || receive(receiver, &arriving)),
        })
    }

    /// Waits until [`PROGRESS_BYTES`] more have arrived.
    pub fn wait_for_progress(&self) -> Result<()> {
        let target = self.arrived.load(Ordering::Relaxed) + PROGRESS_BYTES;
        wait_until("the TCP stream goes on", || {
            check(!self.receiver.is_finished(), || {
                "the TCP stream broke".into()
            })?;
            Ok(self.arrived.load(Ordering::Relaxed) >= target)
        })
    }

    /// Bytes that have arrived so far, all of them as they were sent.
    pub fn arrived_bytes(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Segments that were sent more than once.
    pub fn retransmissions(&self) -> Result<u64> {
        let count = traffic::retransmissions(self.socket.as_fd());
        tried("read the retransmissions", count)
    }

    /// Ends the stream; all that was sent must have arrived.
    pub fn finish(self) -> Result<u64> {
        self.go_on.store(false, Ordering::Relaxed);
        let result = |thread: JoinHandle<io::Result<u64>>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let sent = tried("send a TCP stream", result(self.sender))?;
        let received = tried("receive a TCP stream", result(self.receiver))?;
        check(sent == received, || {
            format!("sent {sent} bytes, received {received}")
        })?;
        Ok(sent)
    }
}

/// Bytes that are unlike those at any other offset: noise, which has no second
/// place in a block, and in every piece of it the offset. Cheap without
/// optimization, too: tests send hundreds of megabytes of it.
fn block(offset: u64) -> Vec<u8> {
    const PIECE_BYTES: usize = 512;
    static NOISE: LazyLock<Vec<u8>> = LazyLock::new(|| noise(0, BLOCK_BYTES));
    let mut block = NOISE.clone();
    let offsets = (offset..).step_by(PIECE_BYTES);
    for (piece, offset) in block.chunks_exact_mut(PIECE_BYTES).zip(offsets) {
        piece[..8].copy_from_slice(&offset.to_le_bytes());
    }
    block
}

fn send(mut socket: TcpStream, go_on: &AtomicBool, pause: Option<Duration>) -> io::Result<u64> {
    let mut sent = 0;
    while go_on.load(Ordering::Relaxed) {
        socket.write_all(&block(sent))?;
        sent += BLOCK_BYTES as u64;
        if let Some(pause) = pause {
            std::thread::sleep(pause);
        }
    }
    socket.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn receive(mut socket: impl Read, arrived: &AtomicU64) -> io::Result<u64> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut received = 0;
    loop {
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match socket.read(&mut buffer[filled..])? {
                0 if filled == 0 => return Ok(received),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => filled += length,
            }
        }
        if buffer != block(received) {
            return Err(io::Error::other(format!("damaged after {received} bytes")));
        }
        received += BLOCK_BYTES as u64;
        arrived.store(received, Ordering::Relaxed);
    }
}

/// A tiny web server in `server` at `listen` for one request, which comes from
/// `client` and goes to `to`. The page has `blocks` times 64 KiB, all of which
/// are compared. Returns the client's address as the server saw it.
pub fn fetch(
    server: &Namespace,
    listen: SocketAddr,
    client: &Namespace,
    to: SocketAddr,
    blocks: u64,
) -> Result<IpAddr> {
    let listener = tried(
        &format!("listen on {listen}"),
        server.run(|| TcpListener::bind(listen)),
    )?;
    tried(
        "set a timeout",
        SockRef::from(&listener).set_read_timeout(Some(PATIENCE)),
    )?;
    std::thread::scope(|scope| {
        let served = scope.spawn(|| serve(&listener, blocks));
        let fetched = client.run(|| get(to, blocks));
        let served = served
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        tried(&format!("fetch http://{to}/"), fetched)?;
        tried(&format!("serve http://{listen}/"), served)
    })
}

fn serve(listener: &TcpListener, blocks: u64) -> io::Result<IpAddr> {
    let (mut socket, from) = listener.accept()?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(socket.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line != "GET / HTTP/1.0\r\n" {
        return Err(io::Error::other(format!("a strange request: {line:?}")));
    }
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line)?;
    }
    let length = blocks * BLOCK_BYTES as u64;
    write!(
        socket,
        "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n"
    )?;
    for number in 0..blocks {
        socket.write_all(&block(number * BLOCK_BYTES as u64))?;
    }
    Ok(from.ip())
}

fn get(to: SocketAddr, blocks: u64) -> io::Result<()> {
    let mut socket = TcpStream::connect_timeout(&to, PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    write!(socket, "GET / HTTP/1.0\r\nHost: {to}\r\n\r\n")?;
    let mut reader = BufReader::new(socket);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line != "HTTP/1.0 200 OK\r\n" {
        return Err(io::Error::other(format!("a strange answer: {line:?}")));
    }
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line)?;
    }
    let bytes = receive(reader, &AtomicU64::new(0))?;
    if bytes != blocks * BLOCK_BYTES as u64 {
        return Err(io::Error::other(format!("a page of {bytes} bytes")));
    }
    Ok(())
}

/// Loads rules into a namespace's packet filter (nft(8)).
pub fn nft(namespace: &Namespace, rules: &str) -> Result<()> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]);
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = namespace.spawn(command).map_err(|error| {
        if error.errno() == Some(libc::ENOENT) {
            error.hint("install the package nftables; tests that need it are `long`")
        } else {
            error
        }
    })?;
    if let Some(mut stdin) = child.process().stdin.take() {
        tried("write to nft", stdin.write_all(rules.as_bytes()))?;
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.process().stderr.take() {
        tried("read from nft", stderr.read_to_string(&mut said))?;
    }
    let status = tried("wait for nft", child.process().wait())?;
    check(status.success(), || format!("nft: {}", said.trim()))
}

/// Makes an interface's way out slow: `bytes_per_second`, and all else waits in
/// a queue that has room for more than any socket may send ahead. This is what
/// `tc qdisc add dev NAME root tbf ...` does.
pub fn slow_down(namespace: &Namespace, name: &str, bytes_per_second: u32) -> Result<()> {
    const QUEUE_BYTES: u32 = 256 << 20;
    const BURST_BYTES: u32 = 64 << 10;
    // linux/rtnetlink.h, linux/pkt_sched.h.
    const TCA_KIND: u16 = 1;
    const TCA_OPTIONS: u16 = 2;
    const TCA_TBF_PARMS: u16 = 1;
    const TCA_TBF_BURST: u16 = 6;
    const TC_LINKLAYER_ETHERNET: u8 = 1;

    // struct tc_tbf_qopt: two struct tc_ratespec, limit, buffer, mtu.
    let mut parameters = vec![0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    parameters.extend(bytes_per_second.to_ne_bytes());
    parameters.extend([0; 12]);
    parameters.extend(QUEUE_BYTES.to_ne_bytes());
    parameters.extend([0; 8]);
    let mut options = attribute(TCA_TBF_PARMS, &parameters);
    options.extend(attribute(TCA_TBF_BURST, &BURST_BYTES.to_ne_bytes()));

    let mut attributes = attribute(TCA_KIND, b"tbf\0");
    attributes.extend(attribute(TCA_OPTIONS, &options));
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    root_queue(namespace, name, libc::RTM_NEWQDISC, flags, &attributes).map_err(|cause| {
        let error = Error::os(format!("cannot slow down {name}"), cause);
        if error.errno() == Some(libc::ENOENT) {
            error.hint("the kernel lacks the token bucket filter (module sch_tbf)")
        } else {
            error
        }
    })
}

/// Takes back what [`slow_down`] did; what waits there is lost.
pub fn speed_up(namespace: &Namespace, name: &str) -> Result<()> {
    root_queue(namespace, name, libc::RTM_DELQDISC, 0, &[])
        .map_err(|cause| Error::os(format!("cannot speed up {name}"), cause))
}

/// A request about an interface's root queueing discipline.
fn root_queue(
    namespace: &Namespace,
    name: &str,
    kind: u16,
    flags: libc::c_int,
    attributes: &[u8],
) -> io::Result<()> {
    // linux/pkt_sched.h.
    const TC_H_ROOT: u32 = 0xffff_ffff;

    let index = link(namespace, name)
        .map_err(|error| io::Error::other(error.to_string()))?
        .index;
    // struct tcmsg: family, interface, handle, parent, info.
    let mut message = vec![0; 4];
    message.extend(index.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(TC_H_ROOT.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(attributes);
    transact(namespace, kind, flags, &message)
}

/// One rtnetlink(7) request and its acknowledgement: what the library has no
/// use for, and operators do.
pub fn transact(
    namespace: &Namespace,
    kind: u16,
    flags: libc::c_int,
    message: &[u8],
) -> io::Result<()> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags;
    let mut request = ((16 + message.len()) as u32).to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend((flags as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend(message);

    let exchange = || {
        let mut socket = NetlinkSocket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.send_to(&request, &NetlinkAddr::new(0, 0), 0)?;
        let mut answer = Vec::with_capacity(4096);
        socket.recv(&mut answer, 0)?;
        // struct nlmsgerr follows the header: zero, or minus the errno.
        let error = answer.get(16..20).and_then(|error| error.try_into().ok());
        match error.map(i32::from_ne_bytes) {
            Some(0) => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(-error)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    };
    namespace.run(exchange)
}

/// A netlink attribute.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// What an operator does to the kernel's routes with ip(8).
#[derive(Clone, Copy, Debug)]
pub enum RouteCommand {
    /// `ip route add PREFIX dev NAME`.
    Add,
    /// `ip route replace PREFIX dev NAME`.
    Replace,
    /// `ip route del PREFIX dev NAME`.
    Delete,
}

/// As ip(8) with this command, for the main table.
pub fn ip_route(
    namespace: &Namespace,
    command: RouteCommand,
    prefix: IpNet,
    device: &str,
    metric: Option<u32>,
) -> Result<()> {
    // linux/rtnetlink.h.
    const RTA_DST: u16 = 1;
    const RTA_OIF: u16 = 4;
    const RTA_PRIORITY: u16 = 6;
    const RTPROT_BOOT: u8 = 3;

    let (kind, flags) = match command {
        RouteCommand::Add => (libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL),
        RouteCommand::Replace => (libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE),
        RouteCommand::Delete => (libc::RTM_DELROUTE, 0),
    };
    let is_deleted = matches!(command, RouteCommand::Delete);
    let (family, destination, link) = match prefix {
        IpNet::V4(net) => (
            libc::AF_INET,
            net.network().octets().to_vec(),
            libc::RT_SCOPE_LINK,
        ),
        IpNet::V6(net) => (
            libc::AF_INET6,
            net.network().octets().to_vec(),
            libc::RT_SCOPE_UNIVERSE,
        ),
    };
    let (protocol, scope, unicast) = match is_deleted {
        true => (0, libc::RT_SCOPE_NOWHERE, 0),
        false => (RTPROT_BOOT, link, libc::RTN_UNICAST),
    };
    // struct rtmsg.
    let mut message = vec![family as u8, prefix.prefix_len(), 0, 0];
    message.extend([libc::RT_TABLE_MAIN, protocol, scope, unicast]);
    message.extend([0; 4]);
    let index = link_index(namespace, device)?;
    message.extend(attribute(RTA_DST, &destination));
    message.extend(attribute(RTA_OIF, &index.to_ne_bytes()));
    if let Some(metric) = metric {
        message.extend(attribute(RTA_PRIORITY, &metric.to_ne_bytes()));
    }
    transact(namespace, kind, flags, &message).map_err(|cause| {
        Error::os(
            format!("cannot {command:?} the route {prefix} dev {device}"),
            cause,
        )
    })
}

fn link_index(namespace: &Namespace, name: &str) -> Result<u32> {
    Ok(link(namespace, name)?.index)
}

/// All routes of the main table, in the order in which the kernel looks at
/// those to one prefix.
pub fn main_routes(namespace: &Namespace) -> Result<Vec<Route>> {
    namespace.netlink()?.main_routes(&|_| true)
}

/// Reads a line that must come.
pub fn wait_for_line(reader: &mut impl BufRead, part: &str) -> Result<String> {
    let mut seen = String::new();
    loop {
        let mut line = String::new();
        match reader.read_line(&mut line) {
            Ok(0) => return fail(format!("no line with {part:?} in:\n{seen}")),
            Ok(_) if line.contains(part) => return Ok(line),
            Ok(_) => seen.push_str(&line),
            Err(cause) => return Err(Error::os("cannot read a program's output", cause)),
        }
    }
}

/// All that a tunnel could leave behind in a namespace, as it is now.
pub fn inventory(namespace: &Namespace) -> Result<BTreeSet<String>> {
    // What the kernel gives each interface, in its own time.
    let by_itself = |net: &IpNet| match net {
        IpNet::V4(_) => false,
        IpNet::V6(net) => net.addr().is_unicast_link_local() || net.addr().is_multicast(),
    };
    let mut netlink = namespace.netlink()?;
    let names = namespace.run(testbed::interfaces)?;
    let mut all: BTreeSet<_> = names
        .iter()
        .map(|name| format!("interface {name}"))
        .collect();
    let addresses = netlink.addresses()?;
    let addresses = addresses.iter().filter(|(_, net)| !by_itself(net));
    all.extend(addresses.map(|(index, net)| format!("address {net} on {index}")));
    let routes = netlink.main_routes(&|_| true)?;
    let routes = routes.iter().filter(|route| !by_itself(&route.destination));
    all.extend(routes.map(|route| format!("{route:?}")));
    for table in ["udp", "udp6"] {
        let path = format!("/proc/thread-self/net/{table}");
        let text = tried(
            "list the sockets",
            namespace.run(|| fs::read_to_string(path)),
        )?;
        // The second column is the local address and port.
        let sockets = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(1));
        all.extend(sockets.map(|socket| format!("{table} socket {socket}")));
    }
    Ok(all)
}

/// Whether all that is there was there before.
pub fn nothing_left(namespace: &Namespace, before: &BTreeSet<String>) -> Result<()> {
    let after = inventory(namespace)?;
    let left: Vec<_> = after.difference(before).collect();
    check(left.is_empty(), || format!("left behind: {left:?}"))
}
