//! The command line: flags, `check`, and the guides as they are printed.

pub mod checks;
pub mod errors;
pub mod guides;
