//! Serves the API from a directory: `cargo run -p beeline-control-plane --example serve -- <directory> [address:port]`.

use beeline_control_plane::config::Config;
use beeline_control_plane::run;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .ok_or_else(|| anyhow::anyhow!("usage: serve <directory> [address:port]"))?;
    let mut config = Config::new(directory);
    if let Some(bind) = arguments.next() {
        config.bind = bind.parse()?;
    }
    println!("export KUBECONFIG={}", config.kubeconfig_path().display());
    run::run(config, async { drop(tokio::signal::ctrl_c().await) }).await
}
