//! Noticing that the file changed: a new process then starts with the new one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use futures::StreamExt as _;
use inotify::{Inotify, WatchMask};

/// Ends when the file says something else than `text`. A file that is gone, as in the middle of a replacement, is waited
/// for.
///
/// # Errors
///
/// If its directory cannot be watched.
pub async fn changed(path: PathBuf, text: String) -> io::Result<()> {
    let inotify = Inotify::init()?;
    // The directory, because a file is replaced by a rename, and a ConfigMap's volume by one of a link beside it.
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mask = WatchMask::CLOSE_WRITE | WatchMask::CREATE | WatchMask::MOVED_TO;
    inotify.watches().add(dir, mask)?;
    let mut events = inotify.into_event_stream([0; 4096])?;
    let differs = || match fs::read(&path) {
        // half of a file that is being written is no end of it
        Ok(bytes) => !bytes.is_empty() && bytes != text.as_bytes(),
        Err(_) => false,
    };
    // it may have changed before the watch began
    while !differs() {
        match events.next().await {
            Some(event) => drop(event?),
            None => std::future::pending().await,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;

    async fn ends(task: tokio::task::JoinHandle<io::Result<()>>) {
        tokio::time::timeout(Duration::from_secs(10), task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn a_write_a_rename_and_a_volume_are_noticed_but_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.conf");
        fs::write(&path, "a").unwrap();
        let task = tokio::spawn(changed(path.clone(), "a".into()));
        fs::write(dir.path().join("other"), "b").unwrap();
        fs::write(&path, "a").unwrap();
        fs::remove_file(&path).unwrap();
        // the task has seen all of that when it has seen what comes after
        tokio::time::timeout(Duration::from_millis(200), async {
            while !task.is_finished() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap_err();
        fs::write(&path, "b").unwrap();
        ends(task).await;

        let task = tokio::spawn(changed(path.clone(), "b".into()));
        fs::write(dir.path().join("new"), "c").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        ends(task).await;

        // as kubelet does it: config.conf -> ..data/config.conf, ..data -> ..1
        let volume = tempfile::tempdir().unwrap();
        let at = |name: &str| volume.path().join(name);
        for (version, text) in [("..1", "a"), ("..2", "b")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("config.conf"), text).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/config.conf", at("config.conf")).unwrap();
        let task = tokio::spawn(changed(at("config.conf"), "a".into()));
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        ends(task).await;
        // before the watch began
        changed(at("config.conf"), "a".into()).await.unwrap();
    }
}
