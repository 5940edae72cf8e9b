//! What the I/O engines have in common: messages to and from the UDP socket,
//! and what is learnt from sends that the kernel refuses.

pub(crate) mod message;
pub(crate) mod refusal;
