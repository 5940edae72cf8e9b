//! The one error type of the control plane: a line that an operator can act on.
//!
//! The data path has no errors of this kind; it counts
//! (see [`crate::counters`]).

use std::borrow::Cow;
use std::fmt;
use std::io;

/// `Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What failed, why, and what to do about it, in one line:
/// `cannot open /dev/net/tun: permission denied; run as root or grant CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct Error {
    what: String,
    cause: Option<io::Error>,
    hint: Option<String>,
}

impl Error {
    /// An error that no system call reported: `what` names the thing and the fault.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            cause: None,
            hint: None,
        }
    }

    /// A failed system call. `what` says what was tried, on what.
    pub fn os(what: impl Into<String>, cause: io::Error) -> Self {
        Self {
            what: what.into(),
            cause: Some(cause),
            hint: None,
        }
    }

    /// Adds what the operator can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Says what failed in the caller's words.
    #[must_use]
    pub(crate) fn about(mut self, what: impl Into<String>) -> Self {
        self.what = what.into();
        self
    }

    /// What failed and why, without what to do about it.
    pub fn fault(&self) -> String {
        match &self.cause {
            Some(cause) => format!("{}: {}", self.what, cause_text(cause)),
            None => self.what.clone(),
        }
    }

    /// What the operator can do about it, if that is known.
    pub fn remedy(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The system call's own error, if there was one.
    pub fn cause(&self) -> Option<&io::Error> {
        self.cause.as_ref()
    }

    /// The `errno` of the failed system call, if there was one.
    pub fn errno(&self) -> Option<i32> {
        self.cause.as_ref().and_then(io::Error::raw_os_error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fault())?;
        if let Some(hint) = &self.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// `strerror(3)` as it reads in the middle of a line, without "(os error N)".
pub fn cause_text(cause: &io::Error) -> String {
    let text = match cause.raw_os_error() {
        Some(errno) => nix::errno::Errno::from_raw(errno).desc().to_string(),
        None => cause.to_string(),
    };
    let mut chars = text.chars();
    match (chars.next(), chars.clone().next()) {
        // "Permission denied" reads on in lower case; "RFS specific error" does not.
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => text,
    }
}

/// A text from elsewhere for an error's line: of a long one, both ends.
pub fn shortened(text: &str) -> Cow<'_, str> {
    const END_CHARS_MAX: usize = 150;
    let nth = |(at, _): (usize, char)| at;
    let first = text.char_indices().nth(END_CHARS_MAX).map(nth);
    let last = text.char_indices().nth_back(END_CHARS_MAX - 1).map(nth);
    match (first, last) {
        (Some(first), Some(last)) if first < last => {
            format!("{}…{}", &text[..first], &text[last..]).into()
        }
        _ => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_text_both_ends_are_shown() {
        for short in [String::new(), "ä".repeat(300)] {
            assert_eq!(shortened(&short), short);
        }
        let ends = ["ä".repeat(150), "ö".repeat(150)];
        assert_eq!(
            shortened(&ends.join("x".repeat(5000).as_str())),
            ends.join("…")
        );
    }

    #[test]
    fn reads_as_one_line() {
        let error = Error::os(
            "cannot open /dev/net/tun",
            io::Error::from_raw_os_error(libc::EACCES),
        )
        .hint("run as root or grant CAP_NET_ADMIN");
        assert_eq!(
            error.to_string(),
            "cannot open /dev/net/tun: permission denied; run as root or grant CAP_NET_ADMIN"
        );
        assert_eq!(error.errno(), Some(libc::EACCES));
        assert_eq!(error.fault(), "cannot open /dev/net/tun: permission denied");
        assert_eq!(error.remedy(), Some("run as root or grant CAP_NET_ADMIN"));
    }
}
