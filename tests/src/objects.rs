//! Kubernetes objects as an API would hand them out, and a directory of them for agents without an API.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::agent::usable_backends;
use crate::cluster::{ECHO_PORT, Node, Pod};
use crate::wait_for;

/// A Service with one TCP port (`web`, 80) and one UDP port (`dns`, 53), both served at the pods' echo port.
#[must_use]
pub fn service(name: &str, cluster_ips: &[&str]) -> Value {
    let families: Vec<&str> = cluster_ips
        .iter()
        .map(|ip| if ip.contains(':') { "IPv6" } else { "IPv4" })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ips.first(), "clusterIPs": cluster_ips,
            "ipFamilies": families,
            "ipFamilyPolicy": if families.len() > 1 { "RequireDualStack" } else { "SingleStack" },
            "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "selector": {"app": name},
            "ports": [
                {"name": "web", "protocol": "TCP", "port": 80, "targetPort": ECHO_PORT},
                {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": ECHO_PORT},
            ],
        },
    })
}

/// An EndpointSlice of a service made by [`service`], named `<service>-<suffix>`; all addresses of one family.
#[must_use]
pub fn slice(service: &str, suffix: &str, addresses: &[IpAddr]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|ip| endpoint(&ip.to_string())).collect();
    let family = if addresses.iter().any(IpAddr::is_ipv6) {
        "IPv6"
    } else {
        "IPv4"
    };
    slice_of(service, suffix, family, &endpoints)
}

/// The same from ready-made endpoints.
#[must_use]
pub fn slice_of(service: &str, suffix: &str, family: &str, endpoints: &[Value]) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{suffix}"), "namespace": "default",
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": [
            {"name": "web", "protocol": "TCP", "port": ECHO_PORT},
            {"name": "dns", "protocol": "UDP", "port": ECHO_PORT},
        ],
    })
}

/// A ready endpoint.
#[must_use]
pub fn endpoint(address: &str) -> Value {
    json!({"addresses": [address], "conditions": {"ready": true, "serving": true, "terminating": false}})
}

/// The ClusterIP of a service whose only backend says how far an agent is: see [`ObjectDir::settle`].
const MARKER: Ipv4Addr = Ipv4Addr::new(10, 96, 255, 254);

/// A directory of objects that agents watch.
#[derive(Debug)]
pub struct ObjectDir {
    path: PathBuf,
    marks: AtomicU16,
}

impl ObjectDir {
    /// Makes the directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self {
            path,
            marks: AtomicU16::new(0),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `<file>.json` (a list of JSON documents is a YAML stream, too) in one step: a reader sees the old
    /// objects or the new ones.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, file: &str, objects: &[Value]) -> Result<()> {
        let text: Vec<String> = objects.iter().map(|object| format!("---\n{object}\n")).collect();
        self.put_text(file, &text.concat())
    }

    /// Writes `<file>.yaml` as it is given.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_text(&self, file: &str, text: &str) -> Result<()> {
        // Not in the directory itself, where the half-written file would be seen.
        let staged = self.path.with_extension("staged");
        fs::write(&staged, text).with_context(|| format!("cannot write {}", staged.display()))?;
        let to = self.path.join(format!("{file}.yaml"));
        fs::rename(&staged, &to).with_context(|| format!("cannot write {}", to.display()))
    }

    /// Removes `<file>.yaml`.
    ///
    /// # Errors
    /// When it is not there.
    pub fn remove(&self, file: &str) -> Result<()> {
        let file = self.path.join(format!("{file}.yaml"));
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
    }

    /// Waits until the agents of all these nodes have programmed Services and endpoint slices as the directory has them now.
    /// What the agents do beside that (node addresses, ranges of service addresses, stale flows) may still be under way.
    ///
    /// # Errors
    /// When one of them has not within 20 s.
    pub fn settle<'a>(&self, nodes: impl IntoIterator<Item = &'a Node>) -> Result<()> {
        // The agent reads changed files in the order of their changes, or all of them by name, where this one is first; it
        // takes the endpoint slices in last of all, and answers when it has programmed them.
        let [high, low] = self.marks.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mark = IpAddr::from([198, 18, high, low]);
        self.put(
            ".applied",
            &[
                service("applied", &[&MARKER.to_string()]),
                slice("applied", "v4", &[mark]),
            ],
        )?;
        let frontend = SocketAddr::new(MARKER.into(), 80);
        for node in nodes {
            let what = format!("the agent of {} to apply the objects", node.name());
            wait_for(&what, Duration::from_secs(20), || {
                let found = usable_backends(node, frontend)?;
                Ok((found == [SocketAddr::new(mark, ECHO_PORT)]).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Writes a dual-stack service with these pods behind it, as file `<name>.yaml`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_service(&self, name: &str, cluster_ips: &[&str], pods: &[&Pod]) -> Result<()> {
        let [v4, v6]: [Vec<IpAddr>; 2] = [
            pods.iter().map(|pod| pod.v4().into()).collect(),
            pods.iter().map(|pod| pod.v6().into()).collect(),
        ];
        let mut objects = vec![service(name, cluster_ips)];
        if cluster_ips.iter().any(|ip| !ip.contains(':')) {
            objects.push(slice(name, "v4", &v4));
        }
        if cluster_ips.iter().any(|ip| ip.contains(':')) {
            objects.push(slice_of(
                name,
                "v6",
                "IPv6",
                &v6.iter().map(|ip| endpoint(&ip.to_string())).collect::<Vec<_>>(),
            ));
        }
        self.put(name, &objects)
    }
}
