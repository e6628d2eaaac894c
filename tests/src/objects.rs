//! Kubernetes objects as an API would hand them out, and a directory of them for agents without an API.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cluster::{ECHO_PORT, Pod};

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

/// A directory of objects that an agent watches.
#[derive(Debug)]
pub struct ObjectDir {
    path: PathBuf,
}

impl ObjectDir {
    /// Makes the directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
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
