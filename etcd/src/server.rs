//! A real etcd of its own for a test.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Files (PEM) with which a server speaks TLS, to clients that it knows.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The authority of clients.
    pub ca: PathBuf,
    /// The server's certificate, of a client too: etcd's gateway asks etcd with it.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A server with one member; it and its directory are gone on drop.
pub struct Server {
    program: Box<dyn Fn() -> Command + Send + Sync>,
    child: Option<Child>,
    client: SocketAddr,
    peer: SocketAddr,
    tls: Option<Tls>,
    dir: tempfile::TempDir,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

fn free() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

impl Server {
    /// On this host, at ports that are free.
    ///
    /// # Errors
    ///
    /// When etcd is not installed (Debian: etcd-server).
    pub fn start() -> io::Result<Self> {
        Self::at(free()?, free()?, || Command::new("etcd"))
    }

    /// On this host with TLS.
    ///
    /// # Errors
    ///
    /// As [`Server::start`].
    pub fn start_with_tls(tls: Tls) -> io::Result<Self> {
        Self::new(free()?, free()?, Some(tls), || Command::new("etcd"))
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
        Self::new(client, peer, None, program)
    }

    fn new(
        client: SocketAddr,
        peer: SocketAddr,
        tls: Option<Tls>,
        program: impl Fn() -> Command + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let mut server = Self {
            program: Box::new(program),
            child: None,
            client,
            peer,
            tls,
            dir: tempfile::tempdir()?,
        };
        server.resume()?;
        Ok(server)
    }

    /// Where clients find it.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.client)
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
        if let Some(tls) = &self.tls {
            command.arg("--client-cert-auth");
            command.arg("--trusted-ca-file").arg(&tls.ca);
            command.arg("--cert-file").arg(&tls.certificate);
            command.arg("--key-file").arg(&tls.key);
        }
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
