//! Keys, as `wg(8)` writes them: 32 bytes in base64.
