//! How the API answers, under the names that every client of Kubernetes gives it (spec kube-proxy 4): the dashboard of
//! kube-proxy shows them.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use tower::{Layer, Service};

/// Labels of an answer.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct AnswerLabels {
    /// HTTP status, or `<error>` if there was no answer.
    code: String,
    host: String,
    method: String,
}

/// Labels of a request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct RequestLabels {
    verb: String,
    host: String,
}

/// client-go's buckets.
fn histogram() -> Histogram {
    Histogram::new([0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0])
}

/// Counts requests. Clones count together.
#[derive(Clone, Debug)]
pub struct RestClient {
    pub(super) requests: Family<AnswerLabels, Counter>,
    /// Seconds until the head of the answer: a watch goes on for long.
    pub(super) duration: Family<RequestLabels, Histogram, fn() -> Histogram>,
}

impl Default for RestClient {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            duration: Family::new_with_constructor(histogram),
        }
    }
}

impl RestClient {
    /// A layer for a client of this API server (`host:port`).
    pub(super) fn layer(&self, host: &str) -> Counting {
        Counting {
            counts: self.clone(),
            host: host.into(),
        }
    }

    fn answered(&self, host: String, method: String, code: String, begun: Instant) {
        let took = begun.elapsed().as_secs_f64();
        self.duration
            .get_or_create(&RequestLabels {
                verb: method.clone(),
                host: host.clone(),
            })
            .observe(took);
        self.requests
            .get_or_create(&AnswerLabels { code, host, method })
            .inc();
    }
}

/// Makes services that count.
#[derive(Clone, Debug)]
pub(super) struct Counting {
    counts: RestClient,
    host: String,
}

impl<S> Layer<S> for Counting {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted {
            inner,
            counts: self.counts.clone(),
            host: self.host.clone(),
        }
    }
}

/// A service that counts.
#[derive(Clone, Debug)]
pub(super) struct Counted<S> {
    inner: S,
    counts: RestClient,
    host: String,
}

impl<S, A, B> Service<Request<A>> for Counted<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let method = request.method().to_string();
        let (counts, host, begun) = (self.counts.clone(), self.host.clone(), Instant::now());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let code = answer.as_ref().map_or_else(
                |_| "<error>".into(),
                |response| response.status().as_str().to_owned(),
            );
            counts.answered(host, method, code, begun);
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use k8s_openapi::api::core::v1::Node;
    use kube::Api;

    use super::super::connect;
    use super::super::metrics::{Metrics, older_text};
    use super::*;

    #[tokio::test]
    async fn answers_and_failures_are_counted() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let router = Router::new().route(
            "/api/v1/nodes/n",
            get(|| async {
                axum::Json(serde_json::json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n"}}))
            }),
        );
        let server = tokio::spawn(async move { axum::serve(listener, router).await });
        let rest = RestClient::default();
        let metrics = Metrics::new(&rest);
        let config = kube::Config::new(format!("http://{addr}").parse().unwrap());
        let nodes: Api<Node> = Api::all(connect::counted(config, &rest).unwrap());
        nodes.get("n").await.unwrap();
        nodes.get("n").await.unwrap();
        nodes.get("other").await.unwrap_err();
        let text = older_text(&metrics.text(&[]));
        for line in [
            &*format!("rest_client_requests_total{{code=\"200\",host=\"{addr}\",method=\"GET\"}} 2"),
            &*format!("rest_client_requests_total{{code=\"404\",host=\"{addr}\",method=\"GET\"}} 1"),
            &*format!("rest_client_request_duration_seconds_count{{verb=\"GET\",host=\"{addr}\"}} 3"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
        // nobody there: a connection that is not made
        server.abort();
        let gone = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let nodes: Api<Node> = Api::all(connect::counted(gone, &rest).unwrap());
        nodes.get("n").await.unwrap_err();
        let text = older_text(&metrics.text(&[]));
        let line = "rest_client_requests_total{code=\"<error>\",host=\"127.0.0.1:1\",method=\"GET\"} 1";
        assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
    }
}
