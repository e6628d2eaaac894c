//! `cargo xtask bench`: figures against the targets in docs/benchmarks.md; exit code 1 when one is missed.

mod churn;
mod connect;
mod control_plane;
mod figures;
mod maps;
mod memory;
mod mock_api;
mod node_port;
mod nodes;
mod overlay;
mod packet;
mod population;
mod program;
mod restart;
mod rules;
mod wire;

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use figures::Figures;
use wire::Block;

#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    about = "Measure, and compare with the targets",
    disable_help_subcommand = true
)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// One line per figure: {"name","value","unit","target","ok"}
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum What {
    /// Connect + request + response + close: through a ClusterIP against the same pod by its own address
    Connect(connect::Options),
    /// From another host through a node port: against the pod by its own address, and against kube-proxy's rules
    NodePort(node_port::Options),
    /// From objects to maps: all services at once, and one endpoint change
    Program(program::Options),
    /// Resident memory of the agent
    Memory,
    /// Time of the packet programs per packet
    Packet,
    /// CPU time of the agent while endpoints change
    Churn,
    /// From the Nodes of a large cluster to routes
    Nodes,
    /// Pod to pod across nodes, against the kernel's own forwarding
    Overlay(overlay::Options),
    /// The control plane: start, lists, writes, watches, scheduling
    ControlPlane,
    /// What clients notice while the agent is killed and started again
    Restart(restart::Options),
    /// All of them
    All,
    /// The server that benches start in a pod
    #[command(hide = true)]
    Server {
        #[arg(long)]
        port: u16,
    },
    /// The client that benches start
    #[command(hide = true)]
    Client {
        #[arg(long)]
        direct: SocketAddr,
        #[arg(long)]
        service: SocketAddr,
        #[arg(long)]
        pairs: usize,
        #[arg(long, default_value_t = 0)]
        connections: u32,
        /// Of one connection, instead of many
        #[arg(long)]
        megabytes: Option<u32>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            beeline_tests::signals::leave_to_clean_up();
            eprintln!("bench failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every target was met.
fn run(args: &Args) -> Result<bool> {
    let mut figures = Figures::new(args.json);
    match &args.what {
        What::Server { port } => return wire::serve(*port).map(|()| true),
        What::Client {
            direct,
            service,
            pairs,
            connections,
            megabytes,
        } => {
            let block = megabytes.map_or(Block::Connections(*connections), Block::Megabytes);
            return wire::compare(*direct, *service, *pairs, block).map(|()| true);
        }
        What::Connect(options) => connect::run(options, &mut figures)?,
        What::NodePort(options) => node_port::run(options, &mut figures)?,
        What::Program(options) => program::run(options, &mut figures)?,
        What::Memory => memory::run(&mut figures)?,
        What::Packet => packet::run(&mut figures)?,
        What::Churn => churn::run(&mut figures)?,
        What::Nodes => nodes::run(&mut figures)?,
        What::ControlPlane => control_plane::run(&mut figures)?,
        What::Overlay(options) => overlay::run(options, &mut figures)?,
        What::Restart(options) => restart::run(options, &mut figures)?,
        What::All => {
            connect::run(&connect::Options::default(), &mut figures)?;
            node_port::run(&node_port::Options::default(), &mut figures)?;
            program::run(&program::Options::default(), &mut figures)?;
            memory::run(&mut figures)?;
            packet::run(&mut figures)?;
            churn::run(&mut figures)?;
            nodes::run(&mut figures)?;
            control_plane::run(&mut figures)?;
            overlay::run(&overlay::Options::default(), &mut figures)?;
            restart::run(&restart::Options::default(), &mut figures)?;
        }
    }
    figures.finish();
    Ok(figures.all_ok())
}
