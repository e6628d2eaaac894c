//! Logs of containers.

use std::convert::Infallible;
use std::io::SeekFrom;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt as _, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use jiff::{SignedDuration, Timestamp};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use super::Body;
use super::lines::Lines;
use crate::runtime::{Runtime, Session, State};

/// How often a file that is followed is looked at.
const POLL: Duration = Duration::from_millis(100);
const CHUNK: usize = 64 << 10;

/// What is asked for, as in the API's `PodLogOptions`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LogOptions {
    follow: bool,
    previous: bool,
    tail: Option<u64>,
    limit: Option<u64>,
    since: Option<Timestamp>,
    times: bool,
}

impl LogOptions {
    /// From a query. Where the times of lines are not known, what asks for them has no effect.
    pub(super) fn parse(query: &str) -> Result<Self, String> {
        let mut options = Self::default();
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let flag = || matches!(value, "true" | "1");
            let number = || {
                let number = value
                    .parse()
                    .map_err(|_| format!("{name}: {value:?} is no number"));
                number.map(Some)
            };
            match name {
                "follow" => options.follow = flag(),
                "previous" => options.previous = flag(),
                "tailLines" => options.tail = number()?,
                "limitBytes" => options.limit = number()?,
                "timestamps" => options.times = flag(),
                "sinceSeconds" => {
                    let seconds = number()?.and_then(|seconds: u64| i64::try_from(seconds).ok());
                    let ago = SignedDuration::from_secs(seconds.unwrap_or_default());
                    options.since = Timestamp::now().checked_sub(ago).ok();
                }
                "sinceTime" => {
                    let time = value.replace("%3A", ":");
                    let time = time.parse().map_err(|error| format!("sinceTime: {error}"))?;
                    options.since = Some(time);
                }
                _ => {}
            }
        }
        Ok(options)
    }
}

/// A container's log as it is read.
struct Reader {
    runtime: Arc<dyn Runtime>,
    file: File,
    uid: String,
    container: String,
    attempt: u32,
    follow: bool,
    left: u64,
    /// For logs that have more than what was said.
    lines: Option<Lines>,
}

/// The log as a body.
///
/// # Errors
/// When there is none; the text says why.
pub(super) async fn open(
    runtime: &Arc<dyn Runtime>,
    namespace: &str,
    pod: &str,
    container: &str,
    options: LogOptions,
) -> Result<Body, String> {
    let reader = Reader::open(runtime, namespace, pod, container, options).await?;
    let frames = stream::unfold(reader, |mut reader| async move {
        let bytes = reader.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), reader))
    });
    Ok(StreamBody::new(frames).boxed_unsync())
}

/// What a container says from now on, until it ends: its processes have no standard input that somebody could write to.
///
/// # Errors
/// When there is no log; the text says why.
pub(super) async fn follow(
    runtime: &Arc<dyn Runtime>,
    namespace: &str,
    pod: &str,
    container: &str,
) -> Result<Session, String> {
    let options = LogOptions {
        follow: true,
        tail: Some(0),
        ..LogOptions::default()
    };
    let mut reader = Reader::open(runtime, namespace, pod, container, options).await?;
    let (mut writer, output) = tokio::io::duplex(CHUNK);
    let exit = async move {
        while let Some(bytes) = reader.next().await {
            if writer.write_all(&bytes).await.is_err() {
                break;
            }
        }
        Ok(0)
    };
    Ok(Session {
        stdin: None,
        stdout: Some(Box::new(output)),
        stderr: None,
        resize: None,
        exit: exit.boxed(),
    })
}

impl Reader {
    async fn open(
        runtime: &Arc<dyn Runtime>,
        namespace: &str,
        pod: &str,
        container: &str,
        options: LogOptions,
    ) -> Result<Self, String> {
        let known = super::find(&**runtime, namespace, pod)?;
        let containers = runtime.containers(&known.uid);
        let of = containers
            .iter()
            .find(|known| known.name == container)
            .ok_or_else(|| format!("container {container:?} in pod {pod:?} has not been started"))?;
        let attempt = if options.previous {
            of.attempt.checked_sub(1).ok_or_else(|| {
                format!("previous terminated container {container:?} in pod {pod:?} not found")
            })?
        } else {
            of.attempt
        };
        let path = runtime.dirs().log(&known, container, attempt);
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        let mut file = File::open(&path).await.map_err(failed)?;
        if let Some(lines) = options.tail {
            let from = tail(&mut file, lines).await.map_err(failed)?;
            file.seek(SeekFrom::Start(from)).await.map_err(failed)?;
        }
        Ok(Self {
            runtime: Arc::clone(runtime),
            file,
            uid: known.uid,
            container: container.to_owned(),
            attempt,
            follow: options.follow && !options.previous,
            left: options.limit.unwrap_or(u64::MAX),
            lines: runtime
                .has_times_in_logs()
                .then(|| Lines::new(options.since, options.times)),
        })
    }

    /// The next bytes; nothing at the end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            // Before the file: what was written before the end is read after it.
            let ended = !self.runs();
            let mut text = vec![0; CHUNK];
            let length = self.file.read(&mut text).await.ok()?;
            text.truncate(length);
            if let Some(lines) = &mut self.lines {
                text = lines.text(&text);
            }
            text.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
            if !text.is_empty() {
                self.left = self
                    .left
                    .saturating_sub(u64::try_from(text.len()).unwrap_or(u64::MAX));
                return Some(text.into());
            }
            // Nothing of what was read is shown: lines that are too old, or that have not ended.
            if length > 0 && self.left > 0 {
                continue;
            }
            if self.left == 0 || !self.follow || ended {
                return None;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn runs(&self) -> bool {
        let containers = self.runtime.containers(&self.uid);
        containers.iter().any(|known| {
            let same = known.name == self.container && known.attempt == self.attempt;
            same && matches!(known.state, State::Running { .. })
        })
    }
}

/// Where the last lines begin.
async fn tail(file: &mut File, lines: u64) -> std::io::Result<u64> {
    let mut at = file.seek(SeekFrom::End(0)).await?;
    let end = at;
    let mut found = 0;
    let mut buffer = vec![0; CHUNK];
    while at > 0 {
        let step = at.min(u64::try_from(CHUNK).unwrap_or(u64::MAX));
        at -= step;
        file.seek(SeekFrom::Start(at)).await?;
        let part = &mut buffer[..usize::try_from(step).unwrap_or(CHUNK)];
        file.read_exact(part).await?;
        for (i, byte) in part.iter().enumerate().rev() {
            let position = at + u64::try_from(i).unwrap_or_default();
            // The newline at the very end ends the last line, and begins none.
            if *byte == b'\n' && position + 1 < end {
                found += 1;
                if found == lines {
                    return Ok(position + 1);
                }
            }
        }
    }
    Ok(if lines == 0 { end } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let options = LogOptions::parse("follow=true&tailLines=5&container=x&limitBytes=9").unwrap();
        assert_eq!(
            options,
            LogOptions {
                follow: true,
                previous: false,
                tail: Some(5),
                limit: Some(9),
                ..LogOptions::default()
            }
        );
        assert!(LogOptions::parse("tailLines=-1").is_err());
        let since = LogOptions::parse("sinceTime=2026-01-01T00%3A00%3A00Z&timestamps=true").unwrap();
        assert_eq!(since.since, Some("2026-01-01T00:00:00Z".parse().unwrap()));
        assert!(since.times && LogOptions::parse("sinceTime=x").is_err());
        assert_eq!(LogOptions::parse("").unwrap(), LogOptions::default());
    }

    #[tokio::test]
    async fn the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for (text, lines, expected) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 1, "c"),
            ("a\nb\n", 9, "a\nb\n"),
            ("a\n", 0, ""),
            ("", 3, ""),
        ] {
            std::fs::write(&path, text).unwrap();
            let from = tail(&mut File::open(&path).await.unwrap(), lines).await.unwrap();
            assert_eq!(
                &text[usize::try_from(from).unwrap()..],
                expected,
                "{text:?} {lines}"
            );
        }
        // longer than what is read at once
        let long = "x\n".repeat(CHUNK);
        std::fs::write(&path, &long).unwrap();
        let from = tail(&mut File::open(&path).await.unwrap(), 50_000).await.unwrap();
        assert_eq!(long.len() - usize::try_from(from).unwrap(), 100_000);
    }
}
