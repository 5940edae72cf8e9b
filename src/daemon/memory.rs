//! What becomes of memory: how the allocator gives it back, and who may see it.

use nix::sys::prctl::set_dumpable;

/// Has large blocks go back to the kernel whenever they are freed: answers to
/// operators, tables, configuration files.
///
/// By itself glibc raises its limit for that (`M_MMAP_THRESHOLD`, mallopt(3)) to
/// the size of the first block that is freed, and keeps what is shorter, for each
/// thread apart. Buffers of packets stay where they are in any case.
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    {
        const BYTES_MIN: libc::c_int = 128 << 10;
        // SAFETY: takes numbers only; the allocator locks its own state.
        let is_set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, BYTES_MIN) } == 1;
        if !is_set {
            tracing::debug!("mallopt(M_MMAP_THRESHOLD) was refused");
        }
    }
}

/// Keeps keys out of core dumps, and from other processes of the same user (ptrace(2),
/// `/proc/PID/mem`). It covers all memory, wherever keys are copied to, so no range needs
/// `MADV_DONTDUMP` of its own; and it needs no right that could be missing.
pub fn hide() {
    if let Err(errno) = set_dumpable(false) {
        tracing::warn!("cannot keep keys out of core dumps: {}", errno.desc());
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::prctl::get_dumpable;

    use super::*;

    #[test]
    fn a_process_with_keys_leaves_no_core_dump() {
        hide();
        assert_eq!(get_dumpable(), Ok(false));
        // Other tests of this process are none of its business.
        set_dumpable(true).unwrap();
    }
}
