//! What the API asks nodes for: the logs of containers, and commands in them.
//!
//! The node shows the certificate that it is known by here, so that nobody else can answer in its place, also somebody
//! with an address that was the node's.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::{BodyDataStream, BodyExt as _, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::response::Body;
use super::route::Target;
use super::{Api, Parts, codec, write};
use crate::error::ApiError;
use crate::pki::Identity;

/// A node that does not answer by then is not there.
const PATIENCE: Duration = Duration::from_secs(10);
/// Options that a node understands.
const OPTIONS: [&str; 7] = [
    "follow",
    "previous",
    "tailLines",
    "limitBytes",
    "sinceSeconds",
    "sinceTime",
    "timestamps",
];

impl Api {
    /// The log of a pod's container, as its node tells it.
    pub(super) async fn pod_log(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
    ) -> Result<Response<Body>, ApiError> {
        let (node, container, pod) = self.place(parts, target, name).await?;
        if let Some(reason) = waits(&pod, &container) {
            return Err(ApiError::bad_request(format!(
                "container {container:?} in pod {name:?} is waiting to start: {reason}"
            )));
        }
        let query: Vec<String> = OPTIONS
            .iter()
            .map(|option| (option, parts.params.get(option)))
            .filter(|(_, value)| !value.is_empty())
            .map(|(option, value)| {
                let value: String = form_urlencoded::byte_serialize(value.as_bytes()).collect();
                format!("{option}={value}")
            })
            .collect();
        let path = format!(
            "/containerLogs/{}/{name}/{container}?{}",
            target.namespace,
            query.join("&")
        );
        self.ask_node(&node, &path).await
    }

    /// A pod's node and container, and the pod.
    async fn place(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
    ) -> Result<(String, String, Value), ApiError> {
        let pods = write::collection("", "pods", &target.namespace)?;
        let stored = self.stored(&pods, name).await?;
        let pod = codec::decode(pods.resource, stored.revision, &stored.value)?;
        let container = container(&pod, name, parts.params.get("container"))?;
        let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        if node.is_empty() {
            return Err(ApiError::bad_request(format!(
                "pod {name:?} does not have a host assigned"
            )));
        }
        Ok((node.to_owned(), container, pod))
    }

    /// `exec` and `attach`: a WebSocket between the client and the pod's node, whose bytes are passed on as they are.
    pub(super) async fn pod_stream(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        what: &str,
    ) -> Result<Response<Body>, ApiError> {
        let (node, container, _) = self.place(parts, target, name).await?;
        let Some(client) = parts.upgrade.clone() else {
            return Err(ApiError::bad_request("Upgrade request required"));
        };
        let path = format!("/{what}/{}/{name}/{container}?{}", target.namespace, parts.query);
        let mut request = Request::get(&path).header(http::header::CONNECTION, "Upgrade");
        for (header, value) in parts.headers {
            if *header == http::header::UPGRADE || header.as_str().starts_with("sec-websocket-") {
                request = request.header(header, value);
            }
        }
        let mut answer = self.send_to_node(&node, &path, request).await?.0;
        if answer.status() != http::StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(answer).await);
        }
        let mut response = Response::new(Empty::new().boxed_unsync());
        *response.status_mut() = answer.status();
        let passed = answer.headers().iter();
        let passed = passed.filter(|(header, _)| {
            [http::header::CONNECTION, http::header::UPGRADE].contains(header)
                || header.as_str().starts_with("sec-websocket-")
        });
        response
            .headers_mut()
            .extend(passed.map(|(header, value)| (header.clone(), value.clone())));
        let server = hyper::upgrade::on(&mut answer);
        let end = self.shutdown.clone();
        tokio::spawn(end.run_until_cancelled_owned(async move {
            let both = async {
                let (client, server) = tokio::try_join!(client, server)?;
                let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
                tokio::io::copy_bidirectional(&mut client, &mut server).await?;
                Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
            };
            if let Err(error) = both.await {
                tracing::debug!(error, "a stream between a client and a node was cut off");
            }
        }));
        Ok(response)
    }

    /// A node's answer to a GET, as a stream.
    async fn ask_node(&self, node: &str, path: &str) -> Result<Response<Body>, ApiError> {
        let (answer, sender) = self.send_to_node(node, path, Request::get(path)).await?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        // The stream ends with the node's; the sender is kept so long, as the connection ends with it.
        let frames = BodyDataStream::new(answer.into_body())
            .take_while(|part| futures::future::ready(part.is_ok()))
            .filter_map(|part| futures::future::ready(part.ok()))
            .map(move |bytes| {
                let _open = &sender;
                Ok::<_, Infallible>(Frame::data(bytes))
            });
        let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
        response.headers_mut().insert(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static("text/plain"),
        );
        Ok(response)
    }

    /// A node's answer, and what keeps the connection.
    async fn send_to_node(
        &self,
        node: &str,
        path: &str,
        request: http::request::Builder,
    ) -> Result<(Response<Incoming>, SendRequest<Empty<Bytes>>), ApiError> {
        let nodes = write::collection("", "nodes", "")?;
        let stored = self.stored(&nodes, node).await?;
        let object = codec::decode(nodes.resource, stored.revision, &stored.value)?;
        let addresses = object["status"]["addresses"].as_array().into_iter().flatten();
        let address = addresses
            .filter(|address| address["type"] == "InternalIP")
            .find_map(|address| address["address"].as_str()?.parse().ok());
        let port = object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
        let port = port
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port > 0);
        let (Some(address), Some(port)) = (address, port) else {
            return Err(ApiError::internal(&format!(
                "node {node:?} serves neither logs nor commands"
            )));
        };
        let address = std::net::SocketAddr::new(address, port);
        let failed = |error: &dyn std::fmt::Display| {
            ApiError::internal(&format!("Get \"https://{address}{path}\": {error}"))
        };
        let tls = self.node_client(node).map_err(|error| failed(&error))?;
        let connect = async {
            let stream = TcpStream::connect(address).await?;
            // What is typed must not wait for more.
            stream.set_nodelay(true)?;
            let name = ServerName::from(address.ip());
            TlsConnector::from(Arc::new(tls)).connect(name, stream).await
        };
        let stream = tokio::time::timeout(PATIENCE, connect)
            .await
            .map_err(|_| failed(&"no answer in time"))?
            .map_err(|error| failed(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(&error))?;
        tokio::spawn(connection.with_upgrades());
        let request = request
            .header(http::header::HOST, node)
            .body(Empty::<Bytes>::new())
            .map_err(|error| failed(&error))?;
        let answer = sender
            .send_request(request)
            .await
            .map_err(|error| failed(&error))?;
        Ok((answer, sender))
    }

    /// TLS to a node.
    fn node_client(&self, node: &str) -> Result<ClientConfig, crate::pki::PkiError> {
        let (verifier, certificate, key) = self.pki.for_nodes()?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let check = IsNode {
            user: format!("system:node:{node}"),
            chain: verifier,
            provider: Arc::clone(&provider),
        };
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map(|builder| {
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(check))
            })
            .and_then(|builder| builder.with_client_auth_cert(vec![certificate], key))
            .map_err(crate::pki::bad("certificate for nodes"))
    }
}

/// What a node says when it does not do what is asked.
async fn refusal(answer: Response<Incoming>) -> ApiError {
    match answer.into_body().collect().await {
        Ok(text) => ApiError::bad_request(String::from_utf8_lossy(&text.to_bytes()).into_owned()),
        Err(error) => ApiError::internal(&format!("read the answer of a node: {error}")),
    }
}

/// The container that is asked for, or the only one.
fn container(pod: &Value, name: &str, asked: &str) -> Result<String, ApiError> {
    let list = |field: &str| -> Vec<String> {
        let containers = pod["spec"][field].as_array().into_iter().flatten();
        let names = containers.filter_map(|container| container["name"].as_str());
        names.map(str::to_owned).collect()
    };
    let (mut containers, init) = (list("containers"), list("initContainers"));
    let annotated = &pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"];
    let wanted = if asked.is_empty() {
        annotated.as_str().unwrap_or_default()
    } else {
        asked
    };
    if !wanted.is_empty() {
        if containers
            .iter()
            .chain(&init)
            .any(|container| container == wanted)
        {
            return Ok(wanted.to_owned());
        }
        return Err(ApiError::bad_request(format!(
            "container {wanted} is not valid for pod {name}"
        )));
    }
    match (containers.pop(), containers.is_empty()) {
        (Some(only), true) => Ok(only),
        (last, _) => {
            containers.extend(last);
            let mut message = format!(
                "a container name must be specified for pod {name}, choose one of: [{}]",
                containers.join(" ")
            );
            if !init.is_empty() {
                message.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
            }
            Err(ApiError::bad_request(message))
        }
    }
}

/// Why the container has never been started, if it has not.
fn waits(pod: &Value, container: &str) -> Option<String> {
    let lists = ["containerStatuses", "initContainerStatuses"];
    let statuses = lists
        .iter()
        .filter_map(|list| pod["status"][list].as_array())
        .flatten();
    for status in statuses {
        if status["name"] == container {
            let never = status["containerID"].is_null();
            return never.then(|| {
                let reason = status["state"]["waiting"]["reason"].as_str();
                reason.unwrap_or("ContainerCreating").to_owned()
            });
        }
    }
    Some("ContainerCreating".to_owned())
}

/// Checks that a server has the certificate of one node.
#[derive(Debug)]
struct IsNode {
    user: String,
    chain: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for IsNode {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let identity = Identity::from_der(end_entity);
        if identity.is_some_and(|identity| identity.user == self.user) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName,
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn which_container() {
        let mut pod = json!({"spec": {"containers": [{"name": "a"}]}});
        assert_eq!(container(&pod, "p", "").unwrap(), "a");
        let error = container(&pod, "p", "b").unwrap_err();
        assert_eq!(
            (error.code, error.message.as_str()),
            (400, "container b is not valid for pod p")
        );
        pod["spec"] =
            json!({"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]});
        let error = container(&pod, "p", "").unwrap_err();
        assert_eq!(
            error.message,
            "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]"
        );
        assert_eq!(container(&pod, "p", "i").unwrap(), "i");
        pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"] = "b".into();
        assert_eq!(container(&pod, "p", "").unwrap(), "b");
    }

    #[test]
    fn a_container_that_was_never_started_has_no_log() {
        let pod = json!({"status": {"containerStatuses": [
            {"name": "a", "state": {"waiting": {"reason": "ErrImagePull"}}},
            {"name": "b", "containerID": "x", "state": {"waiting": {"reason": "CrashLoopBackOff"}}},
        ]}});
        assert_eq!(waits(&pod, "a").as_deref(), Some("ErrImagePull"));
        assert_eq!(waits(&pod, "b"), None);
        assert_eq!(waits(&json!({}), "c").as_deref(), Some("ContainerCreating"));
    }
}
