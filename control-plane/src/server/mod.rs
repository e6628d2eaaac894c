//! The API server: requests in, objects and Status errors out.

mod apply;
mod audit;
mod auth;
mod binding;
mod bootstrap;
mod claims;
mod codec;
mod connection;
mod delete;
mod errors;
mod events;
mod kubelet;
mod limits;
mod members;
mod namespaces;
mod nodes;
mod protobuf;
mod rbac;
mod read;
mod request;
mod response;
mod reviews;
mod roles;
mod route;
mod scale;
mod signing;
mod tokens;
mod watch;
mod write;

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use hyper::upgrade::OnUpgrade;
use serde_json::Value;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

pub use audit::Audit;
pub use bootstrap::Bootstrap;
pub use connection::serve;
pub use limits::Limits;
pub use members::Members;
pub use tokens::Tokens;

use crate::error::{ApiError, Cause};
use crate::pki::{Identity, Pki};
use crate::resource::{Allocator, ResourceInfo};
use crate::store::{Range, Store, StoreError};
use crate::{backup, discovery, openapi};
use audit::Record;
use auth::{Ask, User};
use request::{Accept, Params};
use response::Body;
use route::{Route, Target};

/// The API: what every request works on.
pub struct Api {
    store: Arc<dyn Store>,
    /// Cluster addresses and node ports. Held while a Service is updated, so that what it takes or gives back is
    /// decided together with the write.
    allocator: Mutex<Allocator>,
    /// Namespaces whose content is to be removed.
    doomed: mpsc::UnboundedSender<String>,
    /// Signs and reads service account tokens.
    tokens: Tokens,
    /// Signs certificates of nodes.
    pki: Pki,
    doors: Doors,
    /// Ends watches, so that connections can end.
    shutdown: CancellationToken,
    /// Host and port under which clients reach the API.
    address: String,
}

/// What guards the API beside rights.
#[derive(Debug)]
pub struct Doors {
    /// How much may be asked at a time.
    pub limits: Limits,
    /// Where requests are logged.
    pub audit: Option<Audit>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// What must run besides the connections: removes the content of deleted namespaces.
#[derive(Debug)]
pub struct NamespaceRemover(mpsc::UnboundedReceiver<String>);

/// A request without its body.
struct Parts<'a> {
    method: &'a Method,
    params: Params,
    headers: &'a HeaderMap,
    accept: Accept,
    user: User,
    query: &'a str,
    /// The connection, for those who want to speak something else over it.
    upgrade: Option<OnUpgrade>,
}

impl Api {
    /// An API on `store`. `address` is the host and port under which clients reach it.
    ///
    /// # Errors
    /// When the stored Services cannot be read.
    pub async fn new(
        store: Arc<dyn Store>,
        allocator: Allocator,
        (tokens, pki): (Tokens, Pki),
        address: String,
        doors: Doors,
        shutdown: CancellationToken,
    ) -> Result<(Arc<Self>, NamespaceRemover), StoreError> {
        let (doomed, remover) = mpsc::unbounded_channel();
        let api = Self {
            store,
            allocator: Mutex::new(allocator),
            doomed,
            tokens,
            pki,
            doors,
            shutdown,
            address,
        };
        if let Some(services) = crate::resource::find("", "v1", "services") {
            api.adopt_services(&Target::collection(services, "")).await?;
        }
        Ok((Arc::new(api), NamespaceRemover(remover)))
    }

    /// Forgets history older than about `interval` and events older than an hour, as long as anything is written, until the
    /// API shuts down.
    pub async fn compact_periodically(&self, interval: std::time::Duration) {
        let mut last = 0;
        loop {
            // Asleep while nothing is written: nothing to forget either.
            let step = async {
                self.store.reached(last + 1).await?;
                let seen = self.store.get("").await?.1;
                tokio::time::sleep(interval).await;
                self.store.compact(seen).await?;
                if let Err(error) = self.expire_events().await {
                    tracing::warn!(%error, "old events were not deleted");
                }
                Ok::<u64, StoreError>(seen)
            };
            match self.shutdown.run_until_cancelled(step).await {
                None | Some(Err(StoreError::Closed)) => return,
                Some(Ok(seen)) => last = seen,
                Some(Err(error)) => {
                    tracing::warn!(%error, "history was not compacted; trying again later");
                    self.shutdown
                        .run_until_cancelled(tokio::time::sleep(interval))
                        .await;
                }
            }
        }
    }

    /// Forgets all history up to now.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn forget_history(&self) -> Result<(), StoreError> {
        let (_, revision) = self.store.get("").await?;
        self.store.compact(revision).await
    }

    /// Answers one request. `user` is who the client's certificate says it is.
    pub async fn handle<B>(self: &Arc<Self>, user: Option<&Identity>, request: Request<B>) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (head, mut body) = request.into_parts();
        let route = route::parse(head.uri.path());
        let params = Params::parse(head.uri.query());
        if let Some(answer) = public(&route, &head.method, &params) {
            return answer;
        }
        let ask = Ask::of(&head.method, &params, &route, head.uri.path());
        let record = self.doors.audit.as_ref().map(|_| Record::new(&head, &ask));
        let (user, answer) = match self.identify(user, &head.headers).await {
            Ok(user) => {
                let answer = self.serve(&user, &ask, &head, params, route, &mut body).await;
                (Some(user), answer)
            }
            Err(error) => (None, Err(error)),
        };
        let answer = answer.unwrap_or_else(|error| {
            if error.code >= 500 {
                let user = user.as_ref().map(|user| user.name.as_str());
                tracing::warn!(method = %head.method, path = head.uri.path(), user, %error, "request failed");
            }
            response::error(&error)
        });
        if answer.status().is_client_error() && !head.headers.contains_key(http::header::EXPECT) {
            request::drain(&mut body).await;
        }
        if let (Some(audit), Some(record)) = (&self.doors.audit, &record) {
            audit
                .record(record, user.as_ref(), answer.status().as_u16())
                .await;
        }
        answer
    }

    async fn serve<B>(
        self: &Arc<Self>,
        user: &User,
        ask: &Ask,
        head: &http::request::Parts,
        params: Params,
        route: Route,
        body: B,
    ) -> Result<Response<Body>, ApiError>
    where
        B: hyper::body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if !self.allowed(user, ask).await? {
            return Err(auth::forbidden(user, ask));
        }
        let _place = self.doors.limits.place(user, ask)?;
        if matches!(route, Route::OpenApiV2) && head.method == Method::GET {
            return Ok(response::bytes(200, openapi::V2_TYPE, openapi::V2));
        }
        let parts = Parts {
            method: &head.method,
            params,
            headers: &head.headers,
            accept: Accept::parse(&head.headers)?,
            user: user.clone(),
            query: head.uri.query().unwrap_or_default(),
            upgrade: head.extensions.get().cloned(),
        };
        match route {
            Route::Objects(target) => self.objects(&parts, &target, body).await,
            Route::Review(review) => self.review(&parts, &parts.user, review, body).await,
            Route::Backup if *parts.method == Method::GET => self.backup().await,
            other if *parts.method == Method::GET => self.document(&parts, &other),
            Route::Unknown => Err(ApiError::unknown_path()),
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// Everything that is stored, as it is at one moment.
    async fn backup(&self) -> Result<Response<Body>, ApiError> {
        let page = self.store.list(Range::default()).await?;
        let lines = backup::lines(page).map_err(|error| ApiError::internal(&error.to_string()))?;
        Ok(response::stream(lines))
    }

    /// Who the client is, or who it acts for.
    async fn identify(&self, user: Option<&Identity>, headers: &HeaderMap) -> Result<User, ApiError> {
        let user = self.authenticate(user, headers).await?;
        self.impersonate(user, headers).await
    }

    /// Documents that do not change while the server runs.
    fn document(&self, parts: &Parts<'_>, route: &Route) -> Result<Response<Body>, ApiError> {
        let aggregated =
            |document: Value| response::bytes(200, discovery::AGGREGATED_V2, document.to_string());
        let found = match route {
            Route::Api if parts.accept.aggregated => return Ok(aggregated(discovery::aggregated_api())),
            Route::Apis if parts.accept.aggregated => return Ok(aggregated(discovery::aggregated_apis())),
            Route::Api => Some(discovery::api_versions(&self.address)),
            Route::Apis => Some(discovery::api_groups()),
            Route::Group(group) => discovery::api_group(group),
            Route::Resources(group, version) => discovery::resource_list(group, version),
            Route::OpenApiIndex => return Ok(response::text(200, openapi::index().to_string())),
            Route::OpenApi(group_version) => openapi::document(group_version),
            _ => None,
        };
        found
            .map(|document| response::value(200, parts.accept, &document))
            .ok_or_else(ApiError::unknown_path)
    }

    async fn objects<B>(
        self: &Arc<Self>,
        parts: &Parts<'_>,
        target: &Target,
        body: B,
    ) -> Result<Response<Body>, ApiError>
    where
        B: hyper::body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let r = target.resource;
        let verb = verb(parts.method, &parts.params, target).ok_or_else(ApiError::method_not_allowed)?;
        let allowed = match &target.subresource {
            Some(name) => r
                .subresource(name)
                .is_some_and(|subresource| subresource.verbs.contains(&verb)),
            None => r.allows(verb),
        };
        // Objects are created in a namespace and deleted there; only reading goes across all of them.
        let scoped = !r.namespaced || !target.namespace.is_empty() || matches!(verb, "list" | "watch");
        if !allowed || !scoped {
            return Err(ApiError::method_not_allowed());
        }
        match (verb, &target.name, target.subresource.as_deref()) {
            ("watch", _, _) => self.watch(parts, target).await,
            ("list", _, _) => self.list(parts, target).await,
            ("get", Some(name), Some("scale")) => self.get_scale(parts, target, name).await,
            ("update", Some(name), Some("scale")) => {
                let scale = request::read_body(body).await?;
                self.update_scale(parts, target, name, &scale).await
            }
            ("patch", Some(name), Some("scale")) => {
                let patch = request::read_body(body).await?;
                self.patch_scale(parts, target, name, &patch).await
            }
            ("get", Some(name), Some("log")) => self.pod_log(parts, target, name).await,
            ("get" | "create", Some(name), Some(what @ ("attach" | "exec"))) => {
                self.pod_stream(parts, target, name, what).await
            }
            ("get", Some(name), _) => self.get(parts, target, name).await,
            ("create", None, _) => {
                let object = self.read_object(parts, r, body).await?;
                self.create(parts, target, object).await
            }
            ("create", Some(name), Some("binding")) => {
                let binding = request::decode(
                    &request::content_type(parts.headers),
                    &request::read_body(body).await?,
                )?
                .map_err(ApiError::bad_request)?;
                self.bind(parts, target, name, &binding).await
            }
            ("create", Some(name), Some("token")) => {
                let asked = request::decode(
                    &request::content_type(parts.headers),
                    &request::read_body(body).await?,
                )?
                .map_err(ApiError::bad_request)?;
                let dry_run = parts.params.dry_run()?;
                let token = self
                    .request_token(&target.namespace, name, dry_run, asked)
                    .await?;
                Ok(response::value(201, parts.accept, &token))
            }
            ("create", Some(name), Some("eviction")) => {
                let eviction = request::decode(
                    &request::content_type(parts.headers),
                    &request::read_body(body).await?,
                )?
                .map_err(ApiError::bad_request)?;
                self.evict(parts, target, name, &eviction).await
            }
            ("update", Some(name), subresource) => {
                let object = self.read_object(parts, r, body).await?;
                self.update(parts, target, name, subresource, object).await
            }
            ("patch", Some(name), subresource) => {
                let patch = request::read_body(body).await?;
                if request::content_type(parts.headers) == crate::patch::APPLY_PATCH {
                    return self.apply(parts, target, name, subresource, &patch).await;
                }
                if parts.params.has("force") {
                    return Err(ApiError::invalid_options(
                        "PatchOptions",
                        &Cause::forbidden("force", "may not be specified for non-apply patch"),
                    ));
                }
                self.patch(parts, target, name, subresource, &patch).await
            }
            ("delete", Some(name), _) => {
                let options = delete::Options::read(parts, body).await?;
                self.delete(parts, target, name, &options).await
            }
            ("deletecollection", None, _) => {
                let options = delete::Options::read(parts, body).await?;
                self.delete_collection(parts, target, &options).await
            }
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    async fn read_object<B>(&self, parts: &Parts<'_>, r: &ResourceInfo, body: B) -> Result<Value, ApiError>
    where
        B: hyper::body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let content_type = request::content_type(parts.headers);
        request::decode_object(r, &content_type, &request::read_body(body).await?)
    }

    /// Asks for the content of a namespace to be looked at again.
    fn recheck_namespace(&self, namespace: &str) {
        // Nobody listens any more only when the server shuts down; the next start looks at all namespaces.
        drop(self.doomed.send(namespace.to_owned()));
    }
}

/// The API's word for what a request does.
fn verb(method: &Method, params: &Params, target: &Target) -> Option<&'static str> {
    let watch = params.flag("watch") && target.subresource.is_none();
    match (method.as_str(), target.name.is_some()) {
        ("GET", _) if watch => Some("watch"),
        ("GET", true) => Some("get"),
        ("GET", false) => Some("list"),
        ("POST", false) => Some("create"),
        ("POST", true) if target.subresource.is_some() => Some("create"),
        ("PUT", true) => Some("update"),
        ("PATCH", true) => Some("patch"),
        ("DELETE", true) => Some("delete"),
        ("DELETE", false) => Some("deletecollection"),
        _ => None,
    }
}

/// What anyone may ask.
fn public(route: &Route, method: &Method, params: &Params) -> Option<Response<Body>> {
    if *method != Method::GET {
        return None;
    }
    match route {
        Route::Version => Some(response::json(200, &discovery::version())),
        Route::Health(which, check) => Some(health(which, check.as_deref(), params)),
        _ => None,
    }
}

/// The server only listens once its store is open and its own objects exist, so an answer at all is good news.
fn health(which: &str, check: Option<&str>, params: &Params) -> Response<Body> {
    const CHECKS: [&str; 3] = ["ping", "log", "store"];
    let excluded: HashSet<&str> = params.get("exclude").split(',').collect();
    match check {
        Some(check) if !CHECKS.contains(&check) => response::text(404, "404 page not found\n"),
        None if params.has("verbose") => {
            let mut body = String::new();
            for check in CHECKS {
                let state = if excluded.contains(check) {
                    "excluded: ok"
                } else {
                    "ok"
                };
                body.push_str(&format!("[+]{check} {state}\n"));
            }
            body.push_str(&format!("{which} check passed\n"));
            response::text(200, body)
        }
        _ => response::text(200, "ok"),
    }
}
