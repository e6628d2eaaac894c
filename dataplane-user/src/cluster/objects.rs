//! What `init` puts into a new cluster so that nodes can join it: kubeadm's names where kubeadm has it.

use anyhow::Context as _;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::{Value, json};

use super::MANAGER;

/// Group of those who join.
pub(super) const JOINERS: &str = "system:bootstrappers:kubeadm:default-node-token";
/// ConfigMap of `kube-system` with what a node has to know.
pub(super) const NODE_CONFIG: &str = "beeline-node-config";

/// What all nodes have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeConfig {
    /// Text of flannel's net-conf.json.
    pub(super) network: String,
    pub(super) domain: String,
    pub(super) dns: Vec<String>,
}

impl NodeConfig {
    pub(super) fn data(&self) -> Value {
        json!({"net-conf.json": self.network, "clusterDomain": self.domain, "clusterDNS": self.dns.join(",")})
    }

    /// Back from the ConfigMap.
    pub(super) fn read(data: &std::collections::BTreeMap<String, String>) -> anyhow::Result<Self> {
        let field = |name: &str| {
            data.get(name)
                .cloned()
                .with_context(|| format!("ConfigMap kube-system/{NODE_CONFIG} has no {name}"))
        };
        let dns = field("clusterDNS")?;
        Ok(Self {
            network: field("net-conf.json")?,
            domain: field("clusterDomain")?,
            dns: dns
                .split(',')
                .filter(|ip| !ip.is_empty())
                .map(str::to_owned)
                .collect(),
        })
    }
}

fn binding(kind: &str, namespace: &str, name: &str, role: (&str, &str), subject: (&str, &str)) -> Value {
    let group = "rbac.authorization.k8s.io";
    json!({
        "apiVersion": format!("{group}/v1"), "kind": kind, "metadata": {"name": name, "namespace": namespace},
        "roleRef": {"apiGroup": group, "kind": role.0, "name": role.1},
        "subjects": [{"apiGroup": group, "kind": subject.0, "name": subject.1}],
    })
}

fn reader(namespace: &str, name: &str, config_map: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": {"name": name, "namespace": namespace},
        "rules": [{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [config_map], "verbs": ["get"]}],
    })
}

/// The objects. `ca` is the authority's certificate, PEM.
pub(super) fn all(server: &str, ca: &str, config: &NodeConfig) -> Vec<Value> {
    use base64::Engine as _;
    let ca = base64::engine::general_purpose::STANDARD.encode(ca);
    // A kubeconfig without a user, as kubeadm's: who joins learns the authority from it, and checks it by its hash.
    let info = format!(
        "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca}\n    server: {server}\n  name: \"\"\n\
         contexts: null\ncurrent-context: \"\"\nkind: Config\npreferences: {{}}\nusers: null\n"
    );
    let info_role = "kubeadm:bootstrap-signer-clusterinfo";
    let config_role = "beeline:node-config";
    let map = |namespace: &str, name: &str, data: Value| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": data});
    vec![
        map("kube-public", "cluster-info", json!({"kubeconfig": info})),
        reader("kube-public", info_role, "cluster-info"),
        binding(
            "RoleBinding",
            "kube-public",
            info_role,
            ("Role", info_role),
            ("User", "system:anonymous"),
        ),
        map("kube-system", NODE_CONFIG, config.data()),
        reader("kube-system", config_role, NODE_CONFIG),
        binding(
            "RoleBinding",
            "kube-system",
            config_role,
            ("Role", config_role),
            ("Group", JOINERS),
        ),
        binding(
            "ClusterRoleBinding",
            "",
            "kubeadm:kubelet-bootstrap",
            ("ClusterRole", "system:node-bootstrapper"),
            ("Group", JOINERS),
        ),
    ]
}

/// Creates the object, or makes what is there like it.
pub(super) async fn apply(client: &Client, object: &Value) -> anyhow::Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let (group, version) = version.rsplit_once('/').unwrap_or(("", version.as_str()));
    let plural = format!("{}s", kind.to_ascii_lowercase());
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, &kind), &plural);
    let (namespace, name) = (
        text(&object["metadata"]["namespace"]),
        text(&object["metadata"]["name"]),
    );
    let api: Api<DynamicObject> = if namespace.is_empty() {
        Api::all_with(client.clone(), &resource)
    } else {
        Api::namespaced_with(client.clone(), &namespace, &resource)
    };
    api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(object))
        .await
        .with_context(|| format!("apply {kind} {name}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_has_to_know_goes_there_and_back() {
        let config = NodeConfig {
            network: "{}".into(),
            domain: "cluster.local".into(),
            dns: vec!["10.96.0.10".into()],
        };
        let data = serde_json::from_value(config.data()).unwrap();
        assert_eq!(NodeConfig::read(&data).unwrap(), config);
        assert!(NodeConfig::read(&Default::default()).is_err());
    }

    #[test]
    fn joiners_read_one_config_map_and_nothing_else() {
        let config = NodeConfig {
            network: String::new(),
            domain: String::new(),
            dns: Vec::new(),
        };
        for object in all("https://x", "ca", &config) {
            for rule in object["rules"].as_array().into_iter().flatten() {
                assert_eq!(rule["verbs"], json!(["get"]));
                assert_eq!(rule["resourceNames"].as_array().unwrap().len(), 1);
            }
        }
    }
}
