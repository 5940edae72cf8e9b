//! Bytes as all that the other process of a takeover says, to each of the two.
//! Neither may panic, wait, or take nonsense for a takeover.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use fastvpn::daemon::handoff::{Manifest, receive, serve};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The new process gets no descriptors, so nothing can come of it.
    assert!(receive(other_side(data)).is_err());
    // The old one is told that the new one is ready.
    if serve(other_side(data), &manifest(), &[]).is_ok() {
        assert!(data.contains(&b'\n'));
    }
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(data) {
        let written = serde_json::to_vec(&manifest).unwrap();
        assert_eq!(
            serde_json::from_slice::<Manifest>(&written).unwrap(),
            manifest
        );
    }
});

/// A connection on which these bytes come, and then the end.
fn other_side(data: &[u8]) -> UnixStream {
    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(data).unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    // What the near side says is read by nobody, but has to go somewhere.
    KEPT.with_borrow_mut(|kept| *kept = Some(far));
    near
}

thread_local! {
    static KEPT: std::cell::RefCell<Option<UnixStream>> = const { std::cell::RefCell::new(None) };
}

fn manifest() -> Manifest {
    serde_json::from_str(include_str!("../seeds/takeover/manifest")).unwrap()
}
