//! The clock that threads tell each other times by.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_BOOTTIME`, which goes on while the machine sleeps, as the time does
/// at the other end (`clock_gettime(2)`).
#[inline]
pub fn now_ns() -> u64 {
    // Any Linux has this clock.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on() {
        let start_ns = now_ns();
        assert_ne!(start_ns, 0);
        while now_ns() == start_ns {
            std::hint::spin_loop();
        }
        assert!(now_ns() > start_ns);
    }
}
