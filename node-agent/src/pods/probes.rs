//! Probes and hooks of containers.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{
    Container, ExecAction, HTTPGetAction, LifecycleHandler, Pod, Probe, TCPSocketAction,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio_util::task::AbortOnDropHandle;

use super::anyone;
use super::events::Events;
use crate::runtime::{PodRef, Runtime};

/// As much of an answer is read, as by kubelet.
const ANSWER: usize = 10 << 10;
/// How long a hook may take that has no grace to respect.
const HOOK: Duration = Duration::from_secs(120);

/// What probes say of a container that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) started: bool,
    pub(super) ready: bool,
    /// Which probe wants the container ended.
    pub(super) failed: Option<&'static str>,
}

/// Where the container of a probe is.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) pod: PodRef,
    pub(super) container: Container,
    /// The pod's address.
    pub(super) ip: Option<IpAddr>,
}

struct Watched {
    attempt: u32,
    verdict: Arc<Mutex<Verdict>>,
    task: AbortHandle,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The probes of a pod, by container.
#[derive(Default)]
pub(super) struct Probes(HashMap<String, Watched>);

impl Probes {
    /// What the probes of a container say; they begin with the first question. `before`: what was known of this attempt when
    /// the program started. `wake` is told when something has changed.
    pub(super) fn ask(
        &mut self,
        pod: &Arc<Pod>,
        target: Target,
        attempt: u32,
        before: Verdict,
        events: &Events,
        wake: &Arc<Notify>,
    ) -> Verdict {
        let name = target.container.name.clone();
        let same = self.0.get(&name).filter(|watched| watched.attempt == attempt);
        if let Some(watched) = same {
            return watched
                .verdict
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
        }
        let verdict = Arc::new(Mutex::new(before.clone()));
        let prober = Prober {
            pod: Arc::clone(pod),
            target,
            verdict: Arc::clone(&verdict),
            events: events.clone(),
            wake: Arc::clone(wake),
        };
        let task = tokio::spawn(prober.run(before.started)).abort_handle();
        let watched = Watched {
            attempt,
            verdict,
            task,
        };
        self.0.insert(name, watched);
        before
    }

    /// The container does not run, or is being ended.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }
}

/// Whether a container has any.
pub(super) fn has_any(container: &Container) -> bool {
    container.startup_probe.is_some()
        || container.readiness_probe.is_some()
        || container.liveness_probe.is_some()
}

struct Prober {
    pod: Arc<Pod>,
    target: Target,
    verdict: Arc<Mutex<Verdict>>,
    events: Events,
    wake: Arc<Notify>,
}

impl Prober {
    async fn run(self, started: bool) {
        let container = &self.target.container;
        if let Some(probe) = container.startup_probe.as_ref().filter(|_| !started) {
            let passed = self.repeat("Startup", probe, |_| true).await;
            if !passed {
                self.set(|verdict| verdict.failed = Some("startup"));
                return;
            }
        }
        self.set(|verdict| {
            verdict.started = true;
            verdict.ready |= container.readiness_probe.is_none();
        });
        let ready = async {
            if let Some(probe) = &container.readiness_probe {
                self.repeat("Readiness", probe, |passed| {
                    self.set(|verdict| verdict.ready = passed);
                    false
                })
                .await;
            }
        };
        let live = async {
            if let Some(probe) = &container.liveness_probe {
                self.repeat("Liveness", probe, |passed| !passed).await;
                self.set(|verdict| verdict.failed = Some("liveness"));
            }
        };
        tokio::join!(ready, live);
    }

    fn set(&self, change: impl FnOnce(&mut Verdict)) {
        let mut verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        let before = verdict.clone();
        change(&mut verdict);
        if *verdict != before {
            self.wake.notify_one();
        }
    }

    /// Probes until `enough` says so of a result that came as often in a row as it must; gives that result.
    async fn repeat(&self, kind: &'static str, probe: &Probe, enough: impl Fn(bool) -> bool) -> bool {
        let seconds = |value: Option<i32>, default: u64| {
            let value = value.and_then(|value| u64::try_from(value).ok());
            Duration::from_secs(value.filter(|value| *value > 0).unwrap_or(default))
        };
        let count = |value: Option<i32>, default: i32| value.filter(|value| *value > 0).unwrap_or(default);
        let delay = probe
            .initial_delay_seconds
            .and_then(|delay| u64::try_from(delay).ok());
        tokio::time::sleep(Duration::from_secs(delay.unwrap_or_default())).await;
        let mut ticks = tokio::time::interval(seconds(probe.period_seconds, 10));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let limit = seconds(probe.timeout_seconds, 1);
        let (wanted, allowed) = (
            count(probe.success_threshold, 1),
            count(probe.failure_threshold, 3),
        );
        let (mut passed_last, mut in_a_row) = (false, 0);
        loop {
            ticks.tick().await;
            let result = self.target.probe(probe, limit).await;
            let passed = result.is_ok();
            if let Err(why) = result {
                let name = &self.target.container.name;
                let message = format!("{kind} probe failed: {why}");
                self.events.warning(&self.pod, Some(name), "Unhealthy", message);
            }
            in_a_row = if passed == passed_last { in_a_row + 1 } else { 1 };
            passed_last = passed;
            let needed = if passed { wanted } else { allowed };
            if in_a_row >= needed && enough(passed) {
                return passed;
            }
        }
    }
}

impl Target {
    /// Does what the probe says, once.
    async fn probe(&self, probe: &Probe, limit: Duration) -> Result<(), String> {
        if let Some(of) = &probe.exec {
            self.exec(of, limit).await
        } else if let Some(of) = &probe.http_get {
            self.http_get(of, limit).await
        } else if let Some(of) = &probe.tcp_socket {
            self.tcp(of, limit).await
        } else {
            Err("this node has no probes of that kind".to_owned())
        }
    }

    /// Runs a hook; `limit`: how long it may take.
    ///
    /// # Errors
    /// When it fails; the text says why.
    pub(super) async fn hook(&self, hook: &LifecycleHandler, limit: Option<Duration>) -> Result<(), String> {
        let limit = limit.unwrap_or(HOOK);
        if let Some(of) = &hook.exec {
            self.exec(of, limit).await
        } else if let Some(of) = &hook.http_get {
            self.http_get(of, limit).await
        } else if let Some(of) = &hook.sleep {
            let seconds = Duration::from_secs(u64::try_from(of.seconds).unwrap_or_default());
            tokio::time::sleep(seconds.min(limit)).await;
            Ok(())
        } else {
            Err("this node has no hooks of that kind".to_owned())
        }
    }

    async fn exec(&self, of: &ExecAction, limit: Duration) -> Result<(), String> {
        let command = of.command.as_deref().unwrap_or_default();
        let (uid, name) = (&self.pod.uid, &self.container.name);
        let ended = self.runtime.run(uid, name, command, limit).await;
        match ended.map_err(|failure| failure.message)? {
            (0, _) => Ok(()),
            (code, output) if output.is_empty() => Err(format!("command exited with {code}")),
            (_, output) => Err(output),
        }
    }

    async fn http_get(&self, of: &HTTPGetAction, limit: Duration) -> Result<(), String> {
        let scheme = of.scheme.as_deref().unwrap_or("HTTP").to_ascii_lowercase();
        let address = self.address(of.host.as_deref(), &of.port)?;
        let path = of.path.as_deref().unwrap_or("/");
        let path = if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/{path}")
        };
        let asked = async {
            let stream = TcpStream::connect(address)
                .await
                .map_err(|error| error.to_string())?;
            let status = if scheme == "https" {
                let name = ServerName::from(address.ip());
                let tls = anyone::connector().map_err(|error| error.to_string())?;
                let stream = tls.connect(name, stream).await;
                let stream = stream.map_err(|error| error.to_string())?;
                get(stream, request(of, address, &path)?).await
            } else {
                get(stream, request(of, address, &path)?).await
            }?;
            if (200..400).contains(&status.as_u16()) {
                Ok(())
            } else {
                Err(format!("HTTP probe failed with statuscode: {}", status.as_u16()))
            }
        };
        tokio::time::timeout(limit, asked)
            .await
            .unwrap_or_else(|_| Err(late(limit)))
            .map_err(|why| {
                if why.starts_with("HTTP") {
                    why
                } else {
                    format!("Get \"{scheme}://{address}{path}\": {why}")
                }
            })
    }

    async fn tcp(&self, of: &TCPSocketAction, limit: Duration) -> Result<(), String> {
        let address = self.address(of.host.as_deref(), &of.port)?;
        match tokio::time::timeout(limit, TcpStream::connect(address)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("dial tcp {address}: {error}")),
            Err(_) => Err(format!("dial tcp {address}: {}", late(limit))),
        }
    }

    fn address(&self, host: Option<&str>, port: &IntOrString) -> Result<SocketAddr, String> {
        let ip = match host.filter(|host| !host.is_empty()) {
            Some(host) => host.parse().map_err(|_| format!("{host:?} is no address"))?,
            None => self.ip.ok_or("the pod has no address")?,
        };
        let number = match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::String(name) => {
                let mut ports = self.container.ports.iter().flatten();
                let named = ports.find(|port| port.name.as_ref() == Some(name));
                named
                    .map(|port| port.container_port)
                    .or_else(|| name.parse().ok())
            }
        };
        let number = number
            .and_then(|number| u16::try_from(number).ok())
            .filter(|port| *port > 0);
        let number = number.ok_or_else(|| format!("the container has no port {port:?}"))?;
        Ok(SocketAddr::new(ip, number))
    }
}

/// The status of an answer.
async fn get<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<StatusCode, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let text = |error: hyper::Error| error.to_string();
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(text)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let answer = sender.send_request(request).await.map_err(text)?;
    let status = answer.status();
    // Read, so that the server does not see a connection that is cut off.
    let _rest = Limited::new(answer.into_body(), ANSWER).collect().await;
    Ok(status)
}

fn late(limit: Duration) -> String {
    format!("no answer in {} s", limit.as_secs())
}

fn request(of: &HTTPGetAction, address: SocketAddr, path: &str) -> Result<Request<Empty<Bytes>>, String> {
    let uri: Uri = path.parse().map_err(|error| format!("{path:?}: {error}"))?;
    let mut request = Request::get(uri)
        .header(http::header::USER_AGENT, "kube-probe/1.36")
        .header(http::header::ACCEPT, "*/*")
        .header(http::header::CONNECTION, "close");
    let mut host = address.to_string();
    for header in of.http_headers.iter().flatten() {
        if header.name.eq_ignore_ascii_case("host") {
            host.clone_from(&header.value);
        } else {
            request = request.header(&header.name, &header.value);
        }
    }
    request
        .header(http::header::HOST, host)
        .body(Empty::new())
        .map_err(|error| error.to_string())
}
