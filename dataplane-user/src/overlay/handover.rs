//! What flannel needs to know, and to be rid of, when it takes a node over again.
//!
//! The devices, routes and pods of the pod network stay, so that traffic goes on: flannel finds its own shape. What it would
//! not understand goes, and addresses of pods that still run are noted where `host-local` looks.

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use beeline_cni::protocol::DEFAULT_STATE_DIR;
use clap::Args;
use ipnet::IpNet;

use super::bridge;
use super::diff::{Changes, Op};
use super::flags::HOST_LOCAL_DIR;
use super::netlink::Netlink;
use super::plan::UNREACHABLE_METRIC;
use super::snapshot::{RouteKind, Snapshot};
use crate::cni::device;
use crate::cni::store::{Attachment, Store};
use crate::persist::Faults;

/// Where pods are noted.
#[derive(Clone, Debug, Args)]
pub struct Places {
    /// Where the agent kept attachments of pods
    #[arg(long, default_value = DEFAULT_STATE_DIR)]
    pub cni_state_dir: PathBuf,
    /// Where the host-local plugin keeps addresses: those of Beeline's pods that still run are noted there
    #[arg(long, default_value = HOST_LOCAL_DIR)]
    pub host_local_dir: PathBuf,
}

/// Makes the node as flannel takes it, in the network namespace of the calling thread. May be repeated: addresses of pods
/// that have gone since are taken back. Gives what was done.
///
/// # Errors
///
/// When files cannot be read or written, or the kernel refuses.
pub fn hand_over(places: &Places) -> io::Result<Vec<String>> {
    let mut done = Vec::new();
    let attachments = places.cni_state_dir.join("attachments");
    if attachments.exists() {
        let store = Store::open(attachments, Faults::default())?;
        let devices = device::all()?;
        for attachment in store.all().values() {
            let Some(device) = &attachment.device else {
                continue;
            };
            let runs = devices.contains_key(&device.name);
            for ip in &attachment.ips {
                done.extend(note(&places.host_local_dir, *ip, attachment, runs)?);
            }
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    done.extend(runtime.block_on(clean_routes())?);
    Ok(done)
}

/// As host-local: a file by the address's name with the container's id and the interface.
fn note(dir: &Path, ip: IpAddr, attachment: &Attachment, runs: bool) -> io::Result<Option<String>> {
    let path = dir.join(ip.to_string());
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let content = format!("{}\r\n{}", attachment.key.container_id, attachment.key.ifname);
    if !runs {
        return match fs::read_to_string(&path) {
            Ok(text) if text == content => {
                fs::remove_file(&path).map_err(failed)?;
                Ok(Some(path.display().to_string()))
            }
            _ => Ok(None),
        };
    }
    if !dir.is_dir() {
        return Ok(None);
    }
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path);
    match file {
        Ok(mut file) => file.write_all(content.as_bytes()).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    Ok(None)
}

async fn clean_routes() -> io::Result<Vec<String>> {
    let netlink = Netlink::open()?;
    let kernel = netlink.snapshot().await.map_err(io::Error::other)?;
    let ops = removals(&kernel);
    let done = ops.iter().map(ToString::to_string).collect();
    let changes = Changes { steps: vec![ops] };
    match netlink.apply(&changes).await.into_iter().next() {
        Some(error) => Err(io::Error::new(error.cause.kind(), error.to_string())),
        None => Ok(done),
    }
}

/// Routes that refuse addresses that no pod has, and what bridges answer for pods that are gone.
fn removals(kernel: &Snapshot) -> Vec<Op> {
    let ours = |route: &&super::snapshot::Route| {
        route.boot && route.kind == RouteKind::Unreachable && route.metric == UNREACHABLE_METRIC
    };
    let refused: Vec<_> = kernel.routes.iter().filter(ours).collect();
    let subnets: Vec<IpNet> = refused.iter().map(|route| route.dst).collect();
    let stale = bridge::proxies(kernel, &bridge::find(kernel, &subnets));
    let stale = stale.into_iter().filter(|op| matches!(op, Op::DeleteProxy(..)));
    let routes = refused
        .iter()
        .map(|route| Op::DeleteRoute(Box::new((*route).clone())));
    stale.chain(routes).collect()
}

#[cfg(test)]
mod tests {
    use beeline_cni::protocol::Key;

    use super::*;

    #[test]
    fn pods_that_run_are_noted_as_host_local_does_and_taken_back_later() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key {
            network: "n".into(),
            container_id: "c1".into(),
            ifname: "eth0".into(),
        };
        let attachment = Attachment::new(key);
        let (ours, others): (IpAddr, IpAddr) = ("10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap());
        let read = |ip: IpAddr| fs::read_to_string(dir.path().join(ip.to_string()));
        fs::write(dir.path().join(others.to_string()), "c2\r\neth0").unwrap();
        for ip in [ours, others] {
            note(dir.path(), ip, &attachment, true).unwrap();
        }
        assert_eq!(read(ours).unwrap(), "c1\r\neth0");
        assert_eq!(read(others).unwrap(), "c2\r\neth0");
        for ip in [ours, others] {
            note(dir.path(), ip, &attachment, false).unwrap();
        }
        assert!(read(ours).is_err());
        assert_eq!(read(others).unwrap(), "c2\r\neth0", "another's is left alone");
        // a node that never had host-local
        let none = dir.path().join("none");
        assert_eq!(note(&none, ours, &attachment, true).unwrap(), None);
        assert!(!none.exists());
    }
}
