//! Bad flags and broken surroundings: one clear line, a status that is not
//! zero, and nothing left behind.

use crate::support::Test;

/// The tests of this file.
pub fn tests() -> Vec<Test> {
    vec![]
}
