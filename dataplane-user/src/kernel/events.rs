//! What the programs tell of backends: events as they happen, and the rows that they are about.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use aya::maps::{Map, MapData, RingBuf};
use dataplane_common::abi::{Backend, BackendHealth, Event, backend_state, map_name};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::arrays::MappedArray;
use super::{KernelError, open_map};

/// The ring buffer `EVENTS`. It has one reader: what one takes, no other sees.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// To be called inside a tokio runtime.
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        let fail = |source| KernelError::Map {
            map: map_name::EVENTS.into(),
            source,
        };
        let ring = RingBuf::try_from(Map::RingBuf(open_map(pin_dir, map_name::EVENTS)?)).map_err(fail)?;
        // SAFETY: the ring buffer owns the descriptor, and the registration owns the ring buffer.
        let registered = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        let ring = registered.map_err(|error| KernelError::Io {
            operation: "wait for events of",
            path: pin_dir.join(map_name::EVENTS),
            source: error.into(),
        })?;
        Ok(Self { ring })
    }

    /// The next event. Nothing is lost if the caller does not wait for it.
    ///
    /// # Errors
    ///
    /// If the descriptor cannot be waited for.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            let mut guard = self.ring.readable_mut().await?;
            while let Some(item) = guard.get_inner_mut().next() {
                if let Some(event) = parse(&item) {
                    return Ok(event);
                }
            }
            guard.clear_ready();
        }
    }
}

/// `None` for a record of another size, which no program of this ABI writes.
fn parse(bytes: &[u8]) -> Option<Event> {
    if bytes.len() != size_of::<Event>() {
        return None;
    }
    // SAFETY: as many bytes as an `Event` has, and any are a valid one (integers only); the copy needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}

/// Reads rows of backends and what connections saw of them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BackendReader {
    rows: Arc<MappedArray<Backend>>,
    health: Arc<MappedArray<BackendHealth>>,
}

impl BackendReader {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            rows: Arc::new(MappedArray::open(pin_dir, map_name::BACKENDS)?),
            health: Arc::new(MappedArray::open(pin_dir, map_name::BACKEND_HEALTH)?),
        })
    }

    /// A row in use; `None` if it is free, or beyond the end.
    #[must_use]
    pub fn row(&self, id: u32) -> Option<Backend> {
        self.rows.read(id).filter(|row| row.state != backend_state::FREE)
    }

    /// Rows, free ones too; row 0 is never in use.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.rows.len()
    }

    /// True if there is no row at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What connections saw of a backend; `None` beyond the end.
    #[must_use]
    pub fn health(&self, id: u32) -> Option<BackendHealth> {
        self.health.read(id)
    }

    /// Backends that connections have failed to since a time (nanoseconds since boot), and that have shown no sign of life
    /// after it.
    #[must_use]
    pub fn failed_since(&self, time: u64) -> Vec<u32> {
        let failed = |id: &u32| {
            self.health(*id)
                .is_some_and(|h| h.failed >= time && h.failed > h.alive && self.row(*id).is_some())
        };
        (1..self.health.len()).filter(failed).collect()
    }
}

/// Where a backend listens.
#[must_use]
pub fn socket_addr(row: &Backend) -> SocketAddr {
    SocketAddr::new(row.addr.to_ip(), row.port.to_host())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_another_size_are_no_events() {
        let mut bytes = [0; size_of::<Event>() + 1];
        bytes[..8].copy_from_slice(&7_u64.to_ne_bytes());
        assert_eq!(parse(&bytes), None);
        assert_eq!(parse(&bytes[..31]), None);
        // wherever it lies
        assert_eq!(parse(&bytes[1..]).map(|e| e.time), Some(0));
        assert_eq!(parse(&bytes[..32]).map(|e| e.time), Some(7));
    }
}
