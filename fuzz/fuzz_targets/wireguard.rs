//! Bytes as a stranger's datagram to a WireGuard host, as they are and as each kind of
//! message, and as what they change in messages that are authentic: nothing of it begins
//! or ends a handshake.
#![no_main]

use std::cell::RefCell;

use fastvpn::wire::wireguard::fuzz::Host;
use libfuzzer_sys::fuzz_target;

/// Kinds that are handshakes', with their lengths.
const MESSAGES: [(u8, usize); 3] = [(1, 148), (2, 92), (3, 64)];

thread_local! {
    static HOST: RefCell<Host> = RefCell::new(Host::new());
}

fuzz_target!(|data: &[u8]| {
    HOST.with_borrow_mut(|host| {
        host.receive(data);
        for (kind, length) in MESSAGES {
            let mut message = vec![kind, 0, 0, 0];
            message.extend(data);
            message.resize(length, 0);
            assert!(host.receive(&message));
        }
        host.receive_damaged(data);
    });
});
