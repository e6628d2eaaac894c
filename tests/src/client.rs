//! The load client `beeline-load`, started inside a pod or a node.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::process::Place;
use crate::program;

/// What a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Connect, one HTTP request, the answer, close.
    Http,
    /// A line and an answer on a connection that stays open.
    Hold,
    /// A datagram from an unconnected socket; the answer must come from the target's address.
    Udp,
    /// A datagram from a connected socket.
    UdpConnected,
    /// Datagrams from one unconnected socket that stays open.
    UdpStay,
    /// Datagrams from one connected socket that stays open until it fails.
    UdpHold,
}

impl Mode {
    fn flag(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Hold => "hold",
            Self::Udp => "udp",
            Self::UdpConnected => "udp-connected",
            Self::UdpStay => "udp-stay",
            Self::UdpHold => "udp-hold",
        }
    }
}

/// How to ask.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// What a request is.
    pub mode: Mode,
    /// Ask for the address that the server sees, not for its name.
    pub source: bool,
    /// Length of a datagram and of its answer, if more than they need.
    pub size: usize,
    /// Source port of datagrams; 0: any.
    pub source_port: u16,
    /// How long to wait for an answer, milliseconds.
    pub timeout_ms: u64,
}

impl From<Mode> for Question {
    fn from(mode: Mode) -> Self {
        Self {
            mode,
            source: false,
            size: 0,
            source_port: 0,
            timeout_ms: 2000,
        }
    }
}

impl Question {
    fn flags(self) -> Vec<String> {
        let mut flags: Vec<String> = ["--mode", self.mode.flag()].map(Into::into).into();
        if self.source {
            flags.push("--source".into());
        }
        flags.extend(["--size".into(), self.size.to_string()]);
        flags.extend(["--source-port".into(), self.source_port.to_string()]);
        flags.extend(["--timeout-ms".into(), self.timeout_ms.to_string()]);
        flags
    }
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Requests that were answered.
    pub ok: u64,
    /// Requests that were not.
    pub failed: u64,
    /// The longest time from request to answer or failure, milliseconds.
    pub slowest_ms: f64,
    /// Answers by the name in them.
    pub replies: BTreeMap<String, u64>,
    /// Failures by system call and error, such as `connect: ECONNREFUSED`.
    pub errors: BTreeMap<String, u64>,
}

/// A client that runs until it is told to stop.
#[derive(Debug)]
pub struct Load {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Load {
    /// Starts asking `target` with `rate` requests per second from `workers` threads, and returns after the first answer.
    ///
    /// # Errors
    /// When it cannot be started or ends without an answer.
    pub fn start(
        place: &Place,
        target: SocketAddr,
        question: impl Into<Question>,
        rate: u32,
        workers: u32,
    ) -> Result<Self> {
        let mut command = place.command(program("beeline-load")?)?;
        command
            .args(["--target", &target.to_string()])
            .args(question.into().flags())
            .args(["--rate", &rate.to_string(), "--workers", &workers.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start beeline-load")?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("no pipe from beeline-load")?;
        let mut load = Self {
            child,
            stdin,
            stdout: BufReader::new(stdout),
        };
        let mut line = String::new();
        load.stdout
            .read_line(&mut line)
            .context("cannot read from beeline-load")?;
        if line.trim() != "started" {
            bail!("beeline-load to {target} got no answer: {line}");
        }
        Ok(load)
    }

    /// Ends it and returns what it counted.
    ///
    /// # Errors
    /// When it ended by itself.
    pub fn stop(mut self) -> Result<LoadReport> {
        drop(self.stdin.take());
        let mut rest = String::new();
        self.stdout
            .read_to_string(&mut rest)
            .context("cannot read from beeline-load")?;
        let status = self.child.wait().context("cannot wait for beeline-load")?;
        if !status.success() {
            bail!("beeline-load failed ({status})");
        }
        serde_json::from_str(rest.trim()).with_context(|| format!("beeline-load printed {rest:?}"))
    }

    /// Asks `target` `count` times, one after the other.
    ///
    /// # Errors
    /// When the client cannot be run; failed requests are in the report.
    pub fn ask(
        place: &Place,
        target: SocketAddr,
        question: impl Into<Question>,
        count: u64,
    ) -> Result<LoadReport> {
        let flags = question.into().flags();
        let (target, count) = (target.to_string(), count.to_string());
        let mut args = vec!["--target", &target, "--count", &count];
        args.extend(flags.iter().map(String::as_str));
        let printed = place.output(program("beeline-load")?, &args)?;
        let last = printed.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("beeline-load printed {printed:?}"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // No trace when it was stopped: the process has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
