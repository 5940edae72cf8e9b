//! A second opinion for tests and fuzz targets: reads packets and cuts vnet packets
//! the slow and obvious way, from the RFCs and `linux/virtio_net.h`, and says
//! whether what came out is what went in. It shares no code with what it
//! judges and needs nothing but `std`, so that the fuzz crate can include it.
#![allow(dead_code, reason = "each includer uses a part of it")]

use std::collections::HashSet;

/// Bytes of the virtio-net header.
const VIRTIO_BYTES: usize = 10;

/// The 16-bit one's-complement sum in network order (RFC 1071).
pub(crate) fn ones_sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for (index, byte) in parts.concat().iter().enumerate() {
        sum += u32::from(*byte) << if index % 2 == 0 { 8 } else { 0 };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn set16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// What an IP packet is, as far as its length goes.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) v6: bool,
    /// Source, then destination, as in the IP header.
    pub(crate) addresses: Vec<u8>,
    /// Where a routing header, if any, says that the packet ends up.
    pub(crate) final_destination: Vec<u8>,
    /// What follows IPv4 options or IPv6 extension headers.
    pub(crate) protocol: u8,
    /// Where that starts.
    pub(crate) transport_at: usize,
    pub(crate) fragment: bool,
    /// IPv4 options, IPv6 extension headers or the IPv4 reserved bit.
    pub(crate) decorated: bool,
}

/// Reads a packet whose length field is known to be right.
pub(crate) fn view(packet: &[u8]) -> View {
    if packet[0] >> 4 == 4 {
        let transport_at = usize::from(packet[0] & 15) * 4;
        return View {
            v6: false,
            addresses: packet[12..20].to_vec(),
            final_destination: packet[16..20].to_vec(),
            protocol: packet[9],
            transport_at,
            fragment: get16(packet, 6) & 0x3fff != 0,
            decorated: transport_at != 20 || packet[6] & 0x80 != 0,
        };
    }
    let mut view = View {
        v6: true,
        addresses: packet[8..40].to_vec(),
        final_destination: packet[24..40].to_vec(),
        protocol: packet[6],
        transport_at: 40,
        fragment: false,
        decorated: false,
    };
    while let 0 | 43 | 44 | 60 = view.protocol {
        let Some(header) = packet.get(view.transport_at..view.transport_at + 8) else {
            break;
        };
        let header_bytes = match view.protocol {
            44 => 8,
            _ => (usize::from(header[1]) + 1) * 8,
        };
        view.decorated = true;
        view.fragment |= view.protocol == 44;
        if view.protocol == 43
            && header[3] > 0
            && let Some(address) = packet.get(view.transport_at + 8..view.transport_at + 24)
        {
            view.final_destination = address.to_vec();
        }
        view.protocol = header[0];
        view.transport_at += header_bytes;
        if view.fragment {
            break;
        }
    }
    view
}

/// The pseudo-header for a transport length.
fn pseudo(packet: &[u8], view: &View, transport_bytes: usize) -> Vec<u8> {
    let source = if view.v6 {
        &packet[8..24]
    } else {
        &packet[12..16]
    };
    let mut bytes = source.to_vec();
    bytes.extend(&view.final_destination);
    bytes.extend((transport_bytes as u32).to_be_bytes());
    bytes.extend([0, 0, 0, view.protocol]);
    bytes
}

/// Offset of the checksum in a TCP or UDP header.
pub(crate) fn checksum_offset(protocol: u8) -> usize {
    if protocol == 6 { 16 } else { 6 }
}

/// Computes the IPv4 header checksum from scratch.
pub(crate) fn fill_ip_checksum(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        let header_bytes = usize::from(packet[0] & 15) * 4;
        set16(packet, 10, 0);
        let sum = ones_sum(&[&packet[..header_bytes]]);
        set16(packet, 10, !sum);
    }
}

/// Computes the TCP or UDP checksum from scratch; a zero becomes 0xffff.
pub(crate) fn fill_transport_checksum(packet: &mut [u8]) {
    let view = view(packet);
    let at = view.transport_at + checksum_offset(view.protocol);
    set16(packet, at, 0);
    let transport = &packet[view.transport_at..];
    let sum = ones_sum(&[&pseudo(packet, &view, transport.len()), transport]);
    set16(packet, at, if sum == 0xffff { sum } else { !sum });
}

/// Puts the pseudo-header's sum where the checksum goes: `CHECKSUM_PARTIAL`.
pub(crate) fn fill_partial_checksum(packet: &mut [u8]) {
    let view = view(packet);
    let sum = ones_sum(&[&pseudo(packet, &view, packet.len() - view.transport_at)]);
    let at = view.transport_at + checksum_offset(view.protocol);
    set16(packet, at, sum);
}

/// Whether a packet's length fields and its IP, TCP and UDP checksums are good.
pub(crate) fn intact(packet: &[u8]) -> Result<(), String> {
    let length = match packet[0] >> 4 {
        4 => usize::from(get16(packet, 2)),
        6 => usize::from(get16(packet, 4)) + 40,
        version => return Err(format!("version {version}")),
    };
    if length != packet.len() {
        return Err(format!("length {length}, has {}", packet.len()));
    }
    let view = view(packet);
    if !view.v6 && ones_sum(&[&packet[..view.transport_at]]) != 0xffff {
        return Err("IP checksum".into());
    }
    let transport = packet.get(view.transport_at..).ok_or("headers")?;
    let checksum = match view.protocol {
        6 if !view.fragment && transport.len() >= 20 => get16(transport, 16),
        17 if !view.fragment && transport.len() >= 8 => {
            if usize::from(get16(transport, 4)) != transport.len() {
                return Err("UDP length".into());
            }
            if get16(transport, 6) == 0 {
                return Err("no UDP checksum".into());
            }
            get16(transport, 6)
        }
        _ => return Ok(()),
    };
    let sum = ones_sum(&[&pseudo(packet, &view, transport.len()), transport]);
    if sum != 0xffff {
        return Err(format!("transport checksum {checksum:04x}"));
    }
    Ok(())
}

/// The virtio-net header's fields, read from a vnet packet.
#[derive(Debug)]
struct Virtio {
    flags: u8,
    gso_type: u8,
    header_bytes: usize,
    gso_bytes: usize,
    checksum_start: usize,
    checksum_offset: usize,
}

fn virtio(vnet_packet: &[u8]) -> (Virtio, &[u8]) {
    let half = |at: usize| usize::from(u16::from_ne_bytes([vnet_packet[at], vnet_packet[at + 1]]));
    let header = Virtio {
        flags: vnet_packet[0],
        gso_type: vnet_packet[1],
        header_bytes: half(2),
        gso_bytes: half(4),
        checksum_start: half(6),
        checksum_offset: half(8),
    };
    (header, &vnet_packet[VIRTIO_BYTES..])
}

/// Whether the vnet packet is a GSO packet.
pub(crate) fn is_super(vnet_packet: &[u8]) -> bool {
    vnet_packet[1] & 0x7f != 0
}

/// Cuts a well-formed vnet packet into the packets that it stands for.
pub(crate) fn expand(vnet_packet: &[u8]) -> Vec<Vec<u8>> {
    let (header, packet) = virtio(vnet_packet);
    if header.gso_type & 0x7f == 0 {
        let mut packet = packet.to_vec();
        if header.flags & 1 != 0 {
            let sum = ones_sum(&[&packet[header.checksum_start..]]);
            let at = header.checksum_start + header.checksum_offset;
            set16(&mut packet, at, if sum == 0xffff { sum } else { !sum });
        }
        return vec![packet];
    }
    let view = view(packet);
    let at = view.transport_at;
    let payload_at = match view.protocol {
        6 => at + usize::from(packet[at + 12] >> 4) * 4,
        _ => at + 8,
    };
    let pieces: Vec<_> = packet[payload_at..].chunks(header.gso_bytes).collect();
    let mut packets = Vec::new();
    let mut sequence_offset = 0;
    for (index, piece) in pieces.iter().enumerate() {
        let mut out = [&packet[..payload_at], piece].concat();
        let out_bytes = out.len();
        if view.v6 {
            set16(&mut out, 4, (out_bytes - 40) as u16);
        } else {
            let id = get16(&out, 4);
            set16(&mut out, 4, id.wrapping_add(index as u16));
            set16(&mut out, 2, out_bytes as u16);
        }
        if view.protocol == 6 {
            let sequence = u32::from_be_bytes(out[at + 4..at + 8].try_into().unwrap());
            let sequence = sequence.wrapping_add(sequence_offset);
            out[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
            if index != 0 {
                out[at + 13] &= 0x7f; // CWR
            }
            if index != pieces.len() - 1 {
                out[at + 13] &= 0xf6; // PSH, FIN
            }
        } else {
            set16(&mut out, at + 4, (out_bytes - at) as u16);
        }
        fill_ip_checksum(&mut out);
        fill_transport_checksum(&mut out);
        sequence_offset += piece.len() as u32;
        packets.push(out);
    }
    packets
}

/// Whether the kernel can take the vnet packet and gets what the packet says.
pub(crate) fn well_formed(vnet_packet: &[u8]) -> Result<(), String> {
    let (header, packet) = virtio(vnet_packet);
    if !is_super(vnet_packet) {
        return match vnet_packet[..VIRTIO_BYTES] {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => Ok(()),
            _ => Err(format!("single packet with {header:?}")),
        };
    }
    let check = |ok: bool, what: &str| match ok {
        true => Ok(()),
        false => Err(format!("{what}: {header:?}")),
    };
    let view = view(packet);
    let at = view.transport_at;
    let gso_type = match (view.protocol, view.v6) {
        (6, false) => 1,
        (6, true) => 4,
        (17, _) => 5,
        (protocol, _) => return Err(format!("protocol {protocol} merged")),
    };
    let length = match view.v6 {
        true => usize::from(get16(packet, 4)) + 40,
        false => usize::from(get16(packet, 2)),
    };
    let header_bytes = match view.protocol {
        6 => at + usize::from(packet[at + 12] >> 4) * 4,
        _ => at + 8,
    };
    check(header.gso_type == gso_type, "GSO type")?;
    check(header.flags == 1, "flags")?;
    check(header.header_bytes == header_bytes, "header bytes")?;
    check(header.checksum_start == at, "checksum start")?;
    let offset = checksum_offset(view.protocol);
    check(header.checksum_offset == offset, "checksum offset")?;
    check(length == packet.len(), "IP length")?;
    check(packet.len() <= 65535, "over 65535 bytes")?;
    let payload_bytes = packet.len() - header_bytes;
    check(header.gso_bytes > 0, "GSO bytes")?;
    check(payload_bytes > header.gso_bytes, "only one segment")?;
    if view.protocol == 17 {
        let count = payload_bytes.div_ceil(header.gso_bytes);
        check(count <= 64, "UDP segments")?;
        let length = usize::from(get16(packet, at + 4));
        check(length == packet.len() - at, "UDP length")?;
    }
    if !view.v6 {
        let sum = ones_sum(&[&packet[..at]]);
        check(sum == 0xffff, "IP checksum")?;
    }
    let mut partial = packet.to_vec();
    fill_partial_checksum(&mut partial);
    check(partial == packet, "partial checksum")
}

/// What must stay in order: packets of one TCP or UDP flow, and with each of
/// them all other packets between the same addresses.
type OrderKey = (Vec<u8>, Option<(u8, [u8; 4])>);

fn order_key(packet: &[u8]) -> OrderKey {
    let view = view(packet);
    let transport_bytes_min = match view.protocol {
        6 => 20,
        17 => 8,
        _ => usize::MAX,
    };
    let ports = match packet.get(view.transport_at..) {
        Some(t) if t.len() >= transport_bytes_min && !view.fragment && !view.decorated => {
            Some((view.protocol, [t[0], t[1], t[2], t[3]]))
        }
        _ => None,
    };
    (view.addresses, ports)
}

struct Expanded {
    packet: Vec<u8>,
    key: OrderKey,
    vnet_packet: usize,
    index: usize,
}

/// How a packet that came out of a super-vnet packet compares to the one put in.
#[derive(Debug, PartialEq)]
enum Likeness {
    /// Equal; zero in either form counts as equal in a recomputed checksum.
    Same,
    /// Equal but for the IPv4 identification, which did not count up.
    FixedIdentification,
    Different,
}

fn likeness(input: &[u8], output: &Expanded, merged: bool) -> Likeness {
    if input == output.packet {
        return Likeness::Same;
    }
    if !merged || intact(input).is_err() {
        return Likeness::Different;
    }
    let mut canonical = input.to_vec();
    fill_ip_checksum(&mut canonical);
    fill_transport_checksum(&mut canonical);
    if canonical == output.packet {
        return Likeness::Same;
    }
    if input[0] >> 4 == 4 && input[6] & 0x40 != 0 {
        let id = get16(input, 4).wrapping_add(output.index as u16);
        set16(&mut canonical, 4, id);
        fill_ip_checksum(&mut canonical);
        if canonical == output.packet {
            return Likeness::FixedIdentification;
        }
    }
    Likeness::Different
}

/// Requires that `vnet_packets`, cut up again, are the packets of `inputs`: all of
/// them (or, with `lossy`, some of them), unchanged but for the identification
/// of unfragmentable IPv4 packets that was the same in all of a vnet packet, and in
/// order within each flow.
pub(crate) fn same_traffic(
    inputs: &[Vec<u8>],
    vnet_packets: &[Vec<u8>],
    lossy: bool,
) -> Result<(), String> {
    let mut outputs = Vec::new();
    for (vnet_packet, bytes) in vnet_packets.iter().enumerate() {
        well_formed(bytes)?;
        for (index, packet) in expand(bytes).into_iter().enumerate() {
            let key = order_key(&packet);
            outputs.push(Expanded {
                packet,
                key,
                vnet_packet,
                index,
            });
        }
    }
    if !lossy && outputs.len() != inputs.len() {
        return Err(format!("{} in, {} out", inputs.len(), outputs.len()));
    }
    let keys: Vec<_> = inputs.iter().map(|packet| order_key(packet)).collect();
    let known: HashSet<_> = keys.iter().collect();
    if let Some(stranger) = outputs.iter().find(|output| !known.contains(&output.key)) {
        return Err(format!("{:02x?} never went in", stranger.packet));
    }
    // Vnet packets in which some packet's identification counts, or stands still.
    let mut counting = HashSet::new();
    let mut fixed = HashSet::new();
    for key in known {
        let concerns = |other: &OrderKey| other == key || (other.0 == key.0 && other.1.is_none());
        let mut rest = inputs
            .iter()
            .zip(&keys)
            .filter(|(_, other)| concerns(other))
            .map(|(packet, _)| packet);
        for output in outputs.iter().filter(|output| concerns(&output.key)) {
            let merged = is_super(&vnet_packets[output.vnet_packet]);
            loop {
                let Some(input) = rest.next() else {
                    return Err(format!("lost its place: {:02x?}", output.packet));
                };
                match likeness(input, output, merged) {
                    Likeness::Same => {
                        if merged && output.index > 0 {
                            counting.insert(output.vnet_packet);
                            intact(input)?;
                        }
                        break;
                    }
                    Likeness::FixedIdentification => {
                        fixed.insert(output.vnet_packet);
                        break;
                    }
                    Likeness::Different if lossy => {}
                    Likeness::Different => {
                        return Err(format!(
                            "segment {} of vnet packet {}: {:02x?} became {:02x?}",
                            output.index, output.vnet_packet, input, output.packet
                        ));
                    }
                }
            }
        }
        if !lossy && rest.next().is_some() {
            return Err("packets of a flow are missing".into());
        }
    }
    match counting.intersection(&fixed).next() {
        Some(vnet_packet) => Err(format!("vnet packet {vnet_packet} mixes identifications")),
        None => Ok(()),
    }
}
