//! Hosts as operators have them: containers, NAT, other MTUs, peers that come
//! and go, and strangers.

use crate::support::Test;

/// The tests of this file.
pub fn tests() -> Vec<Test> {
    vec![]
}
