//! What `snow` is told of WireGuard: its Noise protocol, and X25519 and ChaCha20-Poly1305
//! that wipe their keys, which `snow`'s do not. Its X25519 also does not refuse points of
//! low order.
//!
//! What `snow` itself holds is wiped by [`State`]. Copies that it makes on the stack while
//! it computes are not.

use std::hint::black_box;
use std::ops::{Deref, DerefMut};
use std::sync::LazyLock;

use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use super::keys::{KEY_BYTES, PrivateKey};
use super::message::TAG_BYTES;

/// What both ends hash before anything else, so that they agree on the protocol.
pub(super) const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// Noise's place for the preshared key: at the end of the second message.
pub(super) const PSK_LOCATION: u8 = 2;

static PARAMS: LazyLock<NoiseParams> = LazyLock::new(|| {
    let name = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
    name.parse().expect("a name that Noise knows")
});

/// A protocol whose initial state needs no key.
static BLANK_PARAMS: LazyLock<NoiseParams> = LazyLock::new(|| {
    let name = "Noise_NN_25519_ChaChaPoly_BLAKE2s";
    name.parse().expect("a name that Noise knows")
});

/// A handshake, in a place of its own that is overwritten in the end.
pub(super) struct State(Box<HandshakeState>);

impl From<HandshakeState> for State {
    fn from(state: HandshakeState) -> Self {
        Self(Box::new(state))
    }
}

impl State {
    /// Overwrites chaining key, hash and preshared key by those of a handshake that has
    /// none.
    fn wipe(&mut self) {
        let blank = Builder::with_resolver(BLANK_PARAMS.clone(), Box::new(Resolver));
        if let Ok(blank) = blank.build_responder() {
            *self.0 = blank;
            // Or the compiler may leave out what nobody reads.
            black_box(&*self.0);
        }
    }
}

impl Deref for State {
    type Target = HandshakeState;

    fn deref(&self) -> &HandshakeState {
        &self.0
    }
}

impl DerefMut for State {
    fn deref_mut(&mut self) -> &mut HandshakeState {
        &mut self.0
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.wipe();
    }
}

/// A handshake's builder, which still lacks prologue and keys.
pub(super) fn builder<'a>() -> Builder<'a> {
    Builder::with_resolver(PARAMS.clone(), Box::new(Resolver))
}

struct Resolver;

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        DefaultResolver.resolve_rng()
    }

    fn resolve_dh(&self, _: &DHChoice) -> Option<Box<dyn Dh>> {
        Some(Box::new(X25519(None)))
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, _: &CipherChoice) -> Option<Box<dyn Cipher>> {
        Some(Box::new(ChaChaPoly(Zeroizing::default())))
    }
}

/// Noise's ChaChaPoly (revision 34, section 12.3), with its key.
struct ChaChaPoly(Zeroizing<[u8; KEY_BYTES]>);

impl ChaChaPoly {
    fn cipher(&self) -> ChaCha20Poly1305 {
        ChaCha20Poly1305::new((&*self.0).into())
    }

    fn nonce(counter: u64) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&counter.to_le_bytes());
        nonce
    }
}

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; KEY_BYTES]) {
        *self.0 = *key;
    }

    /// `snow` gives room for the text and the tag.
    fn encrypt(&self, counter: u64, data: &[u8], text: &[u8], out: &mut [u8]) -> usize {
        let (sealed, tag) = out.split_at_mut(text.len());
        sealed.copy_from_slice(text);
        let computed = self
            .cipher()
            .encrypt_in_place_detached(&Self::nonce(counter).into(), data, sealed)
            .expect("a handshake's texts are short");
        tag[..TAG_BYTES].copy_from_slice(&computed);
        text.len() + TAG_BYTES
    }

    fn decrypt(
        &self,
        counter: u64,
        data: &[u8],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<usize, snow::Error> {
        let (text, tag) = sealed
            .split_last_chunk::<TAG_BYTES>()
            .ok_or(snow::Error::Decrypt)?;
        let out = out.get_mut(..text.len()).ok_or(snow::Error::Decrypt)?;
        out.copy_from_slice(text);
        self.cipher()
            .decrypt_in_place_detached(&Self::nonce(counter).into(), data, out, tag.into())
            .map_err(|_| snow::Error::Decrypt)?;
        Ok(text.len())
    }
}

/// A key pair, once there is one.
struct X25519(Option<PrivateKey>);

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        KEY_BYTES
    }

    fn priv_len(&self) -> usize {
        KEY_BYTES
    }

    fn set(&mut self, private: &[u8]) {
        self.0 = private.try_into().ok().map(PrivateKey::from_bytes);
    }

    fn generate(&mut self, random: &mut dyn Random) -> Result<(), snow::Error> {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        random.try_fill_bytes(&mut *bytes)?;
        self.0 = Some(PrivateKey::from_bytes(&bytes));
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        self.0
            .as_ref()
            .map_or(&[0; KEY_BYTES], |key| key.public.as_bytes())
    }

    fn privkey(&self) -> &[u8] {
        self.0
            .as_ref()
            .map_or(&[0; KEY_BYTES], |key| key.as_bytes())
    }

    fn dh(&self, public: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        let key = self.0.as_ref().ok_or(snow::Error::Dh)?;
        let public = public.first_chunk().ok_or(snow::Error::Dh)?;
        let out = out.first_chunk_mut().ok_or(snow::Error::Dh)?;
        *out = *key.agree(public).map_err(|_| snow::Error::Dh)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wiped_is_as_good_as_new() {
        let key = PrivateKey::generate();
        let state = || {
            let builder = builder().prologue(PROLOGUE).unwrap();
            let builder = builder.local_private_key(key.as_bytes()).unwrap();
            State::from(builder.build_responder().unwrap())
        };
        let (mut one, two) = (state(), state());
        assert_eq!(one.get_handshake_hash(), two.get_handshake_hash());
        one.wipe();
        assert_ne!(one.get_handshake_hash(), two.get_handshake_hash());
        assert!(one.dangerously_get_raw_split() != state().dangerously_get_raw_split());
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(byte).collect()
    }

    /// The vector of this protocol in the suite that comes from cacophony, by which Noise's
    /// implementations are held against each other. `snow` is tested with all of them, but
    /// not with this X25519.
    #[test]
    fn handshake_is_that_of_noise_vector() {
        let preshared = "54686973206973206d7920417573747269616e20706572737065637469766521";
        let preshared = bytes(preshared).try_into().unwrap();
        let prologue = bytes("4a6f686e2047616c74");
        let static_key = bytes("e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1");
        let ephemeral = bytes("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a");
        let remote = bytes("31e0303fd6418d2f8c0e78b91f22e8caed0fbe48656dcf4767e4834f701b8f62");
        let mut initiator = builder()
            .prologue(&prologue)
            .and_then(|builder| builder.local_private_key(&static_key))
            .and_then(|builder| builder.remote_public_key(&remote))
            .and_then(|builder| builder.psk(PSK_LOCATION, &preshared))
            .and_then(|builder| {
                builder
                    .fixed_ephemeral_key_for_testing_only(&ephemeral)
                    .build_initiator()
            })
            .unwrap();
        let static_key = bytes("4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893");
        let ephemeral = bytes("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b");
        let mut responder = builder()
            .prologue(&prologue)
            .and_then(|builder| builder.local_private_key(&static_key))
            .and_then(|builder| {
                builder
                    .fixed_ephemeral_key_for_testing_only(&ephemeral)
                    .build_responder()
            })
            .unwrap();

        let first = bytes(concat!(
            "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944",
            "001e21de9f98ddd8e2ad57527207feb56253c9c94a9e496782ecfcb2a75fbcaf",
            "1b52948cc48daefe660c62119ab5000980c84831215f2441eba616548e832985",
            "464cf17e51ee93109008399a21f7e13f",
        ));
        let second = bytes(concat!(
            "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843",
            "cb765f2caef0751b8f007572dab0322217755c0632f365717edbf34d33e87a",
        ));
        let (mut sent, mut received) = ([0; 200], [0; 200]);
        let length = initiator.write_message(b"Ludwig von Mises", &mut sent);
        assert_eq!(sent[..length.unwrap()], first);
        let length = responder.read_message(&first, &mut received);
        assert_eq!(&received[..length.unwrap()], b"Ludwig von Mises");
        // As WireGuard does it: the key is known once the initiator is.
        responder.set_psk(PSK_LOCATION.into(), &preshared).unwrap();
        let length = responder.write_message(b"Murray Rothbard", &mut sent);
        assert_eq!(sent[..length.unwrap()], second);
        let length = initiator.read_message(&second, &mut received);
        assert_eq!(&received[..length.unwrap()], b"Murray Rothbard");
        let hash = bytes("f5191b875290abcd41347ac3622d9679688a7e980229cb937ef748336cfde0e5");
        assert_eq!(initiator.get_handshake_hash(), hash);
        assert_eq!(responder.get_handshake_hash(), hash);
    }
}
