//! What every cluster has from the start: its namespaces, and the Service through which pods reach the API.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::delete::Options;
use super::members::{Members, Places, agree};
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
    /// ClusterIP of the Service `kube-system/kube-dns`, and where it is served.
    pub dns: Option<(IpAddr, SocketAddr)>,
}

/// A Service without selector, and where it is served.
struct Served<'a> {
    namespace: &'a str,
    name: &'a str,
    labels: Value,
    cluster_ip: IpAddr,
    /// As in an EndpointSlice: with the port at which it is served.
    ports: Value,
    /// Ports of the Service, in the same order.
    service_ports: &'a [u16],
    /// Of one family; none if pods cannot reach it.
    at: Vec<IpAddr>,
}

impl Api {
    /// Creates or corrects the namespaces, the roles, and the Services that lead to the control planes.
    ///
    /// # Errors
    /// When the store fails, or another object is in the way.
    pub async fn bootstrap(&self, members: &mut Members) -> Result<(), ApiError> {
        let namespaces = collection("", "namespaces", "")?;
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            self.ensure(&namespaces, namespace, |_| false, |_| {}).await?;
        }
        self.ensure_roles().await?;
        self.ensure_services(members).await
    }

    /// Creates or corrects the Services that lead to the control planes, those that are there now.
    pub(super) async fn ensure_services(&self, members: &mut Members) -> Result<(), ApiError> {
        let places = self.places(members).await?;
        self.ensure_places(&members.bootstrap, &places).await
    }

    /// The same for these places.
    pub(super) async fn ensure_places(&self, bootstrap: &Bootstrap, places: &Places) -> Result<(), ApiError> {
        if let Some(cluster_ip) = bootstrap.cluster_ip {
            // An API that only its own machine can reach has no address that pods could use.
            let (port, at) = agree(&places.api).unwrap_or((bootstrap.port, Vec::new()));
            let ports = json!([{"name": "https", "protocol": "TCP", "port": port}]);
            self.ensure_endpoints(&at, &ports).await?;
            self.ensure_service(&Served {
                namespace: "default",
                name: "kubernetes",
                labels: json!({"component": "apiserver", "provider": "kubernetes"}),
                cluster_ip,
                ports,
                service_ports: &[443],
                at,
            })
            .await?;
        }
        if let Some((cluster_ip, own)) = bootstrap.dns {
            let (port, at) = agree(&places.dns).unwrap_or((own.port(), Vec::new()));
            self.ensure_service(&Served {
                namespace: "kube-system",
                name: "kube-dns",
                labels: json!({
                    "k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "Beeline",
                }),
                cluster_ip,
                ports: json!([
                    {"name": "dns", "protocol": "UDP", "port": port},
                    {"name": "dns-tcp", "protocol": "TCP", "port": port},
                ]),
                service_ports: &[53, 53],
                at,
            })
            .await?;
        }
        Ok(())
    }

    /// Creates or corrects a Service with its EndpointSlice.
    async fn ensure_service(&self, served: &Served<'_>) -> Result<(), ApiError> {
        let services = collection("", "services", served.namespace)?;
        let ports: Vec<Value> = served
            .ports
            .as_array()
            .into_iter()
            .flatten()
            .zip(served.service_ports)
            .map(|(port, number)| {
                json!({"name": port["name"], "protocol": port["protocol"], "port": number, "targetPort": port["port"]})
            })
            .collect();
        let ports = Value::from(ports);
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": served.name, "labels": served.labels},
            "spec": {"type": "ClusterIP", "clusterIP": served.cluster_ip.to_string(), "ports": ports.clone()},
        });
        let differs = |old: &Value| old["spec"]["ports"] != ports;
        self.ensure(&services, service, differs, |old| {
            old["spec"]["ports"] = ports.clone();
        })
        .await?;
        self.ensure_slice(served).await
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

    async fn ensure_slice(&self, served: &Served<'_>) -> Result<(), ApiError> {
        let slices = collection("discovery.k8s.io", "endpointslices", served.namespace)?;
        let family = |ip: IpAddr| if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        let first = served.at.first().copied();
        let stale = match (self.find(&slices, served.name).await?, first) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(old), Some(ip)) => {
                // The address type cannot be changed.
                let old = super::codec::decode(slices.resource, old.revision, &old.value)?;
                old["addressType"] != family(ip)
            }
        };
        if stale {
            self.remove(&slices, served.name, &Options::now()).await?;
        }
        let Some(ip) = first else {
            return Ok(());
        };
        let endpoint = |ip: &IpAddr| json!({"addresses": [ip.to_string()], "conditions": {"ready": true}});
        let endpoints: Value = served.at.iter().map(endpoint).collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": served.name, "labels": {"kubernetes.io/service-name": served.name}},
            "addressType": family(ip),
            "endpoints": endpoints.clone(),
            "ports": served.ports.clone(),
        });
        let differs = |old: &Value| old["endpoints"] != endpoints || old["ports"] != served.ports;
        let correct = |old: &mut Value| {
            old["endpoints"] = endpoints.clone();
            old["ports"] = served.ports.clone();
        };
        self.ensure(&slices, slice, differs, correct).await
    }

    /// Creates or corrects the older form of the API's slice.
    async fn ensure_endpoints(&self, at: &[IpAddr], ports: &Value) -> Result<(), ApiError> {
        if at.is_empty() {
            return Ok(());
        }
        let addresses: Value = at.iter().map(|ip| json!({"ip": ip.to_string()})).collect();
        let subsets = json!([{"addresses": addresses, "ports": ports.clone()}]);
        // Not to be made into another slice.
        let older = json!({
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {"name": "kubernetes", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": subsets.clone(),
        });
        let stale = |old: &Value| old["subsets"] != subsets;
        let renew = |old: &mut Value| old["subsets"] = subsets.clone();
        self.ensure(&collection("", "endpoints", "default")?, older, stale, renew)
            .await
    }

    /// Creates `object`, or corrects what is there if it `differs`.
    pub(super) async fn ensure(
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
