//! What a node's agent may do: see where services and pods are, speak for itself and its own pods, and nothing else
//! (kube-apiserver `plugin/pkg/auth/authorizer/node`, `plugin/pkg/admission/noderestriction`).

use serde_json::Value;

use super::auth::{Ask, User};
use super::{Api, codec, write};
use crate::error::ApiError;
use crate::resource::ResourceInfo;

const MIRROR: &str = "kubernetes.io/config.mirror";
const LEASES: &str = "kube-node-lease";
/// Labels with this prefix are for administrators to tell nodes apart that must not choose so themselves.
const RESTRICTED: &str = "node-restriction.kubernetes.io/";

impl Api {
    /// Whether the node's agent may do that.
    pub(super) async fn node_may(&self, node: &str, ask: &Ask) -> Result<bool, ApiError> {
        let Ask::Resource {
            verb,
            group,
            resource,
            namespace,
            name,
        } = ask
        else {
            return Ok(false);
        };
        let reads = matches!(verb.as_str(), "get" | "list" | "watch");
        let writes = matches!(verb.as_str(), "update" | "patch");
        Ok(match (group.as_str(), resource.as_str()) {
            ("", "services" | "endpoints" | "namespaces" | "nodes" | "pods") if reads => true,
            ("discovery.k8s.io", "endpointslices") if reads => true,
            ("networking.k8s.io", "networkpolicies" | "servicecidrs" | "ipaddresses") if reads => true,
            // Which one is in the body.
            ("", "nodes" | "pods") if verb == "create" => true,
            ("", "nodes" | "nodes/status") if writes => name == node,
            ("", "pods/status") if writes => self.is_on(node, namespace, name).await?,
            ("", "pods") if verb == "delete" => self.is_on(node, namespace, name).await?,
            ("", "pods/eviction") if verb == "create" => self.is_on(node, namespace, name).await?,
            ("", "events") => matches!(verb.as_str(), "create" | "update" | "patch"),
            ("coordination.k8s.io", "leases") if namespace == LEASES => match verb.as_str() {
                "create" => true,
                "get" | "update" | "patch" | "delete" => name == node,
                _ => false,
            },
            ("", "secrets" | "configmaps") if reads && !name.is_empty() => {
                self.is_used_on(node, namespace, resource, name).await?
            }
            ("", "serviceaccounts") if verb == "get" => {
                self.is_used_on(node, namespace, "serviceaccounts", name).await?
            }
            ("", "serviceaccounts/token") if verb == "create" => {
                self.is_used_on(node, namespace, "serviceaccounts", name).await?
            }
            // Its own certificate again.
            ("certificates.k8s.io", "certificatesigningrequests") => verb == "create",
            ("authentication.k8s.io", "tokenreviews") | ("authorization.k8s.io", "subjectaccessreviews") => {
                verb == "create"
            }
            _ => false,
        })
    }

    /// Whether the pod is bound to the node.
    async fn is_on(&self, node: &str, namespace: &str, name: &str) -> Result<bool, ApiError> {
        let pods = write::collection("", "pods", namespace)?;
        let Some(stored) = self.find(&pods, name).await? else {
            // What is not there cannot be harmed; the answer is that it is not found.
            return Ok(true);
        };
        let pod = codec::decode(pods.resource, stored.revision, &stored.value)?;
        Ok(pod["spec"]["nodeName"] == node)
    }

    /// Whether a pod that is bound to the node refers to the object.
    async fn is_used_on(
        &self,
        node: &str,
        namespace: &str,
        resource: &str,
        name: &str,
    ) -> Result<bool, ApiError> {
        let pods = write::collection("", "pods", namespace)?;
        for item in self.items(&pods).await? {
            let pod = codec::decode(pods.resource, item.revision, &item.value)?;
            if pod["spec"]["nodeName"] == node && refers(&pod["spec"], resource, name) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether a pod's specification names the Secret, ConfigMap or ServiceAccount.
fn refers(spec: &Value, resource: &str, name: &str) -> bool {
    let items =
        |value: &Value, field: &str| -> Vec<Value> { value[field].as_array().cloned().unwrap_or_default() };
    if resource == "serviceaccounts" {
        return spec["serviceAccountName"] == name;
    }
    let secret = resource == "secrets";
    // Every pod may check who the API is.
    if !secret && name == "kube-root-ca.crt" {
        return true;
    }
    if secret
        && items(spec, "imagePullSecrets")
            .iter()
            .any(|item| item["name"] == name)
    {
        return true;
    }
    let in_volume = |volume: &Value| {
        let projected = items(&volume["projected"], "sources");
        if secret {
            volume["secret"]["secretName"] == name
                || projected.iter().any(|source| source["secret"]["name"] == name)
        } else {
            volume["configMap"]["name"] == name
                || projected.iter().any(|source| source["configMap"]["name"] == name)
        }
    };
    if items(spec, "volumes").iter().any(in_volume) {
        return true;
    }
    let (of_all, of_one) = if secret {
        ("secretRef", "secretKeyRef")
    } else {
        ("configMapRef", "configMapKeyRef")
    };
    ["containers", "initContainers", "ephemeralContainers"]
        .iter()
        .flat_map(|list| items(spec, list))
        .any(|container| {
            items(&container, "envFrom")
                .iter()
                .any(|from| from[of_all]["name"] == name)
                || items(&container, "env")
                    .iter()
                    .any(|env| env["valueFrom"][of_one]["name"] == name)
        })
}

/// Refuses an object that a node may not create.
pub(super) fn check_create(user: &User, r: &ResourceInfo, object: &Value) -> Result<(), ApiError> {
    let Some(node) = user.node() else { return Ok(()) };
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let refuse = |why: &str| Err(ApiError::forbidden(r, name, &format!("node {node:?} {why}")));
    match (r.group, r.kind) {
        ("", "Node") if name != node => refuse("is not allowed to create another node"),
        ("", "Node") if restricted_labels(object).next().is_some() => {
            refuse("is not allowed to set labels of its own node that administrators have reserved")
        }
        ("coordination.k8s.io", "Lease") if name != node => {
            refuse("can only create a lease with its own name")
        }
        ("", "Pod") if object["metadata"]["annotations"][MIRROR].is_null() => {
            refuse("can only create mirror pods")
        }
        ("", "Pod") if object["spec"]["nodeName"] != node => {
            refuse("can only create pods with spec.nodeName set to itself")
        }
        ("", "Pod") => {
            let spec = &object["spec"];
            let account = spec["serviceAccountName"].as_str().unwrap_or_default();
            let volumes = spec["volumes"].as_array().into_iter().flatten();
            let secret = volumes.into_iter().any(|volume| {
                ["secret", "configMap", "projected", "persistentVolumeClaim"]
                    .iter()
                    .any(|kind| !volume[kind].is_null())
            });
            if account.is_empty() && !secret {
                Ok(())
            } else {
                refuse("can not create pods that reference a service account, secrets or configmaps")
            }
        }
        _ => Ok(()),
    }
}

/// Refuses a change of an object that a node may not make.
pub(super) fn check_change(node: &str, r: &ResourceInfo, old: &Value, new: &Value) -> Result<(), ApiError> {
    let name = old["metadata"]["name"].as_str().unwrap_or_default();
    let refuse = |why: &str| Err(ApiError::forbidden(r, name, &format!("node {node:?} {why}")));
    if !r.is("", "Node") {
        return Ok(());
    }
    if old["spec"]["taints"] != new["spec"]["taints"] {
        return refuse("is not allowed to modify taints");
    }
    if old["metadata"]["ownerReferences"] != new["metadata"]["ownerReferences"] {
        return refuse("is not allowed to modify ownerReferences");
    }
    if !restricted_labels(old).eq(restricted_labels(new)) {
        return refuse("is not allowed to modify labels that administrators have reserved");
    }
    Ok(())
}

fn restricted_labels(node: &Value) -> impl Iterator<Item = (&String, &Value)> {
    node["metadata"]["labels"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| {
            key.split('/').next().is_some_and(|domain| {
                RESTRICTED.strip_suffix('/') == Some(domain)
                    || domain.ends_with(".node-restriction.kubernetes.io")
            })
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn references_of_a_pod() {
        let spec = json!({
            "serviceAccountName": "robot", "imagePullSecrets": [{"name": "pull"}],
            "volumes": [{"secret": {"secretName": "vol"}}, {"configMap": {"name": "cm"}},
                {"projected": {"sources": [{"secret": {"name": "proj"}}, {"configMap": {"name": "projcm"}}]}}],
            "containers": [{"envFrom": [{"secretRef": {"name": "all"}}],
                "env": [{"valueFrom": {"configMapKeyRef": {"name": "one", "key": "k"}}}]}],
        });
        for (resource, names) in [
            ("secrets", &["pull", "vol", "proj", "all"][..]),
            ("configmaps", &["cm", "projcm", "one", "kube-root-ca.crt"]),
            ("serviceaccounts", &["robot"]),
        ] {
            for name in names {
                assert!(refers(&spec, resource, name), "{resource} {name}");
            }
        }
        for (resource, name) in [
            ("secrets", "cm"),
            ("configmaps", "vol"),
            ("serviceaccounts", "default"),
        ] {
            assert!(!refers(&spec, resource, name), "{resource} {name}");
        }
    }
}
