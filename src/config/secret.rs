//! Keys that follow from a secret which all hosts share: who has which identity, and what
//! becomes of peers that are named as in plain mode.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;

use super::keys::read_text;
use super::options::Config;
use super::peer::{PeerName, PeerSpec, identity_at};
use crate::error::{Error, Result};
use crate::wire::wireguard::keys::{PresharedKey, PublicKey};
use crate::wire::wireguard::secret::{SharedSecret, WeakSecret};

impl Config {
    /// Makes sure that what belongs to a shared secret is there with one only.
    ///
    /// # Errors
    /// Names the option, or the peer.
    pub(super) fn check_secret(&self) -> Result<()> {
        let given = self.peers.iter().find(|peer| peer.identity.is_some());
        if self.secret_file.is_none() {
            let what = match (&self.identity, given) {
                (Some(identity), _) => format!("identity {identity} needs secret-file"),
                (None, Some(peer)) => {
                    format!("the identity of peer {} needs secret-file", peer.name)
                }
                (None, None) => return Ok(()),
            };
            return Err(Error::new(what).hint("keys follow from a shared secret and identities"));
        }
        if self.private_key_file.is_some() || self.private_key.is_some() {
            let what = "secret-file contradicts private-key: it makes this host's key";
            return Err(Error::new(what).hint("leave one of them out"));
        }
        match self.peers.iter().find(|peer| peer.name.key().is_some()) {
            None => Ok(()),
            Some(peer) => {
                let what = format!(
                    "peer {} has a public key, which secret-file makes",
                    peer.name
                );
                Err(Error::new(what).hint("name the peer as in plain mode, by its address or name"))
            }
        }
    }

    /// Reads the shared secret, if there is one, and gives all peers their keys.
    ///
    /// # Errors
    /// When the file cannot be used, or when two hosts have one identity.
    pub(super) fn use_secret(&mut self) -> Result<()> {
        let Some(file) = &self.secret_file else {
            return Ok(());
        };
        if may_be_secret(file) {
            let what =
                "secret-file takes the path of a file with the secret, not the secret itself";
            return Err(Error::new(what).hint("there is no file of the name that was given"));
        }
        let text = read_text("secret-file", file)?;
        let secret = text.trim().parse::<SharedSecret>();
        self.secret = Some(secret.map_err(|why| {
            let what = format!("secret-file {} is too weak: {why}", file.display());
            Error::new(what).hint("`fastvpn gensecret` makes a good one")
        })?);
        let peers = std::mem::take(&mut self.peers);
        self.peers = peers.into_iter().map(|peer| self.complete(peer)).collect();
        let mut first = HashMap::new();
        for peer in &self.peers {
            if let Some(other) = first.insert(&peer.identity, peer) {
                let place = |peer: &PeerSpec| {
                    let place = peer.endpoint.as_ref().map(ToString::to_string);
                    place.unwrap_or_else(|| "without an endpoint".into())
                };
                let identity = peer.identity.as_deref().unwrap_or_default();
                let (one, other) = (place(other), place(peer));
                let what = format!("peers {one} and {other} have the same identity, {identity}");
                return Err(Error::new(what).hint("give one of them an `identity` of its own"));
            }
        }
        match self.identity.clone() {
            Some(identity) => self.set_identity(identity),
            None => Ok(()),
        }
    }

    /// Whether this host's key waits for its identity: that is the address by which peers
    /// are reached.
    pub(crate) fn needs_identity(&self) -> bool {
        self.secret.is_some() && self.own_identity.is_none()
    }

    /// This host is reached from `local`, so that is its identity.
    ///
    /// # Errors
    /// When it is a peer's.
    pub(crate) fn set_identity_address(&mut self, local: IpAddr) -> Result<()> {
        self.set_identity(identity_at(&local.to_string()))
    }

    /// Gives this host an identity, and the key that follows from it.
    ///
    /// # Errors
    /// When it is a peer's.
    pub(crate) fn set_identity(&mut self, identity: String) -> Result<()> {
        let Some(secret) = &self.secret else {
            return Ok(());
        };
        let own = Some(&identity);
        if self.peers.iter().any(|peer| peer.identity.as_ref() == own) {
            let what = format!("this host and a peer have the same identity, {identity}");
            return Err(Error::new(what).hint("give this host another with --identity"));
        }
        self.private_key = Some(secret.private_key(&identity));
        self.own_identity = Some(identity);
        Ok(())
    }

    /// A peer with the keys that follow from the shared secret, if there is one.
    pub(crate) fn complete(&self, mut spec: PeerSpec) -> PeerSpec {
        let Some(secret) = &self.secret else {
            return spec;
        };
        if let PeerName::Host(place) = &spec.name {
            let identity = spec.identity.take();
            let identity = identity.unwrap_or_else(|| identity_at(&place.host));
            spec.name = PeerName::Key(secret.private_key(&identity).public());
            spec.identity = Some(identity);
        }
        spec.preshared_key = secret.preshared_key();
        spec
    }

    /// What a peer is called that was named as in plain mode, or by its identity.
    pub(crate) fn complete_name(&self, name: PeerName) -> PeerName {
        self.complete(PeerSpec::new(name, None)).name
    }

    /// The key of the host with this identity, if keys follow from a secret.
    pub(crate) fn key_of(&self, identity: &str) -> Option<PublicKey> {
        let secret = self.secret.as_ref()?;
        Some(secret.private_key(identity).public())
    }

    /// What peers share with this host besides their keys, if it follows from a secret.
    pub(crate) fn shared_preshared_key(&self) -> Option<PresharedKey> {
        self.secret.as_ref().map(SharedSecret::preshared_key)
    }
}

/// Whether somebody may have taken the secret itself for its file's path: nothing is there,
/// and a secret could read like that, a bad one included.
fn may_be_secret(path: &Path) -> bool {
    let reads_like_one = match path.to_string_lossy().parse::<SharedSecret>() {
        Err(WeakSecret::Short) => false,
        // A dot, as in the names of most files.
        Err(WeakSecret::Alphabet) => !path.is_absolute(),
        _ => true,
    };
    reads_like_one && !path.exists()
}

#[cfg(test)]
#[path = "secret_tests.rs"]
mod tests;
