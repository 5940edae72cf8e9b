//! What is served of the tunnel over HTTP: the numbers that `status` and `peers` show, and
//! whether it is ready.

use std::time::SystemTime;

use super::requests;
use super::tunnel::Tunnel;
use crate::config::Config;
use crate::control::metrics::{Call, Listener, PEERS_SHOWN_MAX, Server, Snapshot};
use crate::error::Result;

/// Listens where the configuration says so, or goes on with a process's socket that listens
/// there already. `None`: it says nothing.
///
/// # Errors
/// When another process listens there, or this host does not have the address. The port of one
/// that is taken over is taken even if only its address differs, if either is of all addresses.
pub fn listen(config: &Config, inherited: Option<Listener>) -> Result<Option<Listener>> {
    let Some(address) = config.metrics else {
        return Ok(None);
    };
    match inherited {
        Some(listener) if listener.address == address => Ok(Some(listener)),
        old => Listener::bind(address, old.map(|listener| listener.address)).map(Some),
    }
}

/// Serves those who connect.
///
/// # Errors
/// When there are no more threads or descriptors.
pub fn serve(listener: Listener) -> Result<Server> {
    let address = listener.address;
    let server = Server::start(listener)?;
    tracing::info!(%address, "metrics: http://{address}/metrics");
    Ok(server)
}

/// [`serve`] where there is a tunnel, which is worth more.
pub fn try_to_serve(listener: Listener) -> Option<Server> {
    serve(listener)
        .inspect_err(|error| tracing::error!("{error}"))
        .ok()
}

/// Answers what a client wants to know.
pub fn answer(tunnel: &mut Tunnel, call: Call) {
    // Whoever has asked may have gone.
    match call {
        Call::Snapshot(answer) => drop(answer.try_send(Box::new(snapshot(tunnel)))),
        Call::Readiness(answer) => drop(answer.try_send(tunnel.readiness())),
    }
}

fn snapshot(tunnel: &mut Tunnel) -> Snapshot {
    let status = requests::status(tunnel);
    Snapshot {
        taken_at: SystemTime::now(),
        status,
        peers: requests::peers(tunnel).take(PEERS_SHOWN_MAX).collect(),
        readiness: tunnel.readiness(),
    }
}
