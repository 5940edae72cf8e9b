//! Layouts of WireGuard's four messages (paper, section 5.4). All integers are
//! little-endian.
//!
//! What is parsed here has the right type and length, and nothing else is known of it: it
//! is not authentic yet.

/// Type of a message: the first byte, and three zero bytes after it.
pub const INITIATION: u8 = 1;
/// See [`INITIATION`].
pub const RESPONSE: u8 = 2;
/// See [`INITIATION`].
pub const COOKIE_REPLY: u8 = 3;
/// See [`INITIATION`].
pub const DATA: u8 = 4;

/// Bytes of an initiation.
pub const INITIATION_BYTES: usize = 148;
/// Bytes of a response.
pub const RESPONSE_BYTES: usize = 92;
/// Bytes of a cookie reply.
pub const COOKIE_REPLY_BYTES: usize = 64;
/// Bytes of the shortest data message, which is a keepalive.
pub const DATA_BYTES_MIN: usize = DATA_HEADER_BYTES + TAG_BYTES;

/// Ahead of the sealed packet in a data message: type, receiver index, counter.
pub const DATA_HEADER_BYTES: usize = 16;

/// Behind it: Poly1305's tag.
pub const TAG_BYTES: usize = 16;

/// Packets are padded to a multiple of this, as far as their path takes it.
pub const PADDING_BYTES: usize = 16;

/// Bytes of each of the two MACs that an initiation and a response end with.
pub const MAC_BYTES: usize = 16;

/// Noise's part of an initiation: ephemeral key, sealed static key, sealed timestamp.
pub(super) const INITIATION_NOISE_BYTES: usize = INITIATION_BYTES - 8 - 2 * MAC_BYTES;
/// Noise's part of a response: ephemeral key, sealed nothing.
pub(super) const RESPONSE_NOISE_BYTES: usize = RESPONSE_BYTES - 12 - 2 * MAC_BYTES;

/// A datagram as one of the four messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Begins a handshake.
    Initiation(Initiation<'a>),
    /// Answers an [`Initiation`].
    Response(Response<'a>),
    /// Asks a sender under load to prove its address.
    CookieReply(CookieReply<'a>),
    /// Carries a sealed packet.
    Data(Data),
}

impl<'a> Message<'a> {
    /// The message that a datagram is; `None` if it is none.
    pub fn parse(datagram: &'a [u8]) -> Option<Self> {
        let (&[kind, 0, 0, 0], _) = datagram.split_first_chunk()? else {
            return None;
        };
        match kind {
            INITIATION => Some(Self::Initiation(Initiation(datagram.try_into().ok()?))),
            RESPONSE => Some(Self::Response(Response(datagram.try_into().ok()?))),
            COOKIE_REPLY => Some(Self::CookieReply(CookieReply(datagram.try_into().ok()?))),
            DATA if datagram.len() >= DATA_BYTES_MIN => Data::read(datagram).map(Self::Data),
            _ => None,
        }
    }
}

/// The first message of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initiation<'a>(&'a [u8; INITIATION_BYTES]);

impl<'a> Initiation<'a> {
    /// An initiation without its MACs.
    pub(super) fn write(
        sender_index: u32,
        noise: &[u8; INITIATION_NOISE_BYTES],
    ) -> [u8; INITIATION_BYTES] {
        let mut message = [0; INITIATION_BYTES];
        message[0] = INITIATION;
        message[4..8].copy_from_slice(&sender_index.to_le_bytes());
        message[8..8 + INITIATION_NOISE_BYTES].copy_from_slice(noise);
        message
    }

    /// The index that the response is to name.
    pub fn sender_index(self) -> u32 {
        index_at(self.0, 4)
    }

    /// The whole message.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn noise(self) -> &'a [u8] {
        &self.0[8..8 + INITIATION_NOISE_BYTES]
    }
}

/// The second message of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response<'a>(&'a [u8; RESPONSE_BYTES]);

impl<'a> Response<'a> {
    /// A response without its MACs.
    pub(super) fn write(
        sender_index: u32,
        receiver_index: u32,
        noise: &[u8; RESPONSE_NOISE_BYTES],
    ) -> [u8; RESPONSE_BYTES] {
        let mut message = [0; RESPONSE_BYTES];
        message[0] = RESPONSE;
        message[4..8].copy_from_slice(&sender_index.to_le_bytes());
        message[8..12].copy_from_slice(&receiver_index.to_le_bytes());
        message[12..12 + RESPONSE_NOISE_BYTES].copy_from_slice(noise);
        message
    }

    /// The index that data messages to the responder are to name.
    pub fn sender_index(self) -> u32 {
        index_at(self.0, 4)
    }

    /// The initiator's index, from its initiation.
    pub fn receiver_index(self) -> u32 {
        index_at(self.0, 8)
    }

    /// The whole message.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn noise(self) -> &'a [u8] {
        &self.0[12..12 + RESPONSE_NOISE_BYTES]
    }
}

/// A message that ends with two MACs: an initiation or a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WithMacs<'a> {
    sender_index: u32,
    covered_by_mac1: &'a [u8],
    mac1: &'a [u8; MAC_BYTES],
    covered_by_mac2: &'a [u8],
    mac2: &'a [u8; MAC_BYTES],
}

impl<'a> WithMacs<'a> {
    fn new<const N: usize>(sender_index: u32, message: &'a [u8; N]) -> Self {
        const { assert!(N > 2 * MAC_BYTES, "no room for MACs") };
        let (covered_by_mac2, mac2) = split_mac(message);
        let (covered_by_mac1, mac1) = split_mac(covered_by_mac2);
        Self {
            sender_index,
            covered_by_mac1,
            mac1,
            covered_by_mac2,
            mac2,
        }
    }

    /// The index that an answer is to name.
    pub fn sender_index(self) -> u32 {
        self.sender_index
    }

    /// What mac1 is computed over: all bytes before it.
    pub(super) fn covered_by_mac1(self) -> &'a [u8] {
        self.covered_by_mac1
    }

    pub(super) fn mac1(self) -> &'a [u8; MAC_BYTES] {
        self.mac1
    }

    /// What mac2 is computed over: all bytes before it.
    pub(super) fn covered_by_mac2(self) -> &'a [u8] {
        self.covered_by_mac2
    }

    pub(super) fn mac2(self) -> &'a [u8; MAC_BYTES] {
        self.mac2
    }
}

impl<'a> From<Initiation<'a>> for WithMacs<'a> {
    fn from(message: Initiation<'a>) -> Self {
        Self::new(message.sender_index(), message.0)
    }
}

impl<'a> From<Response<'a>> for WithMacs<'a> {
    fn from(message: Response<'a>) -> Self {
        Self::new(message.sender_index(), message.0)
    }
}

/// What a responder under load answers instead of doing its part of the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CookieReply<'a>(&'a [u8; COOKIE_REPLY_BYTES]);

/// Bytes of a cookie reply's nonce.
pub(super) const COOKIE_NONCE_BYTES: usize = 24;
/// Bytes of a sealed cookie: a MAC, and the tag.
pub(super) const SEALED_COOKIE_BYTES: usize = MAC_BYTES + TAG_BYTES;

impl<'a> CookieReply<'a> {
    pub(super) fn write(
        receiver_index: u32,
        nonce: &[u8; COOKIE_NONCE_BYTES],
        sealed: &[u8; SEALED_COOKIE_BYTES],
    ) -> [u8; COOKIE_REPLY_BYTES] {
        let mut message = [0; COOKIE_REPLY_BYTES];
        message[0] = COOKIE_REPLY;
        message[4..8].copy_from_slice(&receiver_index.to_le_bytes());
        message[8..32].copy_from_slice(nonce);
        message[32..].copy_from_slice(sealed);
        message
    }

    /// The sender index of the message that it answers.
    pub fn receiver_index(self) -> u32 {
        index_at(self.0, 4)
    }

    pub(super) fn nonce(self) -> &'a [u8] {
        &self.0[8..32]
    }

    pub(super) fn sealed(self) -> &'a [u8] {
        &self.0[32..]
    }
}

/// The header of a data message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// The receiver's index of the session.
    pub receiver_index: u32,
    /// The packet's number in its session, and its nonce.
    pub counter: u64,
}

impl Data {
    /// Reads the header that a data message starts with; `None` if it does not.
    pub fn read(datagram: &[u8]) -> Option<Self> {
        let (header, _) = datagram.split_first_chunk::<DATA_HEADER_BYTES>()?;
        let [DATA, 0, 0, 0, a, b, c, d, counter @ ..] = *header else {
            return None;
        };
        Some(Self {
            receiver_index: u32::from_le_bytes([a, b, c, d]),
            counter: u64::from_le_bytes(counter),
        })
    }

    /// Writes the header.
    pub fn write(self, header: &mut [u8; DATA_HEADER_BYTES]) {
        header[..4].copy_from_slice(&[DATA, 0, 0, 0]);
        header[4..8].copy_from_slice(&self.receiver_index.to_le_bytes());
        header[8..].copy_from_slice(&self.counter.to_le_bytes());
    }
}

/// An index at a place that the layout has.
fn index_at<const N: usize>(message: &[u8; N], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&message[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// The MAC that a message of sufficient length ends with, and what is before it.
fn split_mac(message: &[u8]) -> (&[u8], &[u8; MAC_BYTES]) {
    const NONE: [u8; MAC_BYTES] = [0; MAC_BYTES];
    message.split_last_chunk().unwrap_or((message, &NONE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A message of a type, whose other bytes number themselves.
    fn numbered(kind: u8, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..length).map(|at| at as u8).collect();
        bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
        bytes
    }

    #[test]
    fn fields_are_where_the_paper_has_them() {
        let bytes = numbered(INITIATION, 148);
        let Some(Message::Initiation(initiation)) = Message::parse(&bytes) else {
            panic!("no initiation");
        };
        assert_eq!(initiation.sender_index(), 0x0706_0504);
        assert_eq!(initiation.noise(), &bytes[8..116]);
        let macs = WithMacs::from(initiation);
        assert_eq!(macs.sender_index(), 0x0706_0504);
        assert_eq!(macs.covered_by_mac1(), &bytes[..116]);
        assert_eq!(macs.mac1()[..], bytes[116..132]);
        assert_eq!(macs.covered_by_mac2(), &bytes[..132]);
        assert_eq!(macs.mac2()[..], bytes[132..]);

        let bytes = numbered(RESPONSE, 92);
        let Some(Message::Response(response)) = Message::parse(&bytes) else {
            panic!("no response");
        };
        assert_eq!(response.sender_index(), 0x0706_0504);
        assert_eq!(response.receiver_index(), 0x0b0a_0908);
        assert_eq!(response.noise(), &bytes[12..60]);
        assert_eq!(WithMacs::from(response).mac1()[..], bytes[60..76]);

        let bytes = numbered(COOKIE_REPLY, 64);
        let Some(Message::CookieReply(reply)) = Message::parse(&bytes) else {
            panic!("no cookie reply");
        };
        assert_eq!(reply.receiver_index(), 0x0706_0504);
        assert_eq!(reply.nonce(), &bytes[8..32]);
        assert_eq!(reply.sealed(), &bytes[32..]);

        let data = Data {
            receiver_index: 0x0706_0504,
            counter: 0x0f0e_0d0c_0b0a_0908,
        };
        assert_eq!(
            Message::parse(&numbered(DATA, 32)),
            Some(Message::Data(data))
        );
    }

    #[test]
    fn what_is_written_is_read_again() {
        let bytes = Initiation::write(7, &[1; INITIATION_NOISE_BYTES]);
        let Some(Message::Initiation(initiation)) = Message::parse(&bytes) else {
            panic!("no initiation");
        };
        assert_eq!(initiation.sender_index(), 7);
        assert_eq!(initiation.noise(), [1; INITIATION_NOISE_BYTES]);

        let bytes = Response::write(7, 8, &[1; RESPONSE_NOISE_BYTES]);
        let Some(Message::Response(response)) = Message::parse(&bytes) else {
            panic!("no response");
        };
        assert_eq!((response.sender_index(), response.receiver_index()), (7, 8));
        assert_eq!(response.noise(), [1; RESPONSE_NOISE_BYTES]);

        let bytes = CookieReply::write(7, &[1; COOKIE_NONCE_BYTES], &[2; SEALED_COOKIE_BYTES]);
        let Some(Message::CookieReply(reply)) = Message::parse(&bytes) else {
            panic!("no cookie reply");
        };
        assert_eq!(reply.receiver_index(), 7);
        assert_eq!(reply.nonce(), [1; COOKIE_NONCE_BYTES]);
        assert_eq!(reply.sealed(), [2; SEALED_COOKIE_BYTES]);
    }

    proptest! {
        #[test]
        fn a_message_has_the_length_of_its_type(
            kind in 0u8..8,
            reserved in prop_oneof![3 => Just([0; 3]), 1 => any::<[u8; 3]>()],
            length in prop_oneof![Just(148usize), Just(92), Just(64), Just(32), 0..200usize],
        ) {
            let mut bytes = vec![0xa5; length.max(4)];
            bytes[0] = kind;
            bytes[1..4].copy_from_slice(&reserved);
            bytes.truncate(length);
            let is_length_right = match kind {
                INITIATION => length == 148,
                RESPONSE => length == 92,
                COOKIE_REPLY => length == 64,
                DATA => length >= 32,
                _ => false,
            };
            let is_message = is_length_right && reserved == [0; 3];
            prop_assert_eq!(Message::parse(&bytes).is_some(), is_message);
        }

        #[test]
        fn a_data_header_is_read_as_it_was_written(receiver_index: u32, counter: u64) {
            let data = Data { receiver_index, counter };
            let mut header = [0xff; DATA_HEADER_BYTES];
            data.write(&mut header);
            prop_assert_eq!(Data::read(&header), Some(data));
            prop_assert_eq!(Data::read(&header[..15]), None);
        }
    }
}
