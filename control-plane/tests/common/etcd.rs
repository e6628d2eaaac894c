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

use beeline_control_plane::store::{EtcdOptions, EtcdStore};
use beeline_etcd::server::Server;

/// A server with one member; it and its directory are gone on drop.
pub struct Etcd(Server);

pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Etcd {
    pub fn start() -> Self {
        Self(Server::start().unwrap())
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions {
            etcd_servers: vec![self.0.url()],
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
        self.0.kill().unwrap();
        self.0.resume().unwrap();
    }
}
