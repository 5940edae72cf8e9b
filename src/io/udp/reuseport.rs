//! Which worker gets which datagram, and why no flow is reordered.
//!
//! Between two hosts all datagrams would carry one 4-tuple, and the kernel's
//! own `SO_REUSEPORT` hash would give them all to one worker. So each sending
//! worker has a source port of its own, as VXLAN does for entropy: worker *i*
//! sends from a port that is the tunnel's port plus *i* modulo
//! [`WORKERS_MAX`]. The receiver's sockets carry a classic BPF program that
//! reads the source port back and picks worker *i* modulo its own count.
//!
//! The unit of order is thus the sending worker. A hash of the inner flow
//! would spread further, but one UDP GRO batch may hold several inner flows,
//! and the program sees the first only: the others would jump between workers
//! and be reordered. Which worker sends a flow depends on the flow alone
//! ([`crate::io::tun::steering`]), so its packets stay in order from end to end;
//! with equal `--queues` at both ends both directions meet at one worker.
//!
//! Not every port reaches every peer: stateful firewalls admit answers to the
//! listen port alone, and NATs may rewrite any. So a worker sends from its own
//! port only to peers of which it is known that this port reaches them
//! (`crate::daemon::peers::ports` finds out), and from the listen port to all others. At
//! the switch, in either direction, packets under way may be overtaken by later
//! ones of their flow, once: the two ports lead to different workers there. A
//! process that takes over finds out anew.
//!
//! In WireGuard mode all send from the listen port, since peers send to where they last
//! received from. There a worker is picked by a hash of the sender's address and port, so that
//! peers are spread; and all that is not a data message goes to the handshake socket, so that a
//! flood of them fills no worker's queue.
//!
//! In plain mode a peer that sends all from one port (a plain one, one behind a NAT, or one
//! queue) is received by worker 0 alone, whose rate is far above what such a peer
//! sends. The unit of order is the port then.

use std::net::SocketAddr;

use crate::wire::Mode;
use crate::wire::wireguard::message;

/// Most workers, and queues: the kernel's `MAX_TAP_QUEUES` (`linux/if_tun.h`).
pub const WORKERS_MAX: u16 = 256;

/// Start of the first range tried for source ports: above the kernel's
/// default range for ephemeral ports (`ip_local_port_range`, to 60999), so
/// that neither takes the other's.
const PREFERRED_PORT_MIN: u16 = 61_000;

/// Ports that worker `index` may send from, best first. Worker 0 sends from
/// the tunnel's own port, as plain peers do.
pub fn source_ports(listen_port: u16, index: u16) -> impl Iterator<Item = u16> {
    let residue = listen_port.wrapping_add(index) % WORKERS_MAX;
    let steps = 0..=u16::MAX / WORKERS_MAX;
    let ports = steps.map(move |step| step * WORKERS_MAX + residue);
    let (preferred, others) = (ports.clone(), ports);
    preferred
        .filter(|&port| port >= PREFERRED_PORT_MIN)
        .chain(
            others
                .filter(|&port| (1024..PREFERRED_PORT_MIN).contains(&port))
                .rev(),
        )
        .filter(move |&port| port != listen_port)
}

/// Whether a port is one that a tunnel's workers are likely to send from.
pub fn is_likely_own(port: u16) -> bool {
    // The first choice of each worker, whatever the listen port.
    (PREFERRED_PORT_MIN..PREFERRED_PORT_MIN + WORKERS_MAX).contains(&port)
}

/// `SKF_NET_OFF` (`linux/filter.h`): loads relative to the IP header.
const NETWORK_HEADER: u32 = -0x10_0000_i32 as u32;

const fn instruction(code: u32, jump_true: u8, jump_false: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: jump_true,
        jf: jump_false,
        k,
    }
}

/// Offsets of IP headers without options (RFC 791, RFC 8200).
mod offset {
    use super::NETWORK_HEADER;

    pub const V4_SOURCE: u32 = NETWORK_HEADER.wrapping_add(12);
    pub const V4_SOURCE_PORT: u32 = NETWORK_HEADER.wrapping_add(20);
    /// Of its four words the last one tells hosts apart best, as a rule.
    pub const V6_SOURCE_LAST: u32 = NETWORK_HEADER.wrapping_add(20);
    pub const V6_SOURCE_PORT: u32 = NETWORK_HEADER.wrapping_add(40);
}

/// The program for a group of `workers` sockets on `listen`'s port.
///
/// In plain mode it picks `((source port - listen port) mod 256) mod workers`. In WireGuard
/// mode it picks a worker by a hash of the sender, and the socket behind the workers' for
/// all that is not a data message.
///
/// The IPv4 header is taken to have no options; with options some other
/// worker is picked, still the same one for all datagrams alike.
pub fn program(listen: SocketAddr, workers: u16, mode: Mode) -> Vec<libc::sock_filter> {
    let workers = u32::from(workers.max(1));
    match mode {
        Mode::Plain => plain_program(listen, workers),
        Mode::WireGuard => wireguard_program(workers),
    }
}

fn plain_program(listen: SocketAddr, workers: u32) -> Vec<libc::sock_filter> {
    use libc::{BPF_A, BPF_ABS, BPF_ALU, BPF_AND, BPF_B, BPF_H, BPF_JA, BPF_JEQ, BPF_JMP, BPF_K};
    use libc::{BPF_LD, BPF_MOD, BPF_RET, BPF_RSH, BPF_SUB};
    vec![
        // Version of the outer IP header: a dual-stack socket sees both.
        instruction(BPF_LD | BPF_B | BPF_ABS, 0, 0, NETWORK_HEADER),
        instruction(BPF_ALU | BPF_RSH | BPF_K, 0, 0, 4),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 2, 4),
        instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, offset::V4_SOURCE_PORT),
        instruction(BPF_JMP | BPF_JA, 0, 0, 1),
        instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, offset::V6_SOURCE_PORT),
        instruction(BPF_ALU | BPF_SUB | BPF_K, 0, 0, u32::from(listen.port())),
        instruction(BPF_ALU | BPF_AND | BPF_K, 0, 0, u32::from(WORKERS_MAX - 1)),
        instruction(BPF_ALU | BPF_MOD | BPF_K, 0, 0, workers),
        instruction(BPF_RET | BPF_A, 0, 0, 0),
    ]
}

fn wireguard_program(workers: u32) -> Vec<libc::sock_filter> {
    use libc::{BPF_A, BPF_ABS, BPF_ADD, BPF_ALU, BPF_B, BPF_H, BPF_JA, BPF_JEQ, BPF_JMP, BPF_K};
    use libc::{BPF_LD, BPF_MISC, BPF_MOD, BPF_MUL, BPF_RET, BPF_RSH, BPF_TAX, BPF_W, BPF_X};
    /// Spreads what differs in few bits (Knuth's multiplicative hash).
    const GOLDEN: u32 = 0x9e37_79b1;
    vec![
        // The message's type: the payload starts at 0. Without any the first worker is picked.
        instruction(BPF_LD | BPF_B | BPF_ABS, 0, 0, 0),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, message::DATA.into()),
        instruction(BPF_RET | BPF_K, 0, 0, workers),
        instruction(BPF_LD | BPF_B | BPF_ABS, 0, 0, NETWORK_HEADER),
        instruction(BPF_ALU | BPF_RSH | BPF_K, 0, 0, 4),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 4, 4),
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset::V4_SOURCE),
        instruction(BPF_MISC | BPF_TAX, 0, 0, 0),
        instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, offset::V4_SOURCE_PORT),
        instruction(BPF_JMP | BPF_JA, 0, 0, 3),
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset::V6_SOURCE_LAST),
        instruction(BPF_MISC | BPF_TAX, 0, 0, 0),
        instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, offset::V6_SOURCE_PORT),
        instruction(BPF_ALU | BPF_ADD | BPF_X, 0, 0, 0),
        instruction(BPF_ALU | BPF_MUL | BPF_K, 0, 0, GOLDEN),
        instruction(BPF_ALU | BPF_RSH | BPF_K, 0, 0, 16),
        instruction(BPF_ALU | BPF_MOD | BPF_K, 0, 0, workers),
        instruction(BPF_RET | BPF_A, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_ports_name_their_worker() {
        for listen_port in [8285, 1, 65535, 61000] {
            for index in 0..WORKERS_MAX {
                let ports: Vec<u16> = source_ports(listen_port, index).collect();
                assert!(ports.len() > 200, "{} ports", ports.len());
                assert!(ports[0] >= PREFERRED_PORT_MIN);
                assert!(is_likely_own(ports[0]) || listen_port == ports[0] - WORKERS_MAX);
                for port in ports {
                    assert_eq!(port.wrapping_sub(listen_port) % WORKERS_MAX, index);
                    assert_ne!(port, listen_port);
                    assert!(port >= 1024);
                }
            }
        }
    }
}
