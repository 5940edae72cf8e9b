//! What `snow` is told of WireGuard: its Noise protocol, and X25519 of our own.
//!
//! X25519 is our own because `snow`'s neither wipes private keys nor refuses points of low
//! order. `snow` does not wipe its chaining key either.

use std::sync::LazyLock;

use snow::Builder;
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use zeroize::Zeroizing;

use super::keys::{KEY_BYTES, PrivateKey};

/// What both ends hash before anything else, so that they agree on the protocol.
pub(super) const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// Noise's place for the preshared key: at the end of the second message.
pub(super) const PSK_LOCATION: u8 = 2;

static PARAMS: LazyLock<NoiseParams> = LazyLock::new(|| {
    let name = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
    name.parse().expect("a name that Noise knows")
});

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

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
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
