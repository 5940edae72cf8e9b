//! The file format of Wireshark and tshark (PCAP Next Generation,
//! draft-ietf-opsawg-pcapng): one interface for each worker.

use std::io::{self, Write};

/// Block types.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;

/// Options of all blocks.
const OPTION_END: u16 = 0;
const OPTION_COMMENT: u16 = 1;

/// The link type of packets that begin with an IP header (`LINKTYPE_RAW`).
const LINKTYPE_RAW: u16 = 101;

/// Unit of timestamps, as a negative power of ten.
const NANOSECONDS: u8 = 9;

/// Longest text of an option.
const TEXT_BYTES_MAX: usize = 1000;

/// What is said of all packets.
pub(super) struct Section<'a> {
    /// Of the tunnel's process.
    pub(super) version: &'a str,
    /// Name of the TUN device.
    pub(super) tun: &'a str,
    /// Number of interfaces.
    pub(super) workers: u16,
    pub(super) snaplen_bytes: u32,
    /// As it was given.
    pub(super) filter: Option<&'a str>,
}

/// A packet, and what is said of it.
pub(super) struct Packet<'a> {
    pub(super) worker: u16,
    pub(super) is_inbound: bool,
    pub(super) timestamp_ns: u64,
    /// Bytes of the whole packet.
    pub(super) packet_bytes: u32,
    pub(super) data: &'a [u8],
    /// Packets of this worker that were lost since the one before.
    pub(super) lost: u64,
    pub(super) comment: &'a str,
}

/// What came of an interface.
#[derive(Clone, Copy, Default)]
pub(super) struct Statistics {
    pub(super) timestamp_ns: u64,
    /// Packets that there were.
    pub(super) received: u64,
    /// Packets that were lost.
    pub(super) lost: u64,
    /// Packets that the filter took.
    pub(super) accepted: u64,
}

/// Writes blocks.
pub(super) struct Writer<W> {
    out: W,
    /// The block that is being made.
    block: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// When it cannot be written, as with all that follow.
    pub(super) fn new(out: W, section: &Section<'_>) -> io::Result<Self> {
        let block = Vec::new();
        let mut writer = Self { out, block };
        writer.begin(SECTION_HEADER);
        writer.word(0x1a2b_3c4d);
        // Version 1.0, of a length that is not known.
        writer.word(1);
        writer.double(u64::MAX);
        writer.text(4, &format!("fastvpn {}", section.version));
        writer.end()?;
        for worker in 0..section.workers {
            writer.begin(INTERFACE_DESCRIPTION);
            writer.word(LINKTYPE_RAW.into());
            writer.word(section.snaplen_bytes);
            writer.text(2, &format!("{}-{worker}", section.tun));
            writer.text(3, &format!("worker {worker} of {}", section.tun));
            writer.option(9, &[NANOSECONDS]);
            if let Some(filter) = section.filter {
                // Of libpcap's kind.
                writer.text(11, &format!("\0{filter}"));
            }
            writer.end()?;
        }
        Ok(writer)
    }

    /// Appends a packet.
    pub(super) fn packet(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        self.begin(ENHANCED_PACKET);
        self.word(packet.worker.into());
        self.time(packet.timestamp_ns);
        self.word(packet.data.len() as u32);
        self.word(packet.packet_bytes);
        self.padded(packet.data);
        let flags = if packet.is_inbound { 1_u32 } else { 2 };
        self.option(2, &flags.to_le_bytes());
        if packet.lost > 0 {
            self.option(4, &packet.lost.to_le_bytes());
        }
        if !packet.comment.is_empty() {
            self.text(OPTION_COMMENT, packet.comment);
        }
        self.end()
    }

    /// Appends what came of an interface.
    pub(super) fn statistics(&mut self, worker: u16, it: &Statistics) -> io::Result<()> {
        self.begin(INTERFACE_STATISTICS);
        self.word(worker.into());
        self.time(it.timestamp_ns);
        for (code, value) in [(4, it.received), (5, it.lost), (6, it.accepted)] {
            self.option(code, &value.to_le_bytes());
        }
        self.end()
    }

    /// What is written to.
    pub(super) fn get_ref(&self) -> &W {
        &self.out
    }

    /// Hands on what is written.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn begin(&mut self, kind: u32) {
        self.block.clear();
        self.word(kind);
        // Its length, once that is known.
        self.word(0);
    }

    fn word(&mut self, word: u32) {
        self.block.extend_from_slice(&word.to_le_bytes());
    }

    fn double(&mut self, number: u64) {
        self.block.extend_from_slice(&number.to_le_bytes());
    }

    /// The upper half first.
    fn time(&mut self, timestamp_ns: u64) {
        self.word((timestamp_ns >> 32) as u32);
        self.word(timestamp_ns as u32);
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.block.extend_from_slice(bytes);
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.block.extend_from_slice(&[0; 3][..padding]);
    }

    fn option(&mut self, code: u16, value: &[u8]) {
        self.word(u32::from(code) | (value.len() as u32) << 16);
        self.padded(value);
    }

    fn text(&mut self, code: u16, text: &str) {
        self.option(code, start_of(text).as_bytes());
    }

    fn end(&mut self) -> io::Result<()> {
        self.option(OPTION_END, &[]);
        let block_bytes = self.block.len() as u32 + 4;
        self.word(block_bytes);
        self.block[4..8].copy_from_slice(&block_bytes.to_le_bytes());
        self.out.write_all(&self.block)
    }
}

/// As much of a text as an option has.
fn start_of(text: &str) -> &str {
    let end = (0..=text.len().min(TEXT_BYTES_MAX)).rev();
    let mut starts = end.filter_map(|end| text.get(..end));
    starts.next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use pcap_parser::pcapng::{Block, PcapNGOption, parse_block_le};
    use proptest::prelude::*;

    use super::*;

    const SECTION: Section<'_> = Section {
        version: "1.2.3",
        tun: "fastvpn0",
        workers: 2,
        snaplen_bytes: 256,
        filter: Some("tcp port 443"),
    };

    fn option<'a>(options: &'a [PcapNGOption<'_>], code: u16) -> Option<&'a [u8]> {
        let found = options.iter().find(|option| option.code.0 == code)?;
        Some(&found.value[..usize::from(found.len)])
    }

    #[test]
    fn a_file_says_what_is_in_it() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &SECTION).unwrap();
        let statistics = Statistics {
            timestamp_ns: 1 << 40,
            received: 7,
            lost: 2,
            accepted: 3,
        };
        writer.statistics(1, &statistics).unwrap();
        let mut rest = &bytes[..];
        let mut interfaces = Vec::new();
        while !rest.is_empty() {
            let (after, block) = parse_block_le(rest).unwrap();
            rest = after;
            match block {
                Block::SectionHeader(header) => {
                    assert_eq!(option(&header.options, 4), Some(&b"fastvpn 1.2.3"[..]));
                }
                Block::InterfaceDescription(it) => {
                    assert_eq!((it.linktype.0, it.snaplen, it.if_tsresol), (101, 256, 9));
                    assert_eq!(option(&it.options, 11), Some(&b"\0tcp port 443"[..]));
                    interfaces.push(option(&it.options, 2).unwrap().to_vec());
                }
                Block::InterfaceStatistics(it) => {
                    assert_eq!((it.if_id, it.ts_high, it.ts_low), (1, 1 << 8, 0));
                    for (code, value) in [(4, 7_u64), (5, 2), (6, 3)] {
                        assert_eq!(option(&it.options, code), Some(&value.to_le_bytes()[..]));
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(interfaces, [b"fastvpn0-0", b"fastvpn0-1"]);
    }

    proptest! {
        #[test]
        fn packets_are_read_as_they_were_written(
            data in prop::collection::vec(any::<u8>(), 0..300),
            (worker, timestamp_ns, packet_bytes) in any::<(u16, u64, u32)>(),
            (lost, is_inbound, comment) in any::<(u64, bool, String)>(),
        ) {
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes, &SECTION).unwrap();
            writer.packet(&Packet {
                worker,
                is_inbound,
                timestamp_ns,
                packet_bytes,
                data: &data,
                lost,
                comment: &comment,
            }).unwrap();
            let mut rest = &bytes[..];
            let mut last = None;
            while !rest.is_empty() {
                let (after, block) = parse_block_le(rest).unwrap();
                (rest, last) = (after, Some(block));
            }
            let Some(Block::EnhancedPacket(packet)) = last else {
                panic!("{last:?}");
            };
            prop_assert_eq!(packet.if_id, u32::from(worker));
            let time = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
            prop_assert_eq!((time, packet.origlen), (timestamp_ns, packet_bytes));
            prop_assert_eq!(&packet.data[..packet.caplen as usize], &data[..]);
            let flags = u32::from(!is_inbound) + 1;
            prop_assert_eq!(option(&packet.options, 2), Some(&flags.to_le_bytes()[..]));
            let lost = (lost > 0).then(|| lost.to_le_bytes());
            prop_assert_eq!(option(&packet.options, 4), lost.as_ref().map(|it| &it[..]));
            let found = option(&packet.options, OPTION_COMMENT).unwrap_or_default();
            prop_assert_eq!(found, start_of(&comment).as_bytes());
        }
    }
}
