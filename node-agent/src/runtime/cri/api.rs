//! As much of the container runtime interface as a node needs (`k8s.io/cri-api` `pkg/apis/runtime/v1/api.proto`). Written by
//! hand: the crates that have all of it need protoc to build. Fields that are not here are not sent, and not read.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

/// A call that gets no answer in this time has failed; those that wait for something longer say so.
const PATIENCE: Duration = Duration::from_secs(120);
/// Answers are no longer, as in kubelet.
const LARGEST: usize = 16 << 20;

/// A message, with its fields as `number, name: type`.
macro_rules! messages {
    ($($name:ident { $(#[$attribute:meta] $field:ident: $type:ty,)* })*) => {
        $(
            #[derive(Clone, PartialEq, Message)]
            pub(super) struct $name {
                $(#[$attribute] pub(super) $field: $type,)*
            }
        )*
    };
}

messages! {
    Empty {}
    Version {
        #[prost(string, tag = 2)] runtime_name: String,
        #[prost(string, tag = 3)] runtime_version: String,
    }
    Condition {
        #[prost(string, tag = 1)] kind: String,
        #[prost(bool, tag = 2)] status: bool,
        #[prost(string, tag = 4)] message: String,
    }
    RuntimeStatus {
        #[prost(message, repeated, tag = 1)] conditions: Vec<Condition>,
    }
    StatusResponse {
        #[prost(message, optional, tag = 1)] status: Option<RuntimeStatus>,
    }
    SandboxMetadata {
        #[prost(string, tag = 1)] name: String,
        #[prost(string, tag = 2)] uid: String,
        #[prost(string, tag = 3)] namespace: String,
        #[prost(uint32, tag = 4)] attempt: u32,
    }
    Namespaces {
        #[prost(int32, tag = 1)] network: i32,
        #[prost(int32, tag = 2)] pid: i32,
        #[prost(int32, tag = 3)] ipc: i32,
    }
    SandboxSecurity {
        #[prost(message, optional, tag = 1)] namespaces: Option<Namespaces>,
        #[prost(bool, tag = 6)] privileged: bool,
    }
    LinuxSandbox {
        #[prost(string, tag = 1)] cgroup_parent: String,
        #[prost(message, optional, tag = 2)] security: Option<SandboxSecurity>,
    }
    Dns {
        #[prost(string, repeated, tag = 1)] servers: Vec<String>,
        #[prost(string, repeated, tag = 2)] searches: Vec<String>,
        #[prost(string, repeated, tag = 3)] options: Vec<String>,
    }
    PortMapping {
        #[prost(int32, tag = 1)] protocol: i32,
        #[prost(int32, tag = 2)] container_port: i32,
        #[prost(int32, tag = 3)] host_port: i32,
        #[prost(string, tag = 4)] host_ip: String,
    }
    SandboxConfig {
        #[prost(message, optional, tag = 1)] metadata: Option<SandboxMetadata>,
        #[prost(string, tag = 2)] hostname: String,
        #[prost(string, tag = 3)] log_directory: String,
        #[prost(message, optional, tag = 4)] dns: Option<Dns>,
        #[prost(message, repeated, tag = 5)] port_mappings: Vec<PortMapping>,
        #[prost(map = "string, string", tag = 6)] labels: HashMap<String, String>,
        #[prost(message, optional, tag = 8)] linux: Option<LinuxSandbox>,
    }
    RunSandboxRequest {
        #[prost(message, optional, tag = 1)] config: Option<SandboxConfig>,
    }
    // The requests that only name a sandbox or a container.
    Named {
        #[prost(string, tag = 1)] id: String,
    }
    PodIp {
        #[prost(string, tag = 1)] ip: String,
    }
    SandboxNetwork {
        #[prost(string, tag = 1)] ip: String,
        #[prost(message, repeated, tag = 2)] more: Vec<PodIp>,
    }
    SandboxStatus {
        #[prost(message, optional, tag = 5)] network: Option<SandboxNetwork>,
    }
    SandboxStatusResponse {
        #[prost(message, optional, tag = 1)] status: Option<SandboxStatus>,
    }
    Sandbox {
        #[prost(string, tag = 1)] id: String,
        #[prost(message, optional, tag = 2)] metadata: Option<SandboxMetadata>,
        #[prost(int32, tag = 3)] state: i32,
        #[prost(map = "string, string", tag = 5)] labels: HashMap<String, String>,
    }
    Sandboxes {
        #[prost(message, repeated, tag = 1)] items: Vec<Sandbox>,
    }
    ImageSpec {
        #[prost(string, tag = 1)] image: String,
    }
    Image {
        #[prost(string, tag = 1)] id: String,
    }
    ImageRequest {
        #[prost(message, optional, tag = 1)] image: Option<ImageSpec>,
    }
    ImageStatusResponse {
        #[prost(message, optional, tag = 1)] image: Option<Image>,
    }
    Mount {
        #[prost(string, tag = 1)] container_path: String,
        #[prost(string, tag = 2)] host_path: String,
        #[prost(bool, tag = 3)] read_only: bool,
    }
    Resources {
        #[prost(int64, tag = 1)] cpu_period: i64,
        #[prost(int64, tag = 2)] cpu_quota: i64,
        #[prost(int64, tag = 3)] cpu_shares: i64,
        #[prost(int64, tag = 4)] memory_limit: i64,
        #[prost(int64, tag = 5)] oom_score_adj: i64,
    }
    Capabilities {
        #[prost(string, repeated, tag = 1)] add: Vec<String>,
        #[prost(string, repeated, tag = 2)] remove: Vec<String>,
    }
    Number {
        #[prost(int64, tag = 1)] value: i64,
    }
    ContainerSecurity {
        #[prost(message, optional, tag = 1)] capabilities: Option<Capabilities>,
        #[prost(bool, tag = 2)] privileged: bool,
        #[prost(message, optional, tag = 3)] namespaces: Option<Namespaces>,
        #[prost(message, optional, tag = 5)] user: Option<Number>,
        #[prost(message, optional, tag = 12)] group: Option<Number>,
        #[prost(bool, tag = 7)] read_only_root: bool,
        #[prost(bool, tag = 11)] no_new_privileges: bool,
        #[prost(string, repeated, tag = 13)] masked_paths: Vec<String>,
        #[prost(string, repeated, tag = 14)] read_only_paths: Vec<String>,
    }
    LinuxContainer {
        #[prost(message, optional, tag = 1)] resources: Option<Resources>,
        #[prost(message, optional, tag = 2)] security: Option<ContainerSecurity>,
    }
    Variable {
        #[prost(string, tag = 1)] key: String,
        #[prost(string, tag = 2)] value: String,
    }
    ContainerMetadata {
        #[prost(string, tag = 1)] name: String,
        #[prost(uint32, tag = 2)] attempt: u32,
    }
    ContainerConfig {
        #[prost(message, optional, tag = 1)] metadata: Option<ContainerMetadata>,
        #[prost(message, optional, tag = 2)] image: Option<ImageSpec>,
        #[prost(string, repeated, tag = 3)] command: Vec<String>,
        #[prost(string, repeated, tag = 4)] args: Vec<String>,
        #[prost(string, tag = 5)] working_dir: String,
        #[prost(message, repeated, tag = 6)] variables: Vec<Variable>,
        #[prost(message, repeated, tag = 7)] mounts: Vec<Mount>,
        #[prost(map = "string, string", tag = 9)] labels: HashMap<String, String>,
        #[prost(string, tag = 11)] log_path: String,
        #[prost(bool, tag = 12)] stdin: bool,
        #[prost(bool, tag = 14)] tty: bool,
        #[prost(message, optional, tag = 15)] linux: Option<LinuxContainer>,
    }
    CreateContainerRequest {
        #[prost(string, tag = 1)] sandbox: String,
        #[prost(message, optional, tag = 2)] config: Option<ContainerConfig>,
        #[prost(message, optional, tag = 3)] sandbox_config: Option<SandboxConfig>,
    }
    Container {
        #[prost(string, tag = 1)] id: String,
        #[prost(string, tag = 2)] sandbox: String,
        #[prost(message, optional, tag = 3)] metadata: Option<ContainerMetadata>,
        #[prost(int32, tag = 6)] state: i32,
        #[prost(map = "string, string", tag = 8)] labels: HashMap<String, String>,
    }
    Containers {
        #[prost(message, repeated, tag = 1)] items: Vec<Container>,
    }
    ContainerStatus {
        #[prost(int32, tag = 3)] state: i32,
        #[prost(int64, tag = 5)] started_at: i64,
        #[prost(int64, tag = 6)] finished_at: i64,
        #[prost(int32, tag = 7)] exit_code: i32,
        #[prost(message, optional, tag = 8)] image: Option<ImageSpec>,
        #[prost(string, tag = 9)] image_ref: String,
        #[prost(string, tag = 10)] reason: String,
        #[prost(string, tag = 11)] message: String,
    }
    ContainerStatusResponse {
        #[prost(message, optional, tag = 1)] status: Option<ContainerStatus>,
    }
    StopContainerRequest {
        #[prost(string, tag = 1)] id: String,
        #[prost(int64, tag = 2)] timeout: i64,
    }
    ExecSyncRequest {
        #[prost(string, tag = 1)] id: String,
        #[prost(string, repeated, tag = 2)] command: Vec<String>,
        #[prost(int64, tag = 3)] timeout: i64,
    }
    ExecSyncResponse {
        #[prost(bytes = "vec", tag = 1)] stdout: Vec<u8>,
        #[prost(bytes = "vec", tag = 2)] stderr: Vec<u8>,
        #[prost(int32, tag = 3)] exit_code: i32,
    }
    ExecRequest {
        #[prost(string, tag = 1)] id: String,
        #[prost(string, repeated, tag = 2)] command: Vec<String>,
        #[prost(bool, tag = 3)] tty: bool,
        #[prost(bool, tag = 4)] stdin: bool,
        #[prost(bool, tag = 5)] stdout: bool,
        #[prost(bool, tag = 6)] stderr: bool,
    }
    AttachRequest {
        #[prost(string, tag = 1)] id: String,
        #[prost(bool, tag = 2)] stdin: bool,
        #[prost(bool, tag = 3)] tty: bool,
        #[prost(bool, tag = 4)] stdout: bool,
        #[prost(bool, tag = 5)] stderr: bool,
    }
    Url {
        #[prost(string, tag = 1)] url: String,
    }
}

/// Namespaces of a container: of its pod, of its own, of the node.
pub(super) const POD: i32 = 0;
/// See [`POD`].
pub(super) const OWN: i32 = 1;
/// See [`POD`].
pub(super) const NODE: i32 = 2;
/// A sandbox that can be used.
pub(super) const READY: i32 = 0;
/// A container that has been made and not been started.
pub(super) const CREATED: i32 = 0;
/// A container that runs.
pub(super) const RUNNING: i32 = 1;

/// The way to a runtime.
#[derive(Clone, Debug)]
pub(super) struct Client(Channel);

impl Client {
    /// To a unix socket; connected to with the first call, and again when the connection is lost.
    pub(super) fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        // The address is only for the headers.
        let endpoint = Endpoint::from_static("http://localhost");
        Self(endpoint.connect_with_connector_lazy(connect))
    }

    /// A call of the runtime's service.
    pub(super) async fn runtime<Q, A>(&self, method: &'static str, ask: Q) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.call("runtime.v1.RuntimeService", method, ask, PATIENCE)
            .await
    }

    /// A call of the service for images.
    pub(super) async fn images<Q, A>(&self, method: &'static str, ask: Q) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        // An image may be large, and the way to it slow.
        self.call("runtime.v1.ImageService", method, ask, PATIENCE * 10)
            .await
    }

    /// A call that takes so long and a bit more.
    pub(super) async fn wait<Q, A>(&self, method: &'static str, ask: Q, limit: Duration) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.call("runtime.v1.RuntimeService", method, ask, PATIENCE + limit)
            .await
    }

    async fn call<Q, A>(&self, service: &str, method: &str, ask: Q, limit: Duration) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let path = PathAndQuery::try_from(format!("/{service}/{method}"))
            .map_err(|error| Status::internal(error.to_string()))?;
        let mut grpc = Grpc::new(self.0.clone()).max_decoding_message_size(LARGEST);
        let asked = async {
            grpc.ready()
                .await
                .map_err(|error| Status::unavailable(format!("the container runtime: {error}")))?;
            grpc.unary(Request::new(ask), path, ProstCodec::<Q, A>::default())
                .await
        };
        let answer = tokio::time::timeout(limit, asked).await.map_err(|_| {
            Status::deadline_exceeded(format!("{method}: no answer in {} s", limit.as_secs()))
        })?;
        answer.map(tonic::Response::into_inner)
    }
}
