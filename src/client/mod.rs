//! Commands for a running tunnel.

use crate::cli::client::ClientCommand;
use crate::error::{Error, Result};

/// Carries out one command.
///
/// # Errors
/// Always: none of them is implemented yet.
pub fn run(_command: &ClientCommand) -> Result<()> {
    Err(Error::new("not implemented here yet"))
}
