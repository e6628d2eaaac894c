//! What is known of a pod, in a file, so that the next process can go on.

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::super::{Container, PodRef, State};
use super::spawn::Launch;
use crate::process::Process;

const FILE: &str = "pod.json";

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    container: Container,
    process: Option<Process>,
    #[serde(default)]
    launch: Launch,
}

/// A pod that has a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) pod: PodRef,
    pub(super) hostname: String,
    /// `None`: the node's.
    pub(super) netns: Option<PathBuf>,
    pub(super) ips: Vec<IpAddr>,
    containers: Vec<Entry>,
}

impl Record {
    pub(super) fn new(pod: PodRef) -> Self {
        Self {
            pod,
            hostname: String::new(),
            netns: None,
            ips: Vec::new(),
            containers: Vec::new(),
        }
    }

    pub(super) fn containers(&self) -> Vec<Container> {
        self.containers
            .iter()
            .map(|entry| entry.container.clone())
            .collect()
    }

    pub(super) fn container_mut(&mut self, name: &str) -> Option<&mut Container> {
        let entry = self
            .containers
            .iter_mut()
            .find(|entry| entry.container.name == name)?;
        Some(&mut entry.container)
    }

    /// Name and process of the containers that have not ended.
    pub(super) fn running(&self) -> impl Iterator<Item = (&str, Process)> {
        self.containers.iter().filter_map(|entry| {
            let running = matches!(entry.container.state, State::Running { .. });
            let process = entry.process.clone().filter(|_| running)?;
            Some((entry.container.name.as_str(), process))
        })
    }

    /// How the container's processes begin.
    pub(super) fn launch(&self, name: &str) -> Option<Launch> {
        let mut entries = self.containers.iter();
        let entry = entries.find(|entry| entry.container.name == name)?;
        Some(entry.launch.clone())
    }

    /// In the place of an earlier attempt.
    pub(super) fn put(&mut self, container: Container, process: Option<Process>, launch: Launch) {
        self.containers
            .retain(|entry| entry.container.name != container.name);
        self.containers.push(Entry {
            container,
            process,
            launch,
        });
    }
}

/// Writes it whole or not at all.
pub(super) fn save(dir: &Path, record: &Record) -> io::Result<()> {
    let temporary = dir.join("pod.json.new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_data()?;
    fs::rename(&temporary, dir.join(FILE))
}

/// All that can be read. A pod whose file is damaged is removed: its processes are ended and it starts again.
pub(super) fn load(root: &Path) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    for entry in fs::read_dir(root)?.flatten() {
        let path = entry.path().join(FILE);
        match fs::read(&path).and_then(|text| Ok(serde_json::from_slice::<Record>(&text)?)) {
            Ok(record) => records.push(record),
            Err(error) => {
                warn!(path = %path.display(), %error, "what is known of a pod cannot be read: it starts again");
                let uid = entry.file_name().to_string_lossy().into_owned();
                records.push(Record::new(PodRef {
                    namespace: String::new(),
                    name: String::new(),
                    uid,
                }));
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn container(name: &str, state: State) -> Container {
        Container {
            id: format!("process://{name}"),
            name: name.into(),
            attempt: 0,
            image: String::new(),
            state,
        }
    }

    #[test]
    fn what_is_saved_is_there_again_and_damage_costs_one_pod() {
        let root = tempfile::tempdir().unwrap();
        let pod = PodRef {
            namespace: "d".into(),
            name: "p".into(),
            uid: "u1".into(),
        };
        let mut record = Record::new(pod.clone());
        let me = Process::of(std::process::id()).unwrap();
        let started = Timestamp::now();
        record.put(
            container("a", State::Running { started }),
            Some(me.clone()),
            Launch::default(),
        );
        let dir = root.path().join("u1");
        fs::create_dir_all(&dir).unwrap();
        save(&dir, &record).unwrap();
        fs::create_dir_all(root.path().join("u2")).unwrap();
        fs::write(root.path().join("u2/pod.json"), "{").unwrap();
        let mut loaded = load(root.path()).unwrap();
        loaded.sort_by(|a, b| a.pod.uid.cmp(&b.pod.uid));
        assert_eq!(loaded[0].pod, pod);
        assert_eq!(loaded[0].running().collect::<Vec<_>>(), [("a", me)]);
        assert_eq!(
            (loaded[1].pod.uid.as_str(), loaded[1].containers().len()),
            ("u2", 0)
        );
    }
}
