//! The built-in runtime as any other.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};

use super::super::{
    Container, ContainerSpec, Dirs, Failure, PodRef, Runtime, Sandbox, SandboxSpec, Session, Wish,
};
use super::ProcessRuntime;

/// The built-in runtime.
#[derive(Clone, Debug)]
pub(crate) struct Processes(pub(crate) Arc<ProcessRuntime>);

impl Runtime for Processes {
    fn version(&self) -> String {
        concat!("process://", env!("CARGO_PKG_VERSION")).to_owned()
    }

    fn dirs(&self) -> &Dirs {
        self.0.dirs()
    }

    fn has_times_in_logs(&self) -> bool {
        false
    }

    fn network_ready(&self) -> Result<(), String> {
        // Nothing beside the agent is needed.
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn pods(&self) -> Vec<PodRef> {
        self.0.pods()
    }

    fn containers(&self, uid: &str) -> Vec<Container> {
        self.0.containers(uid)
    }

    fn sandbox(&self, uid: &str) -> Option<Sandbox> {
        self.0.sandbox(uid)
    }

    fn ensure_sandbox(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, Failure>> {
        self.0.ensure_sandbox(spec).boxed()
    }

    fn start<'a>(&'a self, pod: &'a PodRef, spec: &'a ContainerSpec) -> BoxFuture<'a, Result<(), Failure>> {
        ready(self.0.start(pod, spec)).boxed()
    }

    fn stop<'a>(&'a self, uid: &'a str, name: &'a str, grace: Duration) -> BoxFuture<'a, ()> {
        self.0.stop(uid, name, grace).boxed()
    }

    fn remove<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.0.remove(uid).boxed()
    }

    fn exec<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        wish: &'a Wish,
    ) -> BoxFuture<'a, Result<Session, Failure>> {
        ready(self.0.exec(uid, name, wish)).boxed()
    }

    fn run<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        command: &'a [String],
        limit: Duration,
    ) -> BoxFuture<'a, Result<(i32, String), Failure>> {
        let wish = Wish {
            command: command.to_vec(),
            stdout: true,
            stderr: true,
            ..Wish::default()
        };
        async move { self.0.exec(uid, name, &wish)?.finish(limit).await }.boxed()
    }

    fn attach<'a>(
        &'a self,
        _uid: &'a str,
        _name: &'a str,
        _wish: &'a Wish,
    ) -> BoxFuture<'a, Result<Option<Session>, Failure>> {
        // What a container says goes to its log only.
        ready(Ok(None)).boxed()
    }
}
