//! What is in volumes that come from the API.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    DownwardAPIVolumeFile, KeyToPath, Pod, ServiceAccount, ServiceAccountTokenProjection, Volume,
};
use kube::api::PostParams;
use kube::{Api, ResourceExt as _};
use tokio::time::{Duration, Instant};

use super::files::{File, Files};
use crate::pods::env::{self, Facts};
use crate::pods::sources::{Data, Sources, unusable};
use crate::runtime::Failure;

/// A token lives so long unless the pod says otherwise, seconds.
const LIFE: i64 = 3600;
/// A token is renewed after this time at the latest.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A service account's token that has been asked for.
pub(super) struct Token {
    text: String,
    renew: Instant,
}

pub(super) struct Content<'a> {
    sources: &'a Sources<'a>,
    pod: &'a Pod,
    volume: &'a str,
    tokens: &'a mut HashMap<(String, String), Token>,
}

impl<'a> Content<'a> {
    pub(super) fn new(
        sources: &'a Sources<'a>,
        pod: &'a Pod,
        volume: &'a str,
        tokens: &'a mut HashMap<(String, String), Token>,
    ) -> Self {
        Self {
            sources,
            pod,
            volume,
            tokens,
        }
    }

    /// The files of a volume.
    ///
    /// # Errors
    /// When something that it needs is not there, or it is of a kind that this node does not have.
    pub(super) async fn of(&mut self, volume: &Volume) -> Result<Files, Failure> {
        let mut files = Files::new();
        if let Some(of) = &volume.config_map {
            let data = self.sources.config_map(&of.name, of.optional).await?;
            let what = format!("configmap {:?}", of.name);
            keys(
                &mut files,
                data,
                of.items.as_deref(),
                of.default_mode,
                of.optional,
                &what,
            )?;
        } else if let Some(of) = &volume.secret {
            let name = of.secret_name.as_deref().unwrap_or_default();
            let data = self.sources.secret(name, of.optional).await?;
            let what = format!("secret {name:?}");
            keys(
                &mut files,
                data,
                of.items.as_deref(),
                of.default_mode,
                of.optional,
                &what,
            )?;
        } else if let Some(of) = &volume.downward_api {
            self.fields(&mut files, of.items.as_deref(), of.default_mode)?;
        } else if let Some(of) = &volume.projected {
            let mode = of.default_mode;
            for source in of.sources.iter().flatten() {
                if let Some(of) = &source.config_map {
                    let data = self.sources.config_map(&of.name, of.optional).await?;
                    let what = format!("configmap {:?}", of.name);
                    keys(&mut files, data, of.items.as_deref(), mode, of.optional, &what)?;
                } else if let Some(of) = &source.secret {
                    let data = self.sources.secret(&of.name, of.optional).await?;
                    let what = format!("secret {:?}", of.name);
                    keys(&mut files, data, of.items.as_deref(), mode, of.optional, &what)?;
                } else if let Some(of) = &source.downward_api {
                    self.fields(&mut files, of.items.as_deref(), mode)?;
                } else if let Some(of) = &source.service_account_token {
                    let text = self.token(of).await?;
                    put(&mut files, &of.path, text.into_bytes(), mode)?;
                } else {
                    return Err(unusable(
                        "a projected source of a kind that this node does not have",
                    ));
                }
            }
        } else {
            return Err(unusable("a volume of a kind that this node does not have"));
        }
        Ok(files)
    }

    fn fields(
        &self,
        files: &mut Files,
        items: Option<&[DownwardAPIVolumeFile]>,
        mode: Option<i32>,
    ) -> Result<(), Failure> {
        for item in items.into_iter().flatten() {
            let text = if let Some(of) = &item.field_ref {
                match of.field_path.as_str() {
                    "metadata.labels" => lines(self.pod.labels()),
                    "metadata.annotations" => lines(self.pod.annotations()),
                    _ => env::field(self.pod, of, &Facts::default())?,
                }
            } else if let Some(of) = &item.resource_field_ref {
                let wanted = of.container_name.as_deref().unwrap_or_default();
                let spec = self.pod.spec.as_ref();
                let mut containers = spec.into_iter().flat_map(|spec| {
                    let init = spec.init_containers.iter().flatten();
                    spec.containers.iter().chain(init)
                });
                let container = containers
                    .find(|container| container.name == wanted)
                    .ok_or_else(|| unusable(format!("container {wanted:?} not found")))?;
                env::resource(container, of)?
            } else {
                return Err(unusable(format!(
                    "{:?}: neither a field nor a resource",
                    item.path
                )));
            };
            put(files, &item.path, text.into_bytes(), item.mode.or(mode))?;
        }
        Ok(())
    }

    /// A token for the pod's service account, bound to the pod; another one before it ends.
    async fn token(&mut self, of: &ServiceAccountTokenProjection) -> Result<String, Failure> {
        let key = (self.volume.to_owned(), of.path.clone());
        let now = Instant::now();
        if let Some(token) = self.tokens.get(&key).filter(|token| token.renew > now) {
            return Ok(token.text.clone());
        }
        let spec = self.pod.spec.as_ref();
        let account = spec.and_then(|spec| spec.service_account_name.as_deref());
        let account = account.filter(|name| !name.is_empty()).unwrap_or("default");
        let seconds = of.expiration_seconds.unwrap_or(LIFE);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: of.audience.clone().map(|audience| vec![audience]),
                expiration_seconds: Some(seconds),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(self.pod.name_any()),
                    uid: self.pod.uid(),
                }),
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.sources.client.clone(), self.sources.namespace);
        let answer = api
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .map_err(|error| unusable(format!("token of service account {account:?}: {error}")))?;
        let text = answer.status.and_then(|status| status.token).unwrap_or_default();
        // After four fifths of its life, as kubelet.
        let life = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
        let renew = now + (life * 4 / 5).min(DAY);
        self.tokens.insert(
            key,
            Token {
                text: text.clone(),
                renew,
            },
        );
        Ok(text)
    }
}

/// Keys of an object as files: all of them, or those that are asked for.
fn keys(
    files: &mut Files,
    data: Option<Data>,
    items: Option<&[KeyToPath]>,
    mode: Option<i32>,
    optional: Option<bool>,
    what: &str,
) -> Result<(), Failure> {
    let Some(mut data) = data else { return Ok(()) };
    let Some(items) = items else {
        for (key, bytes) in data {
            put(files, &key, bytes, mode)?;
        }
        return Ok(());
    };
    for item in items {
        match data.remove(&item.key) {
            Some(bytes) => put(files, &item.path, bytes, item.mode.or(mode))?,
            None if optional == Some(true) => {}
            None => return Err(unusable(format!("{what} has no key {:?}", item.key))),
        }
    }
    Ok(())
}

fn put(files: &mut Files, path: &str, bytes: Vec<u8>, mode: Option<i32>) -> Result<(), Failure> {
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_));
    if path.is_empty() || !Path::new(path).components().all(inside) || path.starts_with("..") {
        return Err(unusable(format!("{path:?} is no path inside a volume")));
    }
    let mode = mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(0o644);
    files.insert(PathBuf::from(path), File { bytes, mode });
    Ok(())
}

/// `key="value"` in lines, as the downward API has maps.
fn lines(map: &std::collections::BTreeMap<String, String>) -> String {
    let lines: Vec<String> = map
        .iter()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_files() {
        let data = || Some(Data::from([("a".to_owned(), vec![1]), ("b".to_owned(), vec![2])]));
        let item = |key: &str, path: &str| KeyToPath {
            key: key.into(),
            path: path.into(),
            mode: Some(0o600),
        };
        let mut files = Files::new();
        keys(&mut files, data(), None, None, None, "x").unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), [Path::new("a"), Path::new("b")]);
        assert_eq!(files[Path::new("a")].mode, 0o644);
        let mut files = Files::new();
        keys(
            &mut files,
            data(),
            Some(&[item("b", "d/e")]),
            Some(0o400),
            None,
            "x",
        )
        .unwrap();
        let expected = File {
            bytes: vec![2],
            mode: 0o600,
        };
        assert_eq!(
            files.into_iter().collect::<Vec<_>>(),
            [(PathBuf::from("d/e"), expected)]
        );
        let mut files = Files::new();
        let failure = keys(&mut files, data(), Some(&[item("c", "c")]), None, None, "x").unwrap_err();
        assert!(failure.message.contains("x has no key \"c\""), "{failure}");
        keys(&mut files, data(), Some(&[item("c", "c")]), None, Some(true), "x").unwrap();
        keys(&mut files, None, Some(&[item("c", "c")]), None, None, "x").unwrap();
        for bad in ["../x", "/x", "", "a/../b"] {
            assert!(put(&mut files, bad, Vec::new(), None).is_err(), "{bad}");
        }
        assert!(files.is_empty());
    }

    #[test]
    fn maps_are_lines() {
        let map = [
            ("b".to_owned(), "x\"y".to_owned()),
            ("a".to_owned(), "1".to_owned()),
        ];
        assert_eq!(lines(&map.into()), "a=\"1\"\nb=\"x\\\"y\"");
    }
}
