//! Who the peers are: their prefixes, their endpoints and their names.

pub(crate) mod dns;
pub(crate) mod overlay;
