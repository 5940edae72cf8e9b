//! What a host makes of strangers' datagrams, for fuzzing.

use std::net::{Ipv4Addr, SocketAddr};

use super::cookie::{MacChecker, MacWriter};
use super::handshake::{Incoming, Initiator};
use super::keys::{PresharedKey, PrivateKey};
use super::message::{
    DATA_HEADER_BYTES, INITIATION_BYTES, Initiation, MAC_BYTES, Message, RESPONSE_BYTES, Response,
};
use super::timestamp::Timestamp;

const INDEX: u32 = 7;
const SOURCE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 51820);

/// A host that has begun a handshake, and that anybody may know the public key of.
pub struct Host {
    key: PrivateKey,
    checker: MacChecker,
    /// Makes MACs that this host accepts.
    writer: MacWriter,
    /// Its handshake with itself, and the initiation and response of that.
    initiator: Initiator,
    initiation: [u8; INITIATION_BYTES],
    response: [u8; RESPONSE_BYTES],
}

impl Host {
    /// A host with keys of its own.
    ///
    /// # Panics
    ///
    /// If it cannot answer itself.
    pub fn new() -> Self {
        let key = PrivateKey::generate();
        let none = PresharedKey::default();
        let time = Timestamp::from_bytes([1; 12]);
        let public = key.public();
        let (initiator, mut initiation) =
            Initiator::start(&key, &public, &none, INDEX, time).expect("a new key");
        let mut writer = MacWriter::new(&public);
        writer.fill(&mut initiation, 0);
        let Some(Message::Initiation(message)) = Message::parse(&initiation) else {
            panic!("not an initiation");
        };
        let incoming = Incoming::read(&key, message).expect("authentic");
        let (response, _) = incoming.respond(&none, INDEX).expect("authentic");
        Self {
            checker: MacChecker::new(&public),
            key,
            writer,
            initiator,
            initiation,
            response,
        }
    }

    /// Takes a stranger's datagram, as it is and with a mac1 that is right. Returns whether
    /// it has the form of a message.
    ///
    /// # Panics
    ///
    /// If any of it is taken for authentic.
    pub fn receive(&mut self, datagram: &[u8]) -> bool {
        match Message::parse(datagram) {
            Some(Message::Initiation(initiation)) => {
                assert!(!self.checker.has_mac1(initiation));
                assert!(!self.checker.has_mac2(initiation, SOURCE, 0));
                let reply = self.checker.reply(initiation, SOURCE, 0);
                assert_eq!(reply[4..8], datagram[4..8]);
                assert!(!self.accepts_initiation(initiation));
            }
            Some(Message::Response(response)) => {
                assert!(!self.checker.has_mac1(response));
                assert!(!self.accepts_response(response));
            }
            Some(Message::CookieReply(reply)) => {
                assert!(self.writer.receive(reply, 0).is_err());
            }
            Some(Message::Data(data)) => {
                let mut header = [0; DATA_HEADER_BYTES];
                data.write(&mut header);
                assert_eq!(header, datagram[..DATA_HEADER_BYTES]);
            }
            None => return false,
        }
        true
    }

    /// Takes an initiation and a response that are authentic but for what the mask changes.
    ///
    /// # Panics
    ///
    /// If a change is not noticed.
    pub fn receive_damaged(&mut self, mask: &[u8]) {
        let mut damaged = self.initiation;
        apply(mask, &mut damaged[4..INITIATION_BYTES - 2 * MAC_BYTES]);
        let is_intact = damaged[8..] == self.initiation[8..];
        if let Some(Message::Initiation(initiation)) = Message::parse(&damaged) {
            let is_same = damaged == self.initiation;
            assert_eq!(self.checker.has_mac1(initiation), is_same);
            assert_eq!(self.accepts_initiation(initiation), is_intact);
        }
        let mut damaged = self.response;
        apply(mask, &mut damaged[8..RESPONSE_BYTES - 2 * MAC_BYTES]);
        // The right one would end the handshake.
        if damaged != self.response
            && let Some(Message::Response(response)) = Message::parse(&damaged)
        {
            assert!(!self.accepts_response(response));
        }
    }

    /// With a mac1 that is right.
    fn accepts_initiation(&self, initiation: Initiation<'_>) -> bool {
        let mut bytes = [0; INITIATION_BYTES];
        bytes.copy_from_slice(initiation.bytes());
        MacWriter::new(&self.key.public()).fill(&mut bytes, 0);
        let Some(Message::Initiation(initiation)) = Message::parse(&bytes) else {
            return false;
        };
        assert!(self.checker.has_mac1(initiation));
        Incoming::read(&self.key, initiation).is_ok()
    }

    /// As it is, and with the index of the handshake.
    fn accepts_response(&mut self, response: Response<'_>) -> bool {
        let mut bytes = [0; RESPONSE_BYTES];
        bytes.copy_from_slice(response.bytes());
        bytes[8..12].copy_from_slice(&INDEX.to_le_bytes());
        let renamed = match Message::parse(&bytes) {
            // Only what the mask left alone would be right now.
            Some(Message::Response(renamed)) if bytes[12..60] != self.response[12..60] => renamed,
            _ => response,
        };
        self.initiator.finish(response).is_ok() || self.initiator.finish(renamed).is_ok()
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

fn apply(mask: &[u8], bytes: &mut [u8]) {
    for (byte, mask) in bytes.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}
