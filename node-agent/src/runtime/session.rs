//! Commands that run in a container beside what it runs.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::sync::mpsc;

use super::Failure;

/// As much of a command's output is kept as kubelet keeps.
const OUTPUT: u64 = 10 << 10;

/// Something a command reads from.
pub(crate) type Input = Box<dyn AsyncWrite + Send + Unpin>;
/// Something a command writes to.
pub(crate) type Output = Box<dyn AsyncRead + Send + Unpin>;

/// What to run, and what of it is looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) command: Vec<String>,
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

/// A command that runs. It is ended when this is dropped.
pub(crate) struct Session {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    /// Takes sizes of the terminal: columns and lines.
    pub(crate) resize: Option<mpsc::UnboundedSender<(u16, u16)>>,
    /// The exit code, as a shell has it.
    pub(crate) exit: BoxFuture<'static, Result<i32, Failure>>,
}

impl Session {
    /// The exit code and what was written, of a command that takes no longer than that.
    ///
    /// # Errors
    /// When it takes longer, or its end cannot be seen.
    pub(crate) async fn finish(self, limit: Duration) -> Result<(i32, String), Failure> {
        let Self {
            stdout, stderr, exit, ..
        } = self;
        let read = |from: Option<Output>| async move {
            let mut kept = Vec::new();
            if let Some(mut from) = from {
                // What was read before an error is kept.
                let _end = (&mut from).take(OUTPUT).read_to_end(&mut kept).await;
                let _end = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
            }
            kept
        };
        let all = async { tokio::join!(exit, read(stdout), read(stderr)) };
        let (code, mut text, more) = tokio::time::timeout(limit, all).await.map_err(|_| {
            Failure::new(
                "DeadlineExceeded",
                format!("command timed out after {} s", limit.as_secs()),
            )
        })?;
        text.extend(more);
        Ok((code?, String::from_utf8_lossy(&text).into_owned()))
    }
}
