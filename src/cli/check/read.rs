//! Small readings that several areas share.

use std::fs;
use std::io;

use crate::error::cause_text;

/// What a system call said, `Err` with its errno.
pub type Tried<T> = Result<T, i32>;

/// The errno of a failed call; calls fail with one as a rule.
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// `strerror(3)` as it reads in the middle of a line.
pub fn errno_text(errno: i32) -> String {
    cause_text(&io::Error::from_raw_os_error(errno))
}

/// A kernel parameter: `path` is below /proc/sys, with slashes. `None` where
/// this kernel or this network namespace has none of that name.
pub fn sysctl(path: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
    Some(text.trim().to_string())
}

/// The field `name` of /proc/self/status.
pub fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':');
    status.lines().find_map(value).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_fields_by_their_whole_name() {
        let status = "Seccomp:\t2\nSeccomp_filters:\t1\n";
        assert_eq!(status_field(status, "Seccomp"), Some("2"));
        assert_eq!(status_field(status, "Seccomp_filters"), Some("1"));
        assert_eq!(status_field(status, "Sec"), None);
    }

    #[test]
    fn names_errors() {
        assert_eq!(errno_text(libc::EACCES), "permission denied");
    }
}
