//! The reference: a plain peer as the teaching VPN has it. One datagram, one
//! packet, one system call each way, no offloads.
