//! The command line: flags, keys, `check`, and the guides as they are printed.

pub mod checks;
pub mod errors;
pub mod generated;
pub mod guides;
pub mod keys;
