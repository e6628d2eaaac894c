//! `beeline control-plane`: runs it, or saves what it keeps and puts it back.

use std::path::PathBuf;

use beeline_control_plane::backup;
use beeline_control_plane::config::Config;
use clap::{Args, Subcommand};

use super::{show, single_thread, stop_signal};

/// `beeline control-plane` with its flags, or with a subcommand.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct ControlPlaneCommand {
    #[command(subcommand)]
    command: Option<ControlPlaneSubcommand>,
    #[command(flatten)]
    config: Config,
}

#[derive(Debug, Subcommand)]
enum ControlPlaneSubcommand {
    /// Save everything that a running control plane keeps into a new file, Secrets included; keys and certificates are files
    /// in pki/ of its data directory
    Backup {
        /// Where to
        file: PathBuf,
        /// Credentials of an administrator
        #[arg(long, env = "KUBECONFIG", default_value = "/etc/beeline/admin.conf")]
        kubeconfig: PathBuf,
    },
    /// Fill the empty data directory of a control plane that does not run yet from such a file
    Restore {
        /// Where from
        file: PathBuf,
        /// The data directory
        #[arg(long, default_value = "/var/lib/beeline/control-plane")]
        data_dir: PathBuf,
    },
}

/// Runs until it is told to stop, or does what the subcommand says.
pub(super) fn run(command: ControlPlaneCommand) -> anyhow::Result<()> {
    match command.command {
        None => tokio::runtime::Runtime::new()?
            .block_on(async { beeline_control_plane::run::run(command.config, stop_signal()?).await }),
        Some(ControlPlaneSubcommand::Backup { file, kubeconfig }) => {
            let count = single_thread()?.block_on(backup::save(&kubeconfig, &file))?;
            show::print(&format!("saved {count} keys in {}\n", file.display()))
        }
        Some(ControlPlaneSubcommand::Restore { file, data_dir }) => {
            let count = backup::restore(&file, &data_dir)?;
            show::print(&format!("restored {count} keys into {}\n", data_dir.display()))
        }
    }
}
