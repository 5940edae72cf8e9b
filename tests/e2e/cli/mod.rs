//! The command line: flags, keys, `check`, `status --watch`, `top` and its picture, and the guides as they are printed.

pub mod checks;
pub mod errors;
pub mod generated;
pub mod guides;
pub mod keys;
pub mod picture;
pub mod top;
pub mod watch;
