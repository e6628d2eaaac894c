//! What every cluster has from the start: its namespaces, and the Service through which pods reach the API.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::delete::Options;
use super::route::Target;
use super::write::{How, collection};
use super::{Api, roles};
use crate::error::ApiError;

/// Where the API is.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// ClusterIP of the Service `default/kubernetes`: the first of the first service range.
    pub cluster_ip: Option<IpAddr>,
    /// The address that pods and nodes reach the API at, if there is one.
    pub advertised: Option<IpAddr>,
    /// The port that the API listens on.
    pub port: u16,
}

impl Api {
    /// Creates or corrects the namespaces and the Service `default/kubernetes` with its EndpointSlice.
    ///
    /// # Errors
    /// When the store fails, or another object is in the way.
    pub async fn bootstrap(&self, bootstrap: &Bootstrap) -> Result<(), ApiError> {
        let namespaces = collection("", "namespaces", "")?;
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            self.ensure(&namespaces, namespace, |_| false, |_| {}).await?;
        }
        self.ensure_roles().await?;
        let Some(cluster_ip) = bootstrap.cluster_ip else {
            return Ok(());
        };
        let services = collection("", "services", "default")?;
        let ports = json!([{"name": "https", "protocol": "TCP", "port": 443, "targetPort": bootstrap.port}]);
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {"type": "ClusterIP", "clusterIP": cluster_ip.to_string(), "ports": ports.clone()},
        });
        let differs = |old: &Value| old["spec"]["ports"] != ports;
        self.ensure(&services, service, differs, |old| {
            old["spec"]["ports"] = ports.clone();
        })
        .await?;
        self.ensure_slice(bootstrap).await
    }

    /// Creates or corrects the roles that every cluster has; what was added to them by hand goes, bindings stay as they are.
    async fn ensure_roles(&self) -> Result<(), ApiError> {
        let group = "rbac.authorization.k8s.io";
        let roles = collection(group, "clusterroles", "")?;
        for (name, rules) in roles::cluster_roles() {
            let rules = Value::from(rules);
            let role = roles::object("ClusterRole", name, &json!({"rules": rules}));
            let kept = |old: &Value| {
                old["metadata"]["annotations"]["rbac.authorization.kubernetes.io/autoupdate"] == "true"
            };
            let differs = |old: &Value| kept(old) && old["rules"] != rules;
            self.ensure(&roles, role, differs, |old| old["rules"] = rules.clone())
                .await?;
        }
        let bindings = collection(group, "clusterrolebindings", "")?;
        for (name, role, subjects) in roles::BINDINGS {
            let subjects: Vec<Value> = subjects
                .iter()
                .map(|(kind, name)| json!({"kind": kind, "apiGroup": group, "name": name}))
                .collect();
            let role = json!({"apiGroup": group, "kind": "ClusterRole", "name": role});
            let binding = roles::object(
                "ClusterRoleBinding",
                name,
                &json!({"roleRef": role, "subjects": subjects}),
            );
            self.ensure(&bindings, binding, |_| false, |_| {}).await?;
        }
        Ok(())
    }

    async fn ensure_slice(&self, bootstrap: &Bootstrap) -> Result<(), ApiError> {
        let slices = collection("discovery.k8s.io", "endpointslices", "default")?;
        let family = |ip: IpAddr| if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        let stale = match (self.find(&slices, "kubernetes").await?, bootstrap.advertised) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(old), Some(ip)) => {
                // The address type cannot be changed.
                let old = super::codec::decode(slices.resource, old.revision, &old.value)?;
                old["addressType"] != family(ip)
            }
        };
        if stale {
            self.remove(&slices, "kubernetes", &Options::now()).await?;
        }
        // An API that only this machine can reach has no address that pods could use.
        let Some(ip) = bootstrap.advertised else {
            return Ok(());
        };
        let endpoints = json!([{"addresses": [ip.to_string()], "conditions": {"ready": true}}]);
        let ports = json!([{"name": "https", "protocol": "TCP", "port": bootstrap.port}]);
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": family(ip),
            "endpoints": endpoints.clone(),
            "ports": ports.clone(),
        });
        // For those who read the older form; not to be made into another slice.
        let subsets = json!([{"addresses": [{"ip": ip.to_string()}], "ports": ports.clone()}]);
        let older = json!({
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {"name": "kubernetes", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": subsets.clone(),
        });
        let stale = |old: &Value| old["subsets"] != subsets;
        let renew = |old: &mut Value| old["subsets"] = subsets.clone();
        self.ensure(&collection("", "endpoints", "default")?, older, stale, renew)
            .await?;
        let differs = |old: &Value| old["endpoints"] != endpoints || old["ports"] != ports;
        let correct = |old: &mut Value| {
            old["endpoints"] = endpoints.clone();
            old["ports"] = ports.clone();
        };
        self.ensure(&slices, slice, differs, correct).await
    }

    /// Creates `object`, or corrects what is there if it `differs`.
    async fn ensure(
        &self,
        target: &Target,
        object: Value,
        differs: impl Fn(&Value) -> bool,
        correct: impl Fn(&mut Value),
    ) -> Result<(), ApiError> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let how = How::default();
        // Not "create, else change": creating the Service again fails because its address is taken, by itself.
        if self.find(target, &name).await?.is_none() {
            return self.insert(target, object, &how, &mut Vec::new()).await.map(drop);
        }
        let make = |old: &Value| {
            let mut new = old.clone();
            if differs(old) {
                correct(&mut new);
            }
            Ok(new)
        };
        self.change(target, &name, None, &how, &mut Vec::new(), make)
            .await
            .map(drop)
    }
}
