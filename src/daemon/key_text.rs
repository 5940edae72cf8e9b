//! A secret key on its way to a new process.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// The text of a secret key. It is wiped when it is dropped, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyText(Zeroizing<String>);

impl KeyText {
    /// The key.
    ///
    /// # Errors
    /// When it is not a key; the error does not quote it.
    pub fn parse<K: FromStr>(&self) -> Result<K> {
        let key = self.0.parse();
        key.map_err(|_| {
            Error::new("the running process has handed over something that is not a key")
        })
    }
}

impl From<Zeroizing<String>> for KeyText {
    fn from(text: Zeroizing<String>) -> Self {
        Self(text)
    }
}

impl fmt::Debug for KeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyText(hidden)")
    }
}

impl Serialize for KeyText {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for KeyText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Text;

        impl de::Visitor<'_> for Text {
            type Value = KeyText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the text of a key")
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<KeyText, E> {
                Ok(KeyText(Zeroizing::new(text.to_string())))
            }
        }
        // Borrowed from the line, whose owner wipes it.
        deserializer.deserialize_str(Text)
    }
}
