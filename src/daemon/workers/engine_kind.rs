//! Which I/O engine a process's workers run on.

use std::fmt;

use crate::config::Io;
use crate::io::uring;

/// The engine of all workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// [`crate::io::uring`].
    Uring,
    /// [`crate::io::epoll`].
    Epoll,
}

impl EngineKind {
    /// The engine asked for. Left to choose, it is io_uring where the kernel
    /// has it and allows it; where not, one warning says why.
    pub fn choose(io: Io) -> Self {
        match io {
            Io::Uring => Self::Uring,
            Io::Epoll => Self::Epoll,
            Io::Auto => match uring::probe(1) {
                Ok(()) => Self::Uring,
                Err(error) => {
                    tracing::warn!("io_uring is not available here, using epoll: {error}");
                    Self::Epoll
                }
            },
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring => "io_uring",
            Self::Epoll => "epoll",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_not_second_guessed() {
        assert_eq!(EngineKind::choose(Io::Epoll), EngineKind::Epoll);
        assert_eq!(EngineKind::choose(Io::Uring), EngineKind::Uring);
    }
}
