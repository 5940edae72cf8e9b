//! What becomes of memory: how the allocator gives it back.

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
