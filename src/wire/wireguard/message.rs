//! Layouts of WireGuard's four messages. All integers are little-endian.

/// Type of a message: the first byte, and three zero bytes after it.
pub const INITIATION: u8 = 1;
/// See [`INITIATION`].
pub const RESPONSE: u8 = 2;
/// See [`INITIATION`].
pub const COOKIE_REPLY: u8 = 3;
/// See [`INITIATION`].
pub const DATA: u8 = 4;

/// Ahead of the sealed packet in a data message: type, receiver index, counter.
pub const DATA_HEADER_BYTES: usize = 16;

/// Behind it: Poly1305's tag.
pub const TAG_BYTES: usize = 16;
