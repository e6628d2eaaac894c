//! The plugin's side of the socket.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::protocol::{MAX_MESSAGE, Request, Response};

/// kubelet gives up on a sandbox after two minutes: tell it why before that.
const DEADLINE: Duration = Duration::from_secs(90);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the agent is not running, so it has not seen the request.
    #[error("no agent at {socket}: {source}")]
    Absent {
        /// The socket.
        socket: String,
        /// Why it cannot be connected to.
        source: std::io::Error,
    },
    /// The connection broke or nothing came in time: the agent may have seen the request.
    #[error("agent at {socket} does not answer: {source}")]
    Broken {
        /// The socket.
        socket: String,
        /// What happened.
        source: std::io::Error,
    },
}

/// Asks the agent. A trait, so that the plugin can be tested without one.
pub trait Agent {
    /// # Errors
    ///
    /// When there is no answer; an answer that says no is `Ok`.
    fn ask(&self, socket: &Path, request: &Request, netns: Option<&File>) -> Result<Response, ClientError>;
}

/// The agent behind a unix socket.
#[derive(Clone, Copy, Debug)]
pub struct Socket;

impl Agent for Socket {
    fn ask(&self, socket: &Path, request: &Request, netns: Option<&File>) -> Result<Response, ClientError> {
        let name = || socket.display().to_string();
        let stream = UnixStream::connect(socket).map_err(|source| ClientError::Absent {
            socket: name(),
            source,
        })?;
        exchange(&stream, request, netns).map_err(|source| ClientError::Broken {
            socket: name(),
            source,
        })
    }
}

fn exchange(mut stream: &UnixStream, request: &Request, netns: Option<&File>) -> std::io::Result<Response> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let text = serde_json::to_vec(request)?;
    let sent = match netns {
        Some(file) => {
            let fds: [RawFd; 1] = [file.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(
                stream.as_raw_fd(),
                &[IoSlice::new(&text)],
                &rights,
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?
        }
        None => 0,
    };
    stream.write_all(text.get(sent..).unwrap_or_default())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.take(MAX_MESSAGE).read_to_end(&mut answer)?;
    if answer.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&answer)?)
}
