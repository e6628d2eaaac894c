//! ConfigMaps and Secrets that pods use.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client};

use crate::runtime::Failure;

/// Keys and values of an object.
pub(super) type Data = BTreeMap<String, Vec<u8>>;

/// What the objects of a namespace hold.
pub(super) struct Sources<'a> {
    pub(super) client: &'a Client,
    pub(super) namespace: &'a str,
}

pub(super) fn unusable(message: impl Into<String>) -> Failure {
    Failure::new("CreateContainerConfigError", message)
}

impl Sources<'_> {
    /// What a ConfigMap holds, text and bytes; nothing if it is not there and may be missing.
    pub(super) async fn config_map(
        &self,
        name: &str,
        optional: Option<bool>,
    ) -> Result<Option<Data>, Failure> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), self.namespace);
        let found = api.get_opt(name).await;
        let data = |map: ConfigMap| {
            let text = map.data.unwrap_or_default().into_iter();
            let bytes = map.binary_data.unwrap_or_default().into_iter();
            text.map(|(key, value)| (key, value.into_bytes()))
                .chain(bytes.map(|(key, value)| (key, value.0)))
                .collect()
        };
        there(found.map(|map| map.map(data)), optional, "configmap", name)
    }

    /// What a Secret holds; nothing if it is not there and may be missing.
    pub(super) async fn secret(&self, name: &str, optional: Option<bool>) -> Result<Option<Data>, Failure> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), self.namespace);
        let found = api.get_opt(name).await;
        let data = |secret: Secret| {
            let data = secret.data.unwrap_or_default().into_iter();
            data.map(|(key, value)| (key, value.0)).collect()
        };
        there(found.map(|secret| secret.map(data)), optional, "secret", name)
    }
}

fn there(
    found: Result<Option<Data>, kube::Error>,
    optional: Option<bool>,
    kind: &str,
    name: &str,
) -> Result<Option<Data>, Failure> {
    match found.map_err(|error| unusable(format!("{kind} {name:?}: {error}")))? {
        None if optional != Some(true) => Err(unusable(format!("{kind} {name:?} not found"))),
        found => Ok(found),
    }
}
