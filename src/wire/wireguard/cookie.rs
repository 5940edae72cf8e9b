//! The two MACs that initiations and responses end with, and cookie replies (paper,
//! sections 5.3, 5.4.4 and 5.4.7).
//!
//! mac1 shows that the sender knows the receiver's public key. It takes one hash to check,
//! so it is checked before anything else, and a scanner gets no answer. mac2 shows that the
//! sender receives at the address that it sends from: a receiver under load asks for it,
//! by a cookie reply, before it does the costly part of a handshake.
//!
//! All times are nanoseconds of one monotonic clock.

use std::net::{IpAddr, SocketAddr};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::keys::{KEY_BYTES, PublicKey, random_bytes};
use super::message::{
    COOKIE_REPLY_BYTES, CookieReply, MAC_BYTES, SEALED_COOKIE_BYTES, TAG_BYTES, WithMacs,
};

/// How long a cookie and the secret that it is made with are in use.
pub const COOKIE_NS: u64 = 120_000_000_000;

const LABEL_MAC1: &[u8; 8] = b"mac1----";
const LABEL_COOKIE: &[u8; 8] = b"cookie--";

type Mac = [u8; MAC_BYTES];

/// Fills in the MACs of what is sent to one peer.
pub struct MacWriter {
    keys: ReceiverKeys,
    /// The peer's latest cookie, and when it came.
    cookie: Option<(Zeroizing<Mac>, u64)>,
    /// The mac1 last sent: a cookie reply answers a certain message. Gone once it has been
    /// answered, so that the answer cannot be replayed.
    unanswered_mac1: Option<Mac>,
}

impl MacWriter {
    /// For the peer of this key.
    pub fn new(remote: &PublicKey) -> Self {
        Self {
            keys: ReceiverKeys::of(remote),
            cookie: None,
            unanswered_mac1: None,
        }
    }

    /// Fills in both MACs of an initiation or a response that is about to be sent. mac2
    /// stays zero as long as no cookie is known that is young enough.
    pub fn fill<const N: usize>(&mut self, message: &mut [u8; N], now_ns: u64) {
        const { assert!(N > 2 * MAC_BYTES, "no room for MACs") };
        let (covered, mac1) = message.split_at_mut(N - 2 * MAC_BYTES);
        let (mac1, _) = mac1.split_at_mut(MAC_BYTES);
        let computed = self.keys.mac1(covered);
        mac1.copy_from_slice(&computed);
        self.unanswered_mac1 = Some(computed);
        self.cookie
            .take_if(|(_, since_ns)| now_ns.saturating_sub(*since_ns) >= COOKIE_NS);
        let (covered, mac2) = message.split_at_mut(N - MAC_BYTES);
        match &self.cookie {
            Some((cookie, _)) => mac2.copy_from_slice(&mac(&**cookie, &[covered])),
            None => mac2.fill(0),
        }
    }

    /// Takes a cookie, for what is sent from now on. The caller has looked up by the
    /// reply's receiver index that it is this peer's.
    ///
    /// # Errors
    ///
    /// If the reply is not authentic, or does not answer what was last sent.
    pub fn receive(&mut self, reply: CookieReply<'_>, now_ns: u64) -> Result<(), InvalidCookie> {
        let mac1 = self.unanswered_mac1.ok_or(InvalidCookie)?;
        let cookie = self.keys.open(reply, &mac1).ok_or(InvalidCookie)?;
        self.unanswered_mac1 = None;
        self.cookie = Some((cookie, now_ns));
        Ok(())
    }
}

/// A cookie reply that is not authentic, or answers nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidCookie;

/// Checks the MACs of what this host receives, and makes its cookies.
pub struct MacChecker {
    keys: ReceiverKeys,
    /// What cookies are made with, and since when.
    secret: Option<(Zeroizing<[u8; KEY_BYTES]>, u64)>,
}

impl MacChecker {
    /// For the host of this key.
    pub fn new(local: &PublicKey) -> Self {
        Self {
            keys: ReceiverKeys::of(local),
            secret: None,
        }
    }

    /// Whether the message's sender knows this host's public key. What fails this is
    /// dropped without an answer.
    pub fn has_mac1<'a>(&self, message: impl Into<WithMacs<'a>>) -> bool {
        let message = message.into();
        let computed = self.keys.mac1(message.covered_by_mac1());
        computed.ct_eq(message.mac1()).into()
    }

    /// Whether the message has been made with the cookie of its source, address and port.
    pub fn has_mac2<'a>(
        &mut self,
        message: impl Into<WithMacs<'a>>,
        source: SocketAddr,
        now_ns: u64,
    ) -> bool {
        let message = message.into();
        let cookie = self.cookie(source, now_ns);
        let computed = mac(&*cookie, &[message.covered_by_mac2()]);
        computed.ct_eq(message.mac2()).into()
    }

    /// The cookie reply to a message that has mac1 and lacks mac2.
    ///
    /// # Panics
    ///
    /// If the kernel has no random bytes to give.
    pub fn reply<'a>(
        &mut self,
        message: impl Into<WithMacs<'a>>,
        source: SocketAddr,
        now_ns: u64,
    ) -> [u8; COOKIE_REPLY_BYTES] {
        let message = message.into();
        let cookie = self.cookie(source, now_ns);
        let nonce = random_bytes();
        let sealed = self.keys.seal(&cookie, &nonce, message.mac1());
        CookieReply::write(message.sender_index(), &nonce, &sealed)
    }

    fn cookie(&mut self, source: SocketAddr, now_ns: u64) -> Zeroizing<Mac> {
        self.secret
            .take_if(|(_, since_ns)| now_ns.saturating_sub(*since_ns) >= COOKIE_NS);
        let (secret, _) = self
            .secret
            .get_or_insert_with(|| (Zeroizing::new(random_bytes()), now_ns));
        let port = source.port().to_be_bytes();
        Zeroizing::new(match source.ip() {
            IpAddr::V4(ip) => mac(&**secret, &[&ip.octets(), &port]),
            IpAddr::V6(ip) => mac(&**secret, &[&ip.octets(), &port]),
        })
    }
}

/// What is derived from the public key of a message's receiver, once.
struct ReceiverKeys {
    /// Keyed already: half of a short MAC's cost.
    mac1: Blake2sMac<U16>,
    cookie: XChaCha20Poly1305,
}

impl ReceiverKeys {
    fn of(receiver: &PublicKey) -> Self {
        let derive = |label: &[u8; 8]| {
            let hash = Blake2s256::new().chain_update(label);
            hash.chain_update(receiver.as_bytes()).finalize()
        };
        Self {
            mac1: keyed(&derive(LABEL_MAC1)),
            cookie: XChaCha20Poly1305::new(&derive(LABEL_COOKIE)),
        }
    }

    fn mac1(&self, covered: &[u8]) -> Mac {
        let mut mac = self.mac1.clone();
        mac.update(covered);
        mac.finalize_fixed().into()
    }

    fn seal(&self, cookie: &Mac, nonce: &[u8; 24], mac1: &Mac) -> [u8; SEALED_COOKIE_BYTES] {
        let mut sealed = [0; SEALED_COOKIE_BYTES];
        let (text, tag) = sealed.split_at_mut(MAC_BYTES);
        text.copy_from_slice(cookie);
        let computed = self
            .cookie
            .encrypt_in_place_detached(XNonce::from_slice(nonce), mac1, text)
            .expect("16 bytes are not too many");
        tag.copy_from_slice(&computed);
        sealed
    }

    fn open(&self, reply: CookieReply<'_>, mac1: &Mac) -> Option<Zeroizing<Mac>> {
        let (text, tag) = reply.sealed().split_first_chunk::<MAC_BYTES>()?;
        let tag: &[u8; TAG_BYTES] = tag.try_into().ok()?;
        let mut cookie = Zeroizing::new(*text);
        self.cookie
            .decrypt_in_place_detached(
                XNonce::from_slice(reply.nonce()),
                mac1,
                &mut *cookie,
                tag.into(),
            )
            .ok()?;
        Some(cookie)
    }
}

/// BLAKE2s as a MAC of 16 bytes: by its own key parameter, not HMAC.
fn keyed(key: &[u8]) -> Blake2sMac<U16> {
    Blake2sMac::new_from_slice(key).expect("a key of 32 bytes at most")
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Mac {
    let mut mac = keyed(key);
    for part in parts {
        mac.update(part);
    }
    mac.finalize_fixed().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::wireguard::keys::PrivateKey;
    use crate::wire::wireguard::message::{INITIATION_BYTES, Initiation, Message, RESPONSE_BYTES};

    const SOURCE: &str = "192.0.2.1:51820";

    fn host() -> PublicKey {
        PrivateKey::generate().public()
    }

    fn source() -> SocketAddr {
        SOURCE.parse().unwrap()
    }

    /// An initiation with MACs, and something between.
    fn initiation(writer: &mut MacWriter, now_ns: u64) -> [u8; INITIATION_BYTES] {
        let mut message = Initiation::write(7, &random_bytes());
        writer.fill(&mut message, now_ns);
        message
    }

    fn read(message: &[u8]) -> WithMacs<'_> {
        match Message::parse(message) {
            Some(Message::Initiation(initiation)) => initiation.into(),
            Some(Message::Response(response)) => response.into(),
            other => panic!("{other:?} has no MACs"),
        }
    }

    fn read_reply(message: &[u8]) -> CookieReply<'_> {
        match Message::parse(message) {
            Some(Message::CookieReply(reply)) => reply,
            other => panic!("{other:?} is no cookie reply"),
        }
    }

    /// Both ends of one direction, the sender with a cookie that it got at 1 s.
    fn with_cookie() -> (MacWriter, MacChecker) {
        let host = host();
        let (mut writer, mut checker) = (MacWriter::new(&host), MacChecker::new(&host));
        let first = initiation(&mut writer, 0);
        assert_eq!(first[INITIATION_BYTES - MAC_BYTES..], [0; MAC_BYTES]);
        assert!(!checker.has_mac2(read(&first), source(), SECOND_NS));
        let reply = checker.reply(read(&first), source(), SECOND_NS);
        assert_eq!(read_reply(&reply).receiver_index(), 7);
        writer.receive(read_reply(&reply), SECOND_NS).unwrap();
        (writer, checker)
    }

    const SECOND_NS: u64 = 1_000_000_000;

    #[test]
    fn mac1_is_by_the_receivers_key() {
        let host = host();
        let mut writer = MacWriter::new(&host);
        let message = initiation(&mut writer, 0);
        assert!(MacChecker::new(&host).has_mac1(read(&message)));
        assert!(!MacChecker::new(&self::host()).has_mac1(read(&message)));
        let mut response = [0; RESPONSE_BYTES];
        response[0] = 2;
        assert!(!MacChecker::new(&host).has_mac1(read(&response)));
        writer.fill(&mut response, 0);
        assert!(MacChecker::new(&host).has_mac1(read(&response)));
    }

    #[test]
    fn a_cookie_is_good_at_its_address_and_port() {
        let (mut writer, mut checker) = with_cookie();
        let message = initiation(&mut writer, SECOND_NS);
        assert!(checker.has_mac1(read(&message)));
        assert!(checker.has_mac2(read(&message), source(), SECOND_NS));
        let others = [
            "192.0.2.1:51821",
            "192.0.2.2:51820",
            "[2001:db8::1]:51820",
            "[::ffff:192.0.2.1]:51820",
        ];
        for other in others {
            let other = other.parse().unwrap();
            assert!(!checker.has_mac2(read(&message), other, SECOND_NS));
        }
        // It is for one receiver.
        let mut stranger = MacChecker::new(&host());
        assert!(!stranger.has_mac2(read(&message), source(), SECOND_NS));
    }

    #[test]
    fn a_cookie_ends_at_both_ends() {
        let (mut writer, mut checker) = with_cookie();
        let last_ns = SECOND_NS + COOKIE_NS - 1;
        let message = initiation(&mut writer, last_ns);
        assert!(checker.has_mac2(read(&message), source(), last_ns));
        assert!(!checker.has_mac2(read(&message), source(), last_ns + 1));
        let message = initiation(&mut writer, last_ns + 1);
        assert_eq!(message[INITIATION_BYTES - MAC_BYTES..], [0; MAC_BYTES]);
    }

    #[test]
    fn a_cookie_reply_answers_the_last_message_once() {
        let host = host();
        let (mut writer, mut checker) = (MacWriter::new(&host), MacChecker::new(&host));
        let first = initiation(&mut writer, 0);
        let reply = checker.reply(read(&first), source(), 0);
        // Nothing was sent.
        let mut silent = MacWriter::new(&host);
        assert_eq!(silent.receive(read_reply(&reply), 0), Err(InvalidCookie));
        // Another message was sent meanwhile.
        let second = initiation(&mut writer, 0);
        assert_eq!(writer.receive(read_reply(&reply), 0), Err(InvalidCookie));
        let reply = checker.reply(read(&second), source(), 0);
        assert_eq!(writer.receive(read_reply(&reply), 0), Ok(()));
        assert_eq!(writer.receive(read_reply(&reply), 0), Err(InvalidCookie));
    }

    proptest! {
        #[test]
        fn a_message_with_a_bit_changed_has_no_mac1(
            at in 4usize..INITIATION_BYTES - MAC_BYTES,
            bit in 0u8..8,
        ) {
            let host = host();
            let mut message = initiation(&mut MacWriter::new(&host), 0);
            message[at] ^= 1 << bit;
            prop_assert!(!MacChecker::new(&host).has_mac1(read(&message)));
        }

        #[test]
        fn a_message_with_a_bit_changed_has_no_mac2(
            at in 4usize..INITIATION_BYTES,
            bit in 0u8..8,
        ) {
            let (mut writer, mut checker) = with_cookie();
            let mut message = initiation(&mut writer, SECOND_NS);
            message[at] ^= 1 << bit;
            prop_assert!(!checker.has_mac2(read(&message), source(), SECOND_NS));
        }

        /// And the right one is still taken afterwards.
        #[test]
        fn a_cookie_reply_with_a_bit_changed_is_refused(
            at in 8usize..COOKIE_REPLY_BYTES,
            bit in 0u8..8,
        ) {
            let host = host();
            let (mut writer, mut checker) = (MacWriter::new(&host), MacChecker::new(&host));
            let message = initiation(&mut writer, 0);
            let reply = checker.reply(read(&message), source(), 0);
            let mut damaged = reply;
            damaged[at] ^= 1 << bit;
            prop_assert_eq!(writer.receive(read_reply(&damaged), 0), Err(InvalidCookie));
            prop_assert_eq!(writer.receive(read_reply(&reply), 0), Ok(()));
        }
    }
}
