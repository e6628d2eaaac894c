//! The volumes of a pod, as directories of the node. What comes from the API is written again when it has changed there.

mod content;
mod files;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, EmptyDirVolumeSource, HostPathVolumeSource, Pod, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use nix::mount::{MsFlags, mount};
use tokio::time::{Duration, Instant};

use super::env;
use super::sources::Sources;
use crate::runtime::{Failure, Mount};
use content::{Content, Token};

/// How often what comes from the API is asked for again: kubelet takes up to a minute and a half.
pub(super) const REFRESH: Duration = Duration::from_secs(10);

/// What is prepared for a pod.
#[derive(Default)]
pub(super) struct Volumes {
    /// Where each volume is; nothing before all are there.
    places: Option<BTreeMap<String, PathBuf>>,
    /// Tokens by volume and path.
    tokens: HashMap<(String, String), Token>,
    next: Option<Instant>,
}

fn unusable(volume: &str, cause: impl std::fmt::Display) -> Failure {
    Failure::new(
        "FailedMount",
        format!("MountVolume.SetUp failed for volume {volume:?}: {cause}"),
    )
}

impl Volumes {
    /// When to look at what comes from the API again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Makes all volumes in `dir`, or brings what has changed in the API up to date if it is time to. Before all volumes are
    /// there for the first time a container cannot start; after that what cannot be had stays as it is.
    ///
    /// # Errors
    /// When a volume cannot be made.
    pub(super) async fn prepare(
        &mut self,
        sources: &Sources<'_>,
        pod: &Pod,
        dir: &Path,
    ) -> Result<(), Failure> {
        let now = Instant::now();
        if self.places.is_some() && self.next.is_none_or(|next| next > now) {
            return Ok(());
        }
        let mut places = BTreeMap::new();
        let mut changes = false;
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        for volume in volumes {
            let name = volume.name.as_str();
            let place = if let Some(of) = &volume.host_path {
                host_path(of).map_err(|error| unusable(name, error))?
            } else {
                let place = dir.join(name);
                if let Some(of) = &volume.empty_dir {
                    empty_dir(&place, of).map_err(|error| unusable(name, error))?;
                } else {
                    changes = true;
                    self.write(sources, pod, volume, &place).await?;
                }
                place
            };
            places.insert(name.to_owned(), place);
        }
        self.places = Some(places);
        self.next = changes.then_some(now + REFRESH);
        Ok(())
    }

    async fn write(
        &mut self,
        sources: &Sources<'_>,
        pod: &Pod,
        volume: &Volume,
        place: &Path,
    ) -> Result<(), Failure> {
        let mut content = Content::new(sources, pod, &volume.name, &mut self.tokens);
        match content.of(volume).await {
            Ok(found) => {
                // As kubelet: what is secret is on no disk.
                let secret = volume.secret.is_some() || volume.projected.is_some();
                let ready = if secret { in_memory(place, None) } else { Ok(()) };
                let written = ready.and_then(|()| files::write(place, &found));
                written.map_err(|error| unusable(&volume.name, error))
            }
            // It has been there before.
            Err(failure) if self.places.is_some() => {
                tracing::debug!(volume = volume.name, %failure, "a volume stays as it is");
                Ok(())
            }
            Err(failure) => Err(unusable(&volume.name, failure.message)),
        }
    }

    /// What a container mounts.
    ///
    /// # Errors
    /// When it names a volume that the pod does not have, or a path that leads out of the volume.
    pub(super) fn mounts(
        &self,
        container: &Container,
        variables: &BTreeMap<String, String>,
        volumes: &[Volume],
    ) -> Result<Vec<Mount>, Failure> {
        let bad = |message: String| Failure::new("CreateContainerConfigError", message);
        let places = self.places.as_ref();
        let mut mounts = Vec::new();
        for wanted in container.volume_mounts.iter().flatten() {
            let place = places.and_then(|places| places.get(&wanted.name));
            let place = place.ok_or_else(|| {
                bad(format!(
                    "container {:?} mounts volume {:?}, which the pod does not have",
                    container.name, wanted.name
                ))
            })?;
            let inside = match (&wanted.sub_path, &wanted.sub_path_expr) {
                (_, Some(text)) if !text.is_empty() => env::expand(text, variables),
                (text, _) => text.clone().unwrap_or_default(),
            };
            let source = inner(place, Path::new(&inside))
                .map_err(|error| bad(format!("subPath {inside:?} of volume {:?}: {error}", wanted.name)))?;
            let volume = volumes.iter().find(|volume| volume.name == wanted.name);
            // As kubelet: what comes from the API is written by the node alone.
            let fixed = volume.is_some_and(|volume| volume.empty_dir.is_none() && volume.host_path.is_none());
            mounts.push(Mount {
                source,
                target: Path::new("/").join(&wanted.mount_path),
                read_only: fixed || wanted.read_only == Some(true),
            });
        }
        Ok(mounts)
    }
}

/// A path in a volume, made if it is not there.
fn inner(place: &Path, inside: &Path) -> io::Result<PathBuf> {
    if inside.as_os_str().is_empty() {
        return Ok(place.to_owned());
    }
    if !inside
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    {
        return Err(io::Error::other("must be relative, without `..`"));
    }
    let path = place.join(inside);
    if !path.exists() {
        fs::create_dir_all(&path)?;
    }
    let found = path.canonicalize()?;
    if !found.starts_with(place.canonicalize()?) {
        return Err(io::Error::other("leads out of the volume"));
    }
    Ok(found)
}

fn empty_dir(place: &Path, of: &EmptyDirVolumeSource) -> io::Result<()> {
    fs::create_dir_all(place)?;
    if of.medium.as_deref() == Some("Memory") {
        let bytes = |Quantity(text): &Quantity| env::milli(text).map(|milli| milli.div_ceil(1000));
        in_memory(place, of.size_limit.as_ref().and_then(bytes))?;
    }
    fs::set_permissions(place, fs::Permissions::from_mode(0o777))
}

/// Makes a directory one of a filesystem in memory, of so many bytes at most.
fn in_memory(place: &Path, size: Option<u64>) -> io::Result<()> {
    fs::create_dir_all(place)?;
    if is_mounted(place)? {
        return Ok(());
    }
    let options = size.map(|size| format!("mode=755,size={size}"));
    let options = options.as_deref().unwrap_or("mode=755");
    mount(
        Some("tmpfs"),
        place,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(options),
    )?;
    Ok(())
}

/// Whether a directory is the root of a filesystem.
fn is_mounted(place: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let above = place.parent().unwrap_or(place);
    Ok(fs::metadata(place)?.dev() != fs::metadata(above)?.dev())
}

/// A path of the node, of the kind that the pod expects there.
fn host_path(of: &HostPathVolumeSource) -> io::Result<PathBuf> {
    let path = PathBuf::from(&of.path);
    let kind = of.type_.as_deref().unwrap_or_default();
    match kind {
        "DirectoryOrCreate" => fs::create_dir_all(&path)?,
        "FileOrCreate" if !path.exists() => drop(fs::File::create(&path)?),
        _ => {}
    }
    let found = fs::metadata(&path)
        .map_err(|error| io::Error::new(error.kind(), format!("hostPath {}: {error}", of.path)))?;
    let kinds = found.file_type();
    let fits = match kind {
        "" => true,
        "Directory" | "DirectoryOrCreate" => kinds.is_dir(),
        "File" | "FileOrCreate" => kinds.is_file(),
        "Socket" => kinds.is_socket(),
        "CharDevice" => kinds.is_char_device(),
        "BlockDevice" => kinds.is_block_device(),
        _ => false,
    };
    if fits {
        Ok(path)
    } else {
        Err(io::Error::other(format!(
            "hostPath type check failed: {} is not a {kind}",
            of.path
        )))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_container_mounts() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("v");
        fs::create_dir(&place).unwrap();
        fs::write(dir.path().join("outside"), "").unwrap();
        std::os::unix::fs::symlink("../outside", place.join("out")).unwrap();
        let volumes = Volumes {
            places: Some(BTreeMap::from([("v".to_owned(), place.clone())])),
            ..Volumes::default()
        };
        let of: Vec<Volume> = vec![serde_json::from_value(json!({"name": "v", "emptyDir": {}})).unwrap()];
        let ask = |mount: serde_json::Value| {
            let container = json!({"name": "c", "volumeMounts": [mount]});
            let variables = BTreeMap::from([("POD".to_owned(), "p1".to_owned())]);
            volumes.mounts(&serde_json::from_value(container).unwrap(), &variables, &of)
        };
        let found = ask(json!({"name": "v", "mountPath": "data", "subPathExpr": "logs/$(POD)"})).unwrap();
        let expected = Mount {
            source: place.canonicalize().unwrap().join("logs/p1"),
            target: "/data".into(),
            read_only: false,
        };
        assert_eq!(found, [expected]);
        for (mount, why) in [
            (
                json!({"name": "v", "mountPath": "/d", "subPath": "out"}),
                "out of the volume",
            ),
            (
                json!({"name": "v", "mountPath": "/d", "subPath": "../x"}),
                "must be relative",
            ),
            (json!({"name": "w", "mountPath": "/d"}), "does not have"),
        ] {
            let failure = ask(mount).unwrap_err();
            assert!(failure.message.contains(why), "{failure}");
        }
    }

    #[test]
    fn paths_of_the_host_are_what_they_should_be() {
        let dir = tempfile::tempdir().unwrap();
        let ask = |name: &str, kind: &str| {
            let path = dir.path().join(name).display().to_string();
            host_path(&HostPathVolumeSource {
                path,
                type_: Some(kind.to_owned()),
            })
        };
        assert!(ask("a", "Directory").is_err());
        assert!(ask("a", "DirectoryOrCreate").is_ok());
        assert!(ask("a", "Directory").is_ok() && ask("a", "").is_ok());
        let error = ask("a", "File").unwrap_err().to_string();
        assert!(error.contains("is not a File"), "{error}");
        assert!(ask("f", "FileOrCreate").is_ok() && ask("f", "Socket").is_err());
    }
}
