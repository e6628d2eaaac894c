//! The network configuration that runtimes look for: its presence says that pods can have a network.

use std::io;
use std::path::{Path, PathBuf};

use beeline_cni::protocol::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::overlay::View;
use crate::persist::{self, Faults};

/// What to write, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conf {
    /// The file, in the directory that the runtime reads.
    pub path: PathBuf,
    /// Socket of the agent.
    pub socket: PathBuf,
    /// State directory of the agent.
    pub state_dir: PathBuf,
}

impl Conf {
    fn content(&self) -> Value {
        let mut plugin = json!({
            "type": "beeline-cni",
            "capabilities": {"portMappings": true, "bandwidth": true, "mac": true, "ips": true, "dns": true},
        });
        for (key, path, default) in [
            ("socket", &self.socket, DEFAULT_SOCKET),
            ("stateDir", &self.state_dir, DEFAULT_STATE_DIR),
        ] {
            if path != Path::new(default) {
                plugin[key] = json!(path);
            }
        }
        json!({"cniVersion": "1.0.0", "name": "beeline", "plugins": [plugin]})
    }

    /// Writes the file, unless it says the same already: runtimes read it again with each change.
    fn write(&self) -> io::Result<bool> {
        let content = format!("{:#}\n", self.content());
        if std::fs::read(&self.path).is_ok_and(|held| held == content.as_bytes()) {
            return Ok(false);
        }
        persist::replace(&self.path, content.as_bytes(), &Faults::default())?;
        Ok(true)
    }
}

/// Writes the configuration as soon as the pod network works, and again with each change of that, should it be gone.
pub async fn when_ready(conf: Conf, mut view: watch::Receiver<View>) {
    while view.wait_for(|view| view.ready).await.is_ok() {
        match conf.write() {
            Ok(true) => info!(path = %conf.path.display(), "the runtime's network configuration is written"),
            Ok(false) => {}
            Err(error) => {
                warn!(path = %conf.path.display(), %error, "the runtime's network configuration cannot be written");
            }
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(dir: &Path) -> Conf {
        Conf {
            path: dir.join("10-beeline.conflist"),
            socket: DEFAULT_SOCKET.into(),
            state_dir: "/elsewhere".into(),
        }
    }

    #[tokio::test]
    async fn the_file_is_there_once_pods_can_have_a_network() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, view) = watch::channel(View::default());
        let conf = conf(dir.path());
        let path = conf.path.clone();
        let task = tokio::spawn(when_ready(conf, view));
        // not before: a change that does not make it ready is taken in first
        sender.send_modify(|view| view.mtu = 1500);
        tokio::task::yield_now().await;
        assert!(!path.exists());
        sender.send_modify(|view| view.ready = true);
        drop(sender);
        task.await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let found: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(found["plugins"][0]["type"], "beeline-cni");
        assert_eq!(found["plugins"][0]["stateDir"], "/elsewhere");
        assert_eq!(found["plugins"][0]["socket"], Value::Null);
        // nothing but the file itself, which is what a runtime may read at any moment
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_says_the_same_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let conf = conf(dir.path());
        assert!(conf.write().unwrap());
        assert!(!conf.write().unwrap());
        std::fs::write(&conf.path, "{}").unwrap();
        assert!(conf.write().unwrap());
    }
}
