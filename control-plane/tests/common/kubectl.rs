//! The installed kubectl against a control plane of its own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]
#![allow(dead_code, reason = "each test binary uses a part of this")]
#![allow(unreachable_pub, reason = "shared by several test binaries")]

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::common::Server;

pub struct Kubectl {
    pub server: Server,
}

impl Kubectl {
    pub async fn new() -> Self {
        Self {
            server: Server::start().await,
        }
    }

    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new("kubectl");
        command
            // Quotes are not needed: no argument here has a blank inside.
            .args(line.split_whitespace())
            .env("KUBECONFIG", self.server.plane.kubeconfig())
            // Discovery caches and a user's own settings must not get in.
            .env("HOME", self.server.dir.path())
            .env("KUBECACHEDIR", self.server.dir.path().join("cache"))
            .env_remove("HTTPS_PROXY")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    pub async fn run(&self, line: &str, input: &str) -> (bool, String, String) {
        let mut child = self.command(line).spawn().expect("kubectl is not installed");
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).await.unwrap();
        drop(stdin);
        let output = tokio::time::timeout(Duration::from_secs(30), child.wait_with_output())
            .await
            .unwrap_or_else(|_| panic!("kubectl {line} hangs"))
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.success(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }

    /// The output of a command that must succeed without a word on stderr.
    pub async fn ok(&self, line: &str) -> String {
        self.feed(line, "").await
    }

    pub async fn feed(&self, line: &str, input: &str) -> String {
        let (ok, out, err) = self.run(line, input).await;
        assert!(ok && err.is_empty(), "kubectl {line}\n{out}{err}");
        out
    }

    /// The complaint of a command that must fail.
    pub async fn fails(&self, line: &str, input: &str) -> String {
        let (ok, out, err) = self.run(line, input).await;
        assert!(!ok, "kubectl {line} succeeded\n{out}");
        err
    }

    pub async fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} -o json")).await).unwrap()
    }

    pub fn watch(&self, line: &str) -> Watched {
        let mut child = self.command(line).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Watched { _child: child, lines }
    }
}

pub struct Watched {
    _child: Child,
    lines: BufReader<tokio::process::ChildStdout>,
}

impl Watched {
    pub async fn line(&mut self) -> Vec<String> {
        let mut line = String::new();
        tokio::time::timeout(Duration::from_secs(20), self.lines.read_line(&mut line))
            .await
            .expect("no line")
            .unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    }
}

/// The words of the output's line that begins with `first`.
pub fn row(output: &str, first: &str) -> Vec<String> {
    output
        .lines()
        .map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .find(|words| words.first().is_some_and(|word| word == first))
        .unwrap_or_else(|| panic!("no line for {first} in\n{output}"))
}

/// What follows `label:` in the output of describe.
pub fn described<'a>(output: &'a str, label: &str) -> &'a str {
    output
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(label)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {label} in\n{output}"))
        .trim()
}
