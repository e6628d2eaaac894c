//! A copy of everything that a control plane keeps, in a file: taken from a running one, put back into an empty directory.
//!
//! The file is text, a JSON document on each line: first the format and the store's revision, then each key with its
//! revision and value, and at the end how many there were, without which the file is not complete. Keys and
//! certificates (`pki/` in the data directory) are not in it; Secrets are.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures::{Stream, stream};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use crate::store::{Page, RedbStore, Stored};

/// Where a running control plane gives it to administrators.
pub const PATH: &str = "/beeline/backup";
/// Name of the format's number in the first line.
const FORMAT: &str = "beelineBackup";
const VERSION: u64 = 1;
/// A restored store goes on at a revision that nobody has seen: whatever clients remember is over, and they list again.
const SKIPPED: u64 = 1_000_000;
/// File of the store in the data directory.
pub(crate) const STORE: &str = "store.redb";

/// The file's content, line by line.
///
/// # Errors
/// When a value is no text; the API writes none.
pub(crate) fn lines(page: Page) -> Result<impl Stream<Item = Bytes> + Send + 'static> {
    let line = |value: &Value| Bytes::from(format!("{value}\n"));
    for item in &page.items {
        ensure!(
            std::str::from_utf8(&item.value).is_ok(),
            "{} is no text",
            item.key
        );
    }
    let first = line(&json!({FORMAT: VERSION, "revision": page.revision}));
    let last = line(&json!({"count": page.items.len()}));
    let items = page.items.into_iter().map(move |item| {
        let value = String::from_utf8_lossy(&item.value);
        line(&json!({"key": item.key, "revision": item.revision, "value": value}))
    });
    Ok(stream::iter(std::iter::once(first).chain(items).chain([last])))
}

/// Asks a running control plane for its content, and writes it into a new file that only its owner can read. Returns how
/// many keys there are.
///
/// # Errors
/// When the file exists or cannot be written, or the control plane does not give all; no file is left then.
pub async fn save(kubeconfig: &Path, file: &Path) -> Result<u64> {
    let name = || file.display().to_string();
    let config = kube::config::Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("read {}", kubeconfig.display()))?;
    let config =
        kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await?;
    let client = kube::Client::try_from(config).context("set up the API client")?;
    let request = http::Request::get(PATH).body(kube::client::Body::empty())?;
    let answer = client.send(request).await.context("ask for the backup")?;
    ensure!(
        answer.status().is_success(),
        "the control plane answers {}: a backup is for administrators, and made by Beeline's own control plane",
        answer.status()
    );
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .with_context(|| format!("make {}", name()))?;
    let mut body = answer.into_body();
    let written = async {
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.context("read the backup")?.into_data() {
                out.write_all(&data)
                    .with_context(|| format!("write {}", name()))?;
            }
        }
        out.sync_all().with_context(|| format!("write {}", name()))?;
        read(file, |_| Ok(())).map(|(_, count)| count)
    };
    written.await.inspect_err(|_| drop(fs::remove_file(file)))
}

/// Makes the store of a control plane out of such a file. Returns how many keys there are.
///
/// # Errors
/// When the directory has a store already, or the file is none of these or not complete; there is no store then.
pub fn restore(file: &Path, data_dir: &Path) -> Result<u64> {
    crate::pki::create_private_dir(data_dir)?;
    let store = data_dir.join(STORE);
    ensure!(
        !store.exists(),
        "{} is there already: a backup is put into an empty directory",
        store.display()
    );
    let new = data_dir.join(format!("{STORE}.new"));
    if new.exists() {
        fs::remove_file(&new).with_context(|| format!("remove {}", new.display()))?;
    }
    let restored = (|| {
        let mut import = RedbStore::import(&new)?;
        let (revision, count) = import.fill(|put| read(file, put))?;
        import.finish(revision.saturating_add(SKIPPED))?;
        fs::rename(&new, &store).with_context(|| format!("make {}", store.display()))?;
        fs::File::open(data_dir)?.sync_all()?;
        Ok(count)
    })();
    restored.inspect_err(|_| drop(fs::remove_file(&new)))
}

/// Reads the file to its end; returns the revision and the number of keys.
fn read(file: &Path, mut each: impl FnMut(Stored) -> Result<()>) -> Result<(u64, u64)> {
    let name = file.display();
    let input = fs::File::open(file).with_context(|| format!("open {name}"))?;
    let mut lines = BufReader::new(input).lines();
    let mut next = || -> Result<Option<Value>> {
        let Some(line) = lines.next() else {
            return Ok(None);
        };
        let line = line.with_context(|| format!("read {name}"))?;
        Ok(Some(
            serde_json::from_str(&line).with_context(|| format!("{name} is no backup, or damaged"))?,
        ))
    };
    let head = next()?.unwrap_or_default();
    let revision = match (head[FORMAT].as_u64(), head["revision"].as_u64()) {
        (Some(VERSION), Some(revision)) => revision,
        (Some(format), _) => bail!("{name} has format {format}, this program reads format {VERSION}"),
        (None, _) => bail!("{name} is no backup"),
    };
    let mut count = 0_u64;
    while let Some(line) = next()? {
        if let Some(wanted) = line["count"].as_u64() {
            ensure!(wanted == count, "{name}: {count} of {wanted} keys are there");
            return Ok((revision, count));
        }
        let (Some(key), Some(at), Some(value)) = (
            line["key"].as_str(),
            line["revision"].as_u64(),
            line["value"].as_str(),
        ) else {
            bail!("{name}: line {} is no key with its value", count + 2);
        };
        ensure!(
            (1..=revision).contains(&at),
            "{name}: {key} has revision {at}, the store has {revision}"
        );
        each(Stored {
            key: key.to_owned(),
            revision: at,
            value: value.to_owned().into(),
        })?;
        count += 1;
    }
    bail!("{name} ends before its end: it is not complete")
}
