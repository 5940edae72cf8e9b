//! Keys from one secret that all hosts of a network share.
//!
//! ```text
//! PRK           = HKDF-Extract(salt = "fastvpn shared secret 1", the secret's characters)
//! private key   = HKDF-Expand(PRK, "static key" 0x00 identity, 32), clamped
//! preshared key = HKDF-Expand(PRK, "preshared key", 32)
//! ```
//!
//! HKDF is that of RFC 5869, with SHA-256. Whoever has the secret can compute the keys of every
//! host, and so pose as any of them. There is no stretching: a secret that can be guessed is
//! found by trying, so [`SharedSecret`] takes random ones only.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use ring::hkdf::{HKDF_SHA256, Prk, Salt};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::keys::{KEY_BYTES, PresharedKey, PrivateKey};

/// Fewest characters of a secret: 128 bits in hexadecimal.
pub const SECRET_CHARS_MIN: usize = 32;

/// Most characters of a secret.
pub const SECRET_CHARS_MAX: usize = 1024;

const SALT: &[u8] = b"fastvpn shared secret 1";
const STATIC_KEY: &[u8] = b"static key\0";
const PRESHARED_KEY: &[u8] = b"preshared key";

/// Why a text is no secret to derive keys from. It does not repeat the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeakSecret {
    /// It has too few characters.
    Short,
    /// It has too many characters.
    Long,
    /// It has other characters than base64 and hexadecimal digits.
    Alphabet,
    /// It is no random text, as far as can be told.
    Guessable,
}

impl fmt::Display for WeakSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short => write!(f, "fewer than {SECRET_CHARS_MIN} characters"),
            Self::Long => write!(f, "more than {SECRET_CHARS_MAX} characters"),
            Self::Alphabet => f.write_str("other characters than those of base64 or hexadecimal"),
            Self::Guessable => f.write_str("it looks guessable, not like random characters"),
        }
    }
}

/// The secret that all hosts share.
#[derive(Clone)]
pub struct SharedSecret(Zeroizing<String>);

impl SharedSecret {
    /// A new one of 256 bits, as text.
    ///
    /// # Panics
    ///
    /// If the kernel has no random bytes to give.
    pub fn generate() -> Zeroizing<String> {
        loop {
            let text = PresharedKey::generate().to_base64();
            // One in millions looks as if it were not random.
            if text.parse::<Self>().is_ok() {
                return text;
            }
        }
    }

    /// The static key of the host with this identity.
    pub fn private_key(&self, identity: &str) -> PrivateKey {
        PrivateKey::from_bytes(&self.expand(&[STATIC_KEY, identity.as_bytes()]))
    }

    /// What all hosts have besides their static keys.
    pub fn preshared_key(&self) -> PresharedKey {
        PresharedKey::from_bytes(&self.expand(&[PRESHARED_KEY]))
    }

    fn expand(&self, info: &[&[u8]]) -> Zeroizing<[u8; KEY_BYTES]> {
        let prk: Prk = Salt::new(HKDF_SHA256, SALT).extract(self.0.as_bytes());
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let filled = prk
            .expand(info, HKDF_SHA256)
            .and_then(|okm| okm.fill(&mut *key));
        // It refuses other lengths than it was told of, and more than 255 hashes.
        filled.expect("the key is as long as one hash");
        key
    }
}

impl FromStr for SharedSecret {
    type Err = WeakSecret;

    fn from_str(text: &str) -> Result<Self, WeakSecret> {
        let digits = text.trim_end_matches('=').as_bytes();
        let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/-_".contains(byte);
        if digits.len() < SECRET_CHARS_MIN {
            Err(WeakSecret::Short)
        } else if text.len() > SECRET_CHARS_MAX {
            Err(WeakSecret::Long)
        } else if !digits.iter().all(is_digit) {
            Err(WeakSecret::Alphabet)
        } else if is_guessable(digits) {
            Err(WeakSecret::Guessable)
        } else {
            Ok(Self(Zeroizing::new(text.to_string())))
        }
    }
}

/// Whether digits do not look random. The bounds are such that random ones pass but for one
/// in a million or fewer. It is to catch words, patterns and placeholders, and proves nothing.
fn is_guessable(digits: &[u8]) -> bool {
    let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
    let has_cases =
        digits.iter().any(u8::is_ascii_lowercase) && digits.iter().any(u8::is_ascii_uppercase);
    let different = digits.iter().collect::<HashSet<_>>().len();
    let (pairs, half) = (digits.windows(2), digits.len() / 2);
    // As in "aaaa", "abcd" and "4321".
    let steps = pairs.filter(|pair| pair[0].abs_diff(pair[1]) <= 1).count();
    let is_repeated = (1..=half).any(|period| digits[period..] == digits[..digits.len() - period]);
    different < if is_hex { 7 } else { 14 } || !is_hex && !has_cases || steps > half || is_repeated
}

impl fmt::Debug for SharedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedSecret(hidden)")
    }
}

impl PartialEq for SharedSecret {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl Eq for SharedSecret {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ring::hmac;

    use super::*;

    const TEXT: &str = "4zLhOB5XhQq2vF0v6sHc1Jj0CwqyTnyGgq9nYzB9Fbo=";

    /// RFC 5869 by hand: one block is enough for a key.
    fn hkdf(secret: &str, info: &[u8]) -> [u8; 32] {
        let mac = |key: &[u8], text: &[u8]| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, key);
            hmac::sign(&key, text)
        };
        let prk = mac(b"fastvpn shared secret 1", secret.as_bytes());
        let okm = mac(prk.as_ref(), &[info, &[1]].concat());
        okm.as_ref().try_into().unwrap()
    }

    #[test]
    fn keys_are_those_of_the_documented_derivation() {
        let secret: SharedSecret = TEXT.parse().unwrap();
        let of_host = hkdf(TEXT, b"static key\x0010.211.55.123");
        let private = secret.private_key("10.211.55.123");
        assert_eq!(private, PrivateKey::from_bytes(&of_host));
        let preshared = hkdf(TEXT, b"preshared key");
        assert_eq!(secret.preshared_key(), PresharedKey::from_bytes(&preshared));
        // Fixed for ever: hosts of different versions must agree.
        assert_eq!(private.public().to_string(), PUBLIC);
    }

    const PUBLIC: &str = "7GyKgNTa3qBWZBrnIuwNEh2Iw1HGMQyUqYsar1IFhi0=";

    #[test]
    fn what_is_short_or_guessable_is_refused() {
        let refused = |text: &str| text.parse::<SharedSecret>().unwrap_err();
        assert_eq!(refused(""), WeakSecret::Short);
        assert_eq!(refused(&TEXT[..31]), WeakSecret::Short);
        assert_eq!(refused(&("A".repeat(31) + "====")), WeakSecret::Short);
        assert_eq!(refused(&TEXT.repeat(30)), WeakSecret::Long);
        assert_eq!(refused(&TEXT.replace('z', " ")), WeakSecret::Alphabet);
        for guessable in [
            "a".repeat(64),
            "abcdefghijklmnopqrstuvwxyz0123456789".into(),
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz".into(),
            "0123456789abcdef0123456789abcdef".into(),
            "correcthorsebatterystaplecorrecthorse".into(),
            "changeme-changeme-changeme-changeme".into(),
            "Tr0ub4dor-3Tr0ub4dor-3Tr0ub4dor-3".into(),
            TEXT[..20].repeat(2),
            "0".repeat(20) + "1a2b3c4d5e6f",
        ] {
            assert_eq!(refused(&guessable), WeakSecret::Guessable, "{guessable}");
        }
    }

    #[test]
    fn it_is_not_shown() {
        let secret: SharedSecret = TEXT.parse().unwrap();
        assert_eq!(format!("{secret:?}"), "SharedSecret(hidden)");
        assert_eq!(secret, TEXT.parse().unwrap());
        assert_ne!(secret, SharedSecret::generate().parse().unwrap());
    }

    proptest! {
        #[test]
        fn random_secrets_pass(bytes in any::<[u8; 32]>()) {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let base64 = PresharedKey::from_bytes(&bytes).to_base64();
            // What proptest makes may be all zeros; what has few values is not random.
            let values = bytes.iter().collect::<HashSet<_>>().len();
            prop_assume!(values > 24);
            for text in [&hex, &hex.to_uppercase(), &hex[..32].to_string(), &*base64] {
                prop_assert!(text.parse::<SharedSecret>().is_ok(), "{}", text);
            }
        }

        /// Hosts have different keys, and so have networks.
        #[test]
        fn keys_differ(one in "[a-z0-9.:]{1,40}", other in "[a-z0-9.:]{1,40}") {
            let secret: SharedSecret = TEXT.parse().unwrap();
            let keys = [&one, &other].map(|identity| secret.private_key(identity).public());
            prop_assert_eq!(keys[0] == keys[1], one == other);
            let elsewhere: SharedSecret = TEXT[1..].parse().unwrap();
            prop_assert_ne!(keys[0], elsewhere.private_key(&one).public());
        }

        #[test]
        fn any_text_is_taken_or_refused(text in any::<String>()) {
            let _ = text.parse::<SharedSecret>();
        }
    }
}
