//! Ends connections in the socket programs' table whose end the programs do not see.
//!
//! They see when a process closes a socket, in whatever way. They do not see when the kernel closes one of its own (NFS, SMB),
//! nor that a connection was reset whose socket a process keeps open; such connections would count as open for ever.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dataplane_common::abi::protocol;
use tracing::{debug, warn};

use super::diag::Diag;
use super::namespaces;
use crate::cni::netns;
use crate::kernel::Translations;

/// How often the table is gone through.
const PERIOD: Duration = Duration::from_secs(300);

/// Remembers which sockets were alive.
#[derive(Debug)]
pub struct Sweep {
    root: PathBuf,
    /// In the table, and alive when last looked. Only these are ever ended: a socket in a namespace that this process cannot
    /// see looks as if it were not there.
    alive: HashSet<u64>,
}

impl Sweep {
    /// `root` is `/`, or where the host's `proc` and `run` are mounted.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            alive: HashSet::new(),
        }
    }

    /// Goes through the table once, and gives how many connections it has ended. Blocks for some milliseconds, more with
    /// many sockets.
    ///
    /// # Errors
    ///
    /// If the table cannot be read or some of the sockets cannot be listed; then nothing is ended.
    pub fn run(&mut self, translations: &mut Translations) -> io::Result<usize> {
        // before the sockets: what is new meanwhile is not in question
        let mut held = Vec::new();
        translations
            .visit(|cookie, _| held.push(cookie))
            .map_err(io::Error::other)?;
        if held.is_empty() {
            self.alive.clear();
            return Ok(0);
        }
        let living = sockets(&self.root)?;
        let mut alive = HashSet::new();
        let mut ended = 0;
        for cookie in held {
            if living.contains(&cookie) {
                alive.insert(cookie);
            } else if self.alive.contains(&cookie) && translations.end(cookie) {
                ended += 1;
            }
        }
        self.alive = alive;
        Ok(ended)
    }
}

/// Cookies of all connected sockets of the node.
fn sockets(root: &Path) -> io::Result<HashSet<u64>> {
    let mut all = HashSet::new();
    for namespace in namespaces::all(root)? {
        let listed = netns::enter(&namespace.file, || {
            let mut diag = Diag::open()?;
            let mut cookies = Vec::new();
            for number in [protocol::TCP, protocol::UDP] {
                cookies.extend(diag.connected(number, None)?.iter().map(|socket| socket.cookie));
            }
            Ok(cookies)
        });
        match listed {
            Ok(cookies) => all.extend(cookies),
            // a name without a namespace behind it
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// Goes through the table again and again. Never ends.
pub async fn keep(root: PathBuf, translations: Translations) {
    let mut state = Some((Sweep::new(root), translations));
    loop {
        tokio::time::sleep(PERIOD).await;
        let Some((mut sweep, mut translations)) = state.take() else {
            return;
        };
        let work = move || {
            let ended = sweep.run(&mut translations);
            (sweep, translations, ended)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok((sweep, translations, ended)) => {
                state = Some((sweep, translations));
                match ended {
                    Ok(ended) => debug!(ended, "connections whose end nobody saw"),
                    Err(error) => {
                        warn!(%error, "sockets cannot be listed: some connections may count as open for too long");
                    }
                }
            }
            Err(error) => warn!(%error, "looking for connections whose end nobody saw failed"),
        }
    }
}
