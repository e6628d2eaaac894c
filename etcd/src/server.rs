//! A real etcd of its own for a test.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};

/// A server with one member; it and its directory are gone on drop.
pub struct Server {
    program: Box<dyn Fn() -> Command + Send + Sync>,
    child: Option<Child>,
    client: SocketAddr,
    peer: SocketAddr,
    dir: tempfile::TempDir,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// On this host, at ports that are free.
    ///
    /// # Errors
    ///
    /// When etcd is not installed (Debian: etcd-server).
    pub fn start() -> io::Result<Self> {
        let free = || TcpListener::bind("127.0.0.1:0")?.local_addr();
        Self::at(free()?, free()?, || Command::new("etcd"))
    }

    /// At these addresses, for clients and for other members; `program` begins the command, maybe in another namespace.
    ///
    /// # Errors
    ///
    /// As [`Server::start`].
    pub fn at(
        client: SocketAddr,
        peer: SocketAddr,
        program: impl Fn() -> Command + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let mut server = Self {
            program: Box::new(program),
            child: None,
            client,
            peer,
            dir: tempfile::tempdir()?,
        };
        server.resume()?;
        Ok(server)
    }

    /// Where clients find it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.client)
    }

    /// SIGKILL.
    ///
    /// # Errors
    ///
    /// When it had ended before.
    pub fn kill(&mut self) -> io::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Starts it again with the same data.
    ///
    /// # Errors
    ///
    /// As [`Server::start`].
    pub fn resume(&mut self) -> io::Result<()> {
        let (client, peer) = (self.url(), format!("http://{}", self.peer));
        let mut command = (self.program)();
        command.arg("--data-dir").arg(self.dir.path());
        command.args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ]);
        command.args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ]);
        command.args(["--initial-cluster", &format!("default={peer}")]);
        command.args(["--heartbeat-interval", "20", "--election-timeout", "200"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.child = Some(child.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot start etcd (Debian: etcd-server): {error}"),
            )
        })?);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.kill());
    }
}
