//! The control socket of this process.

use std::os::fd::{AsFd, OwnedFd};

use crossbeam_channel::{Receiver, never};

use crate::config::Config;
use crate::control::server::{Call, Server};
use crate::error::{Error, Result};

/// See the module's documentation.
#[derive(Default)]
pub struct ControlSocket {
    server: Option<Server>,
}

impl ControlSocket {
    /// Opens the control socket, or goes on with another process's `listener`.
    ///
    /// # Errors
    /// When it was asked for and cannot be opened.
    pub fn open(&mut self, config: &Config, listener: Option<OwnedFd>) -> Result<()> {
        let path = &config.control_path();
        let server = match listener {
            Some(listener) => Server::from_listener(listener, path),
            None => Server::start(path),
        };
        match server {
            Ok(server) => {
                tracing::debug!("control socket: {}", path.display());
                self.server = Some(server);
            }
            // Nobody asked for it, as where /run cannot be written to.
            Err(error) if config.control.is_none() => {
                tracing::warn!("no control socket: {error}");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// What clients want.
    pub fn calls(&self) -> Receiver<Call> {
        let server = self.server.as_ref();
        server.map_or_else(never, |server| server.calls.clone())
    }

    /// Its listening socket once more, if there is one.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn listener(&self) -> Result<Option<OwnedFd>> {
        let server = self.server.as_ref();
        let listener = server.map(|server| server.listener.as_fd().try_clone_to_owned());
        listener
            .transpose()
            .map_err(|error| Error::os("cannot duplicate the control socket", error))
    }

    /// Closes it, with its name unless another process listens there from now on.
    pub fn close(&mut self, unlink: bool) {
        if let Some(server) = self.server.take() {
            server.close(unlink);
        }
    }
}
