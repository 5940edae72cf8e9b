//! The handshake: Noise_IKpsk2 (paper, section 5.4.2 and 5.4.3; Noise revision 34), which
//! makes the keys of a session.
//!
//! The initiator sends its static key and a timestamp, both sealed; the responder answers,
//! and both have the keys. What makes an initiation fresh is the timestamp, which the
//! responder compares with the greatest that it has seen of that peer before it answers.
//!
//! The MACs of both messages are [`super::cookie`]'s.

use std::fmt;

use snow::HandshakeState;
use zeroize::{Zeroize, Zeroizing};

use super::keys::{KEY_BYTES, PresharedKey, PrivateKey, PublicKey};
use super::message::{
    INITIATION_BYTES, INITIATION_NOISE_BYTES, Initiation, RESPONSE_BYTES, RESPONSE_NOISE_BYTES,
    Response,
};
use super::noise::{self, State};
use super::timestamp::{TIMESTAMP_BYTES, Timestamp};

/// A handshake message that is not authentic or not for this host, or a key in it that is
/// a point of low order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidHandshake;

impl fmt::Display for InvalidHandshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a handshake message that is not authentic")
    }
}

impl std::error::Error for InvalidHandshake {}

impl From<snow::Error> for InvalidHandshake {
    fn from(_: snow::Error) -> Self {
        Self
    }
}

/// What a handshake is for: the keys of a session. They are wiped when dropped.
pub struct TransportKeys {
    /// Seals what this host sends.
    pub send: Zeroizing<[u8; KEY_BYTES]>,
    /// Opens what it receives.
    pub receive: Zeroizing<[u8; KEY_BYTES]>,
    /// What the peer calls the session: goes into what is sent to it.
    pub remote_index: u32,
}

impl fmt::Debug for TransportKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportKeys")
            .field("remote_index", &self.remote_index)
            .finish_non_exhaustive()
    }
}

/// A handshake that this host has begun.
pub struct Initiator {
    noise: State,
    sender_index: u32,
}

impl Initiator {
    /// Begins a handshake. `sender_index` is what this host will call the session, and
    /// `timestamp` is later than any that this peer was sent. Returns the initiation
    /// without its MACs, which [`MacWriter::fill`] fills in.
    ///
    /// # Errors
    ///
    /// If the peer's key is a point of low order, which is nobody's.
    ///
    /// [`MacWriter::fill`]: super::cookie::MacWriter::fill
    pub fn start(
        local: &PrivateKey,
        remote: &PublicKey,
        preshared_key: &PresharedKey,
        sender_index: u32,
        timestamp: Timestamp,
    ) -> Result<(Self, [u8; INITIATION_BYTES]), InvalidHandshake> {
        let mut noise = noise::builder()
            .prologue(noise::PROLOGUE)?
            .local_private_key(local.as_bytes())?
            .remote_public_key(remote.as_bytes())?
            .psk(noise::PSK_LOCATION, preshared_key.as_bytes())?
            .build_initiator()
            .map(State::from)?;
        let mut message = [0; INITIATION_NOISE_BYTES];
        noise.write_message(&timestamp.to_bytes(), &mut message)?;
        let initiator = Self {
            noise,
            sender_index,
        };
        Ok((initiator, Initiation::write(sender_index, &message)))
    }

    /// Ends the handshake with the peer's response. A forged response changes nothing: the
    /// handshake goes on waiting for the right one. After it no other is accepted.
    ///
    /// # Errors
    ///
    /// If the response is not the peer's to this initiation, or the preshared keys differ.
    pub fn finish(&mut self, response: Response<'_>) -> Result<TransportKeys, InvalidHandshake> {
        if response.receiver_index() != self.sender_index {
            return Err(InvalidHandshake);
        }
        self.noise.read_message(response.noise(), &mut [])?;
        Ok(keys(&mut self.noise, response.sender_index()))
    }
}

/// A handshake that a peer has begun: an initiation that has been read.
pub struct Incoming {
    noise: State,
    public_key: PublicKey,
    timestamp: Timestamp,
    remote_index: u32,
}

impl Incoming {
    /// Reads an initiation, whose mac1 the caller has checked: what follows takes three
    /// scalar multiplications.
    ///
    /// # Errors
    ///
    /// If the initiation is not authentic.
    pub fn read(local: &PrivateKey, initiation: Initiation<'_>) -> Result<Self, InvalidHandshake> {
        let mut noise = noise::builder()
            .prologue(noise::PROLOGUE)?
            .local_private_key(local.as_bytes())?
            .build_responder()
            .map(State::from)?;
        let mut timestamp = [0; TIMESTAMP_BYTES];
        noise.read_message(initiation.noise(), &mut timestamp)?;
        let public_key = noise.get_remote_static().ok_or(InvalidHandshake)?;
        let public_key = public_key.try_into().map_err(|_| InvalidHandshake)?;
        Ok(Self {
            noise,
            public_key: PublicKey(public_key),
            timestamp: Timestamp::from_bytes(timestamp),
            remote_index: initiation.sender_index(),
        })
    }

    /// Who has sent it. It has that key's private key, but the message may be replayed.
    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// When it was made. Only what is greater than all before from this peer is fresh.
    pub fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    /// Answers it. `sender_index` is what this host will call the session. Returns the
    /// response without its MACs, and the session's keys.
    ///
    /// # Errors
    ///
    /// If a key of the initiation is a point of low order.
    pub fn respond(
        mut self,
        preshared_key: &PresharedKey,
        sender_index: u32,
    ) -> Result<([u8; RESPONSE_BYTES], TransportKeys), InvalidHandshake> {
        self.noise
            .set_psk(noise::PSK_LOCATION.into(), preshared_key.as_bytes())?;
        let mut message = [0; RESPONSE_NOISE_BYTES];
        self.noise.write_message(&[], &mut message)?;
        let response = Response::write(sender_index, self.remote_index, &message);
        Ok((response, keys(&mut self.noise, self.remote_index)))
    }
}

/// The keys of a handshake that is complete. Noise's first key is the initiator's to send
/// with.
fn keys(noise: &mut HandshakeState, remote_index: u32) -> TransportKeys {
    let (mut first, mut second) = noise.dangerously_get_raw_split();
    let (send, receive) = match noise.is_initiator() {
        true => (&first, &second),
        false => (&second, &first),
    };
    let keys = TransportKeys {
        send: Zeroizing::new(*send),
        receive: Zeroizing::new(*receive),
        remote_index,
    };
    first.zeroize();
    second.zeroize();
    keys
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
