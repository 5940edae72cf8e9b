//! Keys, as `wg(8)` writes them: 32 bytes in base64.
//!
//! Secret keys are wiped when they are dropped, compared in constant time, and never shown:
//! their `Debug` hides them and they have no `Display`.

use std::fmt;
use std::str::FromStr;

use base64::prelude::{BASE64_STANDARD, Engine};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use subtle::ConstantTimeEq;
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize, Zeroizing};

/// Bytes of every key.
pub const KEY_BYTES: usize = 32;

/// What a key looks like, for those who wrote something else.
pub(crate) const KEY_FORM: &str = "44 characters of base64";

/// Characters of a key as text.
const TEXT_CHARS: usize = 44;

/// A text that is no key. It does not repeat the text, which may be a secret mistyped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidKey;

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "not a key: {KEY_FORM} were expected, as `wg genkey` prints them"
        )
    }
}

impl std::error::Error for InvalidKey {}

/// A peer's static Curve25519 key, by which it is known.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; KEY_BYTES]);

impl PublicKey {
    /// The key's bytes, as they go on the wire.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_text(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        from_text(text).map(|bytes| Self(*bytes))
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl de::Visitor<'_> for Text {
            type Value = PublicKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a public key of {KEY_FORM}")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PublicKey, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// This host's static Curve25519 key, clamped as `wg genkey` does it (RFC 7748, section 5).
#[derive(Clone)]
pub struct PrivateKey {
    secret: StaticSecret,
    /// What `public` answers: it takes a scalar multiplication to compute.
    pub(super) public: PublicKey,
}

impl PrivateKey {
    /// A new key.
    ///
    /// # Panics
    ///
    /// If the kernel has no random bytes to give.
    pub fn generate() -> Self {
        Self::from_bytes(&Zeroizing::new(random_bytes()))
    }

    /// The key of these bytes, clamped. Any 32 bytes are a key.
    pub fn from_bytes(bytes: &[u8; KEY_BYTES]) -> Self {
        let mut clamped = *bytes;
        clamped[0] &= 0b1111_1000;
        clamped[31] = clamped[31] & 0b0111_1111 | 0b0100_0000;
        let secret = StaticSecret::from(clamped);
        clamped.zeroize();
        let public = PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes());
        Self { secret, public }
    }

    /// The key that peers know this host by.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// The key's bytes. Whoever copies them wipes the copy.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        self.secret.as_bytes()
    }

    /// The key as text.
    pub fn to_base64(&self) -> Zeroizing<String> {
        to_text(self.as_bytes())
    }

    /// The secret that this key and another's public key make (X25519, RFC 7748).
    ///
    /// # Errors
    ///
    /// If the other is a point of low order: the secret would be all zeros then, whatever
    /// this key is. (The paper leaves the check open; the kernel has it.)
    pub(super) fn agree(
        &self,
        public: &[u8; KEY_BYTES],
    ) -> Result<Zeroizing<[u8; KEY_BYTES]>, InvalidKey> {
        let shared = self.secret.diffie_hellman(&(*public).into());
        match shared.was_contributory() {
            true => Ok(Zeroizing::new(shared.to_bytes())),
            false => Err(InvalidKey),
        }
    }
}

impl FromStr for PrivateKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        from_text(text).map(|bytes| Self::from_bytes(&bytes))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(hidden)")
    }
}

impl PartialEq for PrivateKey {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes().ct_eq(other.as_bytes()).into()
    }
}

impl Eq for PrivateKey {}

/// A secret that two peers share besides their keys, against those who record today and
/// have a quantum computer some day. All zeros, the default, stand for none.
#[derive(Clone, Default)]
pub struct PresharedKey(Zeroizing<[u8; KEY_BYTES]>);

impl PresharedKey {
    /// A new key.
    ///
    /// # Panics
    ///
    /// If the kernel has no random bytes to give.
    pub fn generate() -> Self {
        Self(Zeroizing::new(random_bytes()))
    }

    /// The key of these bytes, as they are.
    pub fn from_bytes(bytes: &[u8; KEY_BYTES]) -> Self {
        Self(Zeroizing::new(*bytes))
    }

    /// Whether it is one, and not the zeros that stand for none.
    pub fn is_set(&self) -> bool {
        *self != Self::default()
    }

    /// The key's bytes. Whoever copies them wipes the copy.
    pub fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The key as text.
    pub fn to_base64(&self) -> Zeroizing<String> {
        to_text(&self.0)
    }
}

impl FromStr for PresharedKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        from_text(text).map(Self)
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(hidden)")
    }
}

impl PartialEq for PresharedKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for PresharedKey {}

/// Random bytes, for keys and nonces.
///
/// # Panics
///
/// If the kernel has none to give, which is so only where `getrandom(2)` is missing or
/// forbidden: nothing here is safe then.
pub(super) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// Base64, without a copy of the secret that is not wiped.
fn to_text(bytes: &[u8; KEY_BYTES]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(TEXT_CHARS));
    BASE64_STANDARD.encode_string(bytes, &mut text);
    text
}

/// The bytes of a key's canonical text.
fn from_text(text: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, InvalidKey> {
    // The decoder wants room for whole groups of three bytes.
    let mut bytes = Zeroizing::new([0; KEY_BYTES + 1]);
    if text.len() != TEXT_CHARS {
        return Err(InvalidKey);
    }
    let length = BASE64_STANDARD
        .decode_slice(text, &mut *bytes)
        .map_err(|_| InvalidKey)?;
    match bytes.split_first_chunk() {
        Some((key, _)) if length == KEY_BYTES => Ok(Zeroizing::new(*key)),
        _ => Err(InvalidKey),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What `wg pubkey` makes of a key.
    const WG_PRIVATE: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
    const WG_PUBLIC: &str = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";
    /// The same, of 32 zeros.
    const WG_PUBLIC_OF_ZEROS: &str = "L+V9o0fNYkMVKNqsX7spBzD/9oSvxM/C7ZCZX1jLO3Q=";

    /// Points of low order, and others that are the same modulo 2^255 - 19
    /// (<https://cr.yp.to/ecdh.html#validate>).
    const LOW_ORDER: [&str; 7] = [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ];

    fn bytes(hex: &str) -> [u8; KEY_BYTES] {
        let byte = |at: usize| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap();
        std::array::from_fn(byte)
    }

    #[test]
    fn a_secret_is_agreed_on_as_in_rfc_7748() {
        // Section 5.2, the first example.
        let key = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4";
        let public = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c";
        let secret = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552";
        let key = PrivateKey::from_bytes(&bytes(key));
        assert_eq!(*key.agree(&bytes(public)).unwrap(), bytes(secret));
    }

    #[test]
    fn no_secret_is_agreed_on_with_a_point_of_low_order() {
        let key = PrivateKey::generate();
        for point in LOW_ORDER {
            assert_eq!(key.agree(&bytes(point)), Err(InvalidKey), "{point}");
        }
    }

    #[test]
    fn a_public_key_is_the_one_that_wg_prints() {
        let key: PrivateKey = WG_PRIVATE.parse().unwrap();
        assert_eq!(key.public().to_string(), WG_PUBLIC);
        let zeros = PrivateKey::from_bytes(&[0; KEY_BYTES]);
        assert_eq!(zeros.public().to_string(), WG_PUBLIC_OF_ZEROS);
    }

    #[test]
    fn new_keys_are_whole_clamped_and_never_the_same() {
        let key = PrivateKey::generate();
        assert_eq!(key.as_bytes()[0] & 7, 0);
        assert_eq!(key.as_bytes()[31] & 0xc0, 0x40);
        assert_eq!(key.to_base64().parse(), Ok(key.clone()));
        assert_ne!(key, PrivateKey::generate());
        let preshared = PresharedKey::generate();
        assert!(preshared.is_set());
        assert_ne!(preshared, PresharedKey::generate());
    }

    #[test]
    fn zeros_are_no_preshared_key() {
        assert!(!PresharedKey::default().is_set());
        assert!(!PresharedKey::from_bytes(&[0; KEY_BYTES]).is_set());
        let mut one = [0; KEY_BYTES];
        one[31] = 1;
        assert!(PresharedKey::from_bytes(&one).is_set());
    }

    #[test]
    fn secrets_are_not_shown() {
        let private: PrivateKey = WG_PRIVATE.parse().unwrap();
        assert_eq!(format!("{private:?}"), "PrivateKey(hidden)");
        let preshared: PresharedKey = WG_PRIVATE.parse().unwrap();
        assert_eq!(format!("{preshared:?}"), "PresharedKey(hidden)");
        let mistyped = WG_PRIVATE.replace('+', "-").parse::<PrivateKey>();
        assert!(!mistyped.unwrap_err().to_string().contains("yAnz5"));
    }

    #[test]
    fn only_the_canonical_text_is_a_key() {
        let others = [
            "",
            // Not padded; padded twice; a character more; one less.
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw",
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8yk==",
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykwA",
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8yk=",
            // Bits behind the last byte.
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykx=",
            // The alphabet of URLs; white space; an umlaut.
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLi_eJ1PKf8ykw=",
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLi eJ1PKf8ykw=",
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLi\u{e4}1PKf8ykw=",
        ];
        for text in others {
            assert_eq!(text.parse::<PublicKey>(), Err(InvalidKey), "{text}");
        }
    }

    #[test]
    fn a_public_key_is_text_in_json() {
        let key: PublicKey = WG_PUBLIC.parse().unwrap();
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(json, format!("\"{WG_PUBLIC}\""));
        assert_eq!(serde_json::from_str::<PublicKey>(&json).unwrap(), key);
        assert!(serde_json::from_str::<PublicKey>("\"no key\"").is_err());
    }

    proptest! {
        #[test]
        fn keys_come_back_from_their_text(bytes: [u8; KEY_BYTES]) {
            let public = PublicKey(bytes);
            prop_assert_eq!(public.to_string().parse(), Ok(public));
            let preshared = PresharedKey::from_bytes(&bytes);
            prop_assert!(preshared.to_base64().parse() == Ok(preshared));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[A-Za-z0-9+/]{43}=|.{0,50}") {
            if let Ok(key) = text.parse::<PublicKey>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }
}
