//! `beeline reset`: undoes `init` and `join`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::{Places, daemon, need_root};
use crate::overlay::handover;
use crate::overlay::netlink::Netlink;
use crate::overlay::plan::is_device;

/// Flags of `beeline reset`.
#[derive(Debug, Args)]
pub struct ResetArgs {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    places: Places,
}

impl ResetArgs {
    /// Directory of the agent's pins, if one was given.
    #[must_use]
    pub fn bpffs_root(&self) -> Option<PathBuf> {
        self.places.bpffs_root.clone()
    }

    /// State directory of the agent.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.places.run()
    }

    /// Where the agent noted pods.
    #[must_use]
    pub fn pods(&self) -> handover::Places {
        handover::Places {
            cni_state_dir: self.places.cni(),
            host_local_dir: self.places.host_local(),
        }
    }
}

/// Ends the node's processes and pods and removes what they kept. `clean_up` removes the agent's traces from the kernel;
/// it runs when nothing of the node runs any more. Returns what to tell the user.
///
/// # Errors
/// When something cannot be removed; a second run goes on.
pub fn reset(args: &ResetArgs, clean_up: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<String> {
    need_root()?;
    if !args.force && !agreed()? {
        anyhow::bail!("aborted reset operation");
    }
    let places = &args.places;
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    eprintln!("[reset] stopping the node and its pods");
    runtime()?.block_on(async {
        daemon::stop(places, "node").await?;
        let (pods, logs) = (places.pods(), places.path("var/log/pods"));
        beeline_node::remove_pods(&pods, &logs, &places.cgroup()?, places.cri_socket.as_deref())
            .await
            .context("end the pods")?;
        daemon::stop(places, "control-plane").await
    })?;
    eprintln!("[reset] removing what the node set up in the kernel");
    clean_up()?;
    runtime()?
        .block_on(remove_devices())
        .context("remove the overlay")?;
    let mut text = String::from("[reset] deleted:");
    let paths = [
        places.admin_conf(),
        places.node_conf(),
        places.net_conf(),
        places.manifests(),
        places.control_plane(),
        places.cni(),
        places.pods(),
        places.path("var/log/beeline"),
        places.run(),
    ];
    for path in paths {
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        match removed {
            Ok(()) => text.push_str(&format!(" {}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
        }
    }
    text.push_str(
        "\n\nThe Node is still in the cluster, if that goes on: `kubectl delete node NAME` removes it.\n\
         Your kubeconfig files, such as $HOME/.kube/config, were not touched.\n",
    );
    Ok(text)
}

/// Other nodes are not reached any more: their routes go with the devices.
async fn remove_devices() -> anyhow::Result<()> {
    let netlink = Netlink::open()?;
    for link in netlink.snapshot().await?.links {
        if is_device(&link.name) {
            netlink.delete_link(link.index).await?;
        }
    }
    Ok(())
}

fn agreed() -> anyhow::Result<bool> {
    eprint!("[reset] Are you sure you want to proceed? [y/N]: ");
    let mut answer = String::new();
    std::io::stdin()
        .read_line(&mut answer)
        .context("read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
