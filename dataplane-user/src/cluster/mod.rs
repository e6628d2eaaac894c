//! Bringing up a cluster of one's own, node by node: `beeline init`, `join`, `token`, `reset`, in the words of kubeadm.

mod daemon;
mod init;
mod join;
mod objects;
mod renew;
mod reset;
mod token;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::time::Instant;

pub use init::{InitArgs, init};
pub use join::{JoinArgs, join};
pub use renew::Renewal;
pub use reset::{ResetArgs, reset};
pub use token::{Token, TokenCommand, token};

/// Where the administrator's kubeconfig is unless told otherwise.
const ADMIN_CONF: &str = "/etc/beeline/admin.conf";
/// How long parts that were started may take to answer.
const START: Duration = Duration::from_secs(40);
const POLL: Duration = Duration::from_millis(100);
/// Who writes, as `managedFields` names it.
const MANAGER: &str = "beeline";

/// Where a node keeps things.
#[derive(Clone, Debug, Args)]
pub struct Places {
    /// Directory below which everything is kept, so that one machine can have several nodes
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// The cgroup v2 directory of this node [default: where cgroup v2 is mounted]
    #[arg(long)]
    cgroup_root: Option<PathBuf>,
    /// Directory on a bpffs for maps and links [default: beeline/ where a bpffs is mounted]
    #[arg(long)]
    bpffs_root: Option<PathBuf>,
    /// Start of the names of pods' network namespaces in /run/netns
    #[arg(long, default_value = "beeline-")]
    netns_prefix: String,
    /// Where a container runtime listens that runs the pods, such as unix:///run/containerd/containerd.sock [default: pods
    /// are processes of the host]
    #[arg(long)]
    cri_socket: Option<String>,
}

impl Places {
    fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    fn admin_conf(&self) -> PathBuf {
        self.path("etc/beeline/admin.conf")
    }

    fn node_conf(&self) -> PathBuf {
        self.path("etc/beeline/node.conf")
    }

    fn net_conf(&self) -> PathBuf {
        self.path("etc/beeline/net-conf.json")
    }

    fn control_plane(&self) -> PathBuf {
        self.path("var/lib/beeline/control-plane")
    }

    fn cni(&self) -> PathBuf {
        self.path("var/lib/beeline/cni")
    }

    fn pods(&self) -> PathBuf {
        self.path("var/lib/beeline/pods")
    }

    /// Manifests of pods that the node runs without being asked by the API.
    fn manifests(&self) -> PathBuf {
        self.path("etc/beeline/manifests")
    }

    fn host_local(&self) -> PathBuf {
        self.path("var/lib/cni/networks/cbr0")
    }

    fn run(&self) -> PathBuf {
        self.path("run/beeline")
    }

    fn cgroup(&self) -> anyhow::Result<PathBuf> {
        match &self.cgroup_root {
            Some(path) => Ok(path.clone()),
            None => Ok(crate::kernel::mounts::discover_cgroup2()?),
        }
    }

    /// The command line of `beeline node`.
    fn node_command(&self, node: &str, domain: &str, dns: &[String]) -> Vec<String> {
        let path = |path: PathBuf| path.display().to_string();
        let mut words = vec!["node".to_owned()];
        let mut flag = |name: &str, value: String| words.extend([name.to_owned(), value]);
        flag("--node-name", node.to_owned());
        flag("--kubeconfig", path(self.node_conf()));
        flag("--net-config-path", path(self.net_conf()));
        flag("--state-dir", path(self.run()));
        flag("--cni-socket", path(self.run().join("cni.sock")));
        flag("--cni-state-dir", path(self.cni()));
        flag("--subnet-file", path(self.path("run/flannel/subnet.env")));
        flag("--host-local-dir", path(self.host_local()));
        flag("--pod-dir", path(self.pods()));
        flag("--pod-manifest-path", path(self.manifests()));
        flag("--pod-log-dir", path(self.path("var/log/pods")));
        flag("--image-dir", path(self.path("etc/beeline/images")));
        flag("--netns-prefix", self.netns_prefix.clone());
        flag("--cluster-domain", domain.to_owned());
        if let Some(socket) = &self.cri_socket {
            flag("--runtime", "cri".to_owned());
            flag("--container-runtime-endpoint", socket.clone());
        }
        if !dns.is_empty() {
            flag("--cluster-dns", dns.join(","));
        }
        if let Some(root) = &self.cgroup_root {
            flag("--cgroup-root", path(root.clone()));
        }
        if let Some(root) = &self.bpffs_root {
            flag("--bpffs-root", path(root.clone()));
        }
        words
    }
}

/// A client with what a kubeconfig says.
async fn client(kubeconfig: &Path) -> anyhow::Result<kube::Client> {
    let text = kube::config::Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("read {}", kubeconfig.display()))?;
    let config = kube::Config::from_custom_kubeconfig(text, &kube::config::KubeConfigOptions::default())
        .await
        .with_context(|| format!("use {}", kubeconfig.display()))?;
    kube::Client::try_from(config).context("set up the API client")
}

/// Tries until it works or the time is over.
async fn until<T>(what: &str, mut attempt: impl AsyncFnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + START;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("{what}, {} s long", START.as_secs())));
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

fn need_root() -> anyhow::Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "[preflight] this user is not running as root"
    );
    Ok(())
}

/// The name of the node: what was given, or the host's.
fn node_name(given: Option<&str>) -> anyhow::Result<String> {
    match given {
        Some(name) => Ok(name.to_owned()),
        None => {
            let host = nix::unistd::gethostname().context("read the host's name")?;
            Ok(host.to_string_lossy().to_ascii_lowercase())
        }
    }
}
