//! A real etcd of its own for a test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]
#![allow(dead_code, reason = "each test binary uses a part of this")]
#![allow(unreachable_pub, reason = "shared by several test binaries")]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use beeline_control_plane::store::{EtcdOptions, EtcdStore};

/// A server with one member; it and its directory are gone on drop.
pub struct Etcd {
    child: Child,
    client: u16,
    peer: u16,
    dir: tempfile::TempDir,
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn spawn(dir: &std::path::Path, client: u16, peer: u16) -> Child {
    let (client, peer) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    Command::new("etcd")
        .arg("--data-dir")
        .arg(dir)
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(["--heartbeat-interval", "20", "--election-timeout", "200"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd is not installed (Debian: etcd-server)")
}

impl Etcd {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (client, peer) = (free_port(), free_port());
        let child = spawn(dir.path(), client, peer);
        Self {
            child,
            client,
            peer,
            dir,
        }
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions {
            etcd_servers: vec![format!("http://127.0.0.1:{}", self.client)],
            ..EtcdOptions::default()
        }
    }

    /// Connects as soon as it answers.
    pub async fn connect(&self) -> EtcdStore {
        let mut failures = 0;
        loop {
            match EtcdStore::connect(&self.options()).await {
                Ok(store) => return store,
                Err(error) => assert!(failures < 200, "{error}"),
            }
            failures += 1;
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    /// Kills it and starts it again with the same data.
    pub fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(self.dir.path(), self.client, self.peer);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
