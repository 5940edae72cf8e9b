//! WireGuard: two fastvpn that trust each other by their keys, fastvpn and other
//! people's programs, and those that nobody trusts.

pub mod ends;
pub mod files;
pub mod interface;
pub mod interop;
pub mod moving;
pub mod pairs;
pub mod rekey;
pub mod secrets;
pub mod silence;
pub mod uapi;
pub mod wire;
