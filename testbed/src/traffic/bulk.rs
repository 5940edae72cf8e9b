//! Bulk data over TCP, as tests and benches want it.

use std::io;
use std::net::TcpStream;
use std::time::Duration;

use fastvpn::error::Result;
use fastvpn::testbed::traffic::{Transfer, TransferReport, connect};

use super::{Between, Watch, failed};

/// When a transfer is over.
#[derive(Debug, Clone, Copy)]
pub enum BulkLimit {
    /// Sending ends after this time.
    Time(Duration),
    /// Sending ends after this many bytes on each stream.
    BytesPerStream(u64),
}

/// A transfer to be made.
#[derive(Debug, Clone, Copy)]
pub struct Bulk {
    /// Parallel connections, each with two threads.
    pub streams: usize,
    /// When it is over.
    pub limit: BulkLimit,
    /// The server sends and the client receives.
    pub reverse: bool,
    /// The receiver compares every byte; otherwise it only counts them.
    pub verify: bool,
}

impl Bulk {
    /// From client to server, every byte compared.
    pub fn new(streams: usize, limit: BulkLimit) -> Self {
        Self {
            streams,
            limit,
            reverse: false,
            verify: true,
        }
    }

    fn sockets(&self, between: Between<'_>) -> io::Result<(TcpStream, TcpStream)> {
        let (client, server) = connect(between)?;
        Ok(match self.reverse {
            true => (server, client),
            false => (client, server),
        })
    }
}

/// Sends bulk data over TCP.
///
/// # Errors
/// As [`Transfer::run`].
pub fn tcp_bulk(between: Between<'_>, bulk: Bulk, watch: &Watch) -> Result<TransferReport> {
    let (time_max, bytes_max) = match bulk.limit {
        BulkLimit::Time(time) => (time, u64::MAX),
        BulkLimit::BytesPerStream(bytes) => (Duration::MAX, bytes),
    };
    let transfer = Transfer {
        time_max,
        bytes_max,
        verify: bulk.verify,
    };
    let pairs: io::Result<Vec<_>> = (0..bulk.streams).map(|_| bulk.sockets(between)).collect();
    pairs
        .and_then(|pairs| transfer.run(&pairs, watch))
        .map_err(|cause| failed("TCP transfer", between, cause))
}
