//! Who the peers are: their prefixes, their endpoints and their names.

pub mod dns;
pub mod overlay;
