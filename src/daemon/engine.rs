//! Which I/O engine a process's workers run on.

use std::fmt;

use crate::config::Io;
use crate::io::uring;

/// The engine of all workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// [`crate::io::uring`], with these features to try, or in use.
    Uring(uring::Features),
    /// [`crate::io::epoll`].
    Epoll,
}

impl Engine {
    /// The engine asked for. Left to choose, it is io_uring where the kernel
    /// has it and allows it; where not, one warning says why.
    pub fn choose(io: Io, wanted: uring::Features) -> Self {
        match io {
            Io::Uring => Self::Uring(wanted),
            Io::Epoll => Self::Epoll,
            Io::Auto => match uring::probe(wanted) {
                Ok(()) => Self::Uring(wanted),
                Err(error) => {
                    tracing::warn!("io_uring is not available here, using epoll: {error}");
                    Self::Epoll
                }
            },
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on_off = |on| if on { "on" } else { "off" };
        match self {
            Self::Uring(features) => write!(
                f,
                "io_uring (multishot receive {})",
                on_off(features.receive_multishot)
            ),
            Self::Epoll => f.write_str("epoll"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: uring::Features = uring::Features {
        receive_multishot: true,
    };

    #[test]
    fn what_is_asked_for_is_not_second_guessed() {
        assert_eq!(Engine::choose(Io::Epoll, ALL), Engine::Epoll);
        assert_eq!(Engine::choose(Io::Uring, ALL), Engine::Uring(ALL));
    }

    #[test]
    fn names_itself() {
        let partly = uring::Features {
            receive_multishot: false,
        };
        assert_eq!(
            Engine::Uring(partly).to_string(),
            "io_uring (multishot receive off)"
        );
        assert_eq!(Engine::Epoll.to_string(), "epoll");
    }
}
