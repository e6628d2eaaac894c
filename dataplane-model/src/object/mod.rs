//! Kubernetes objects reduced to what the dataplane needs, and what was wrong with them.

mod service;
mod slice;

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::key::{Family, ObjectName};
use crate::names::Names;

pub(crate) use service::{External, Host, ServiceObject, ServicePort, range_list};
pub(crate) use slice::{SliceObject, SlicePort, endpoint_flag};

/// Label on Services that another proxy handles, whatever its value (spec kube-proxy 1.1).
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label on endpoint slices of headless Services, whatever its value.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Label that names the Service of an endpoint slice.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label on nodes.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Annotation on Services that chooses the load-balancing algorithm.
pub const ANNOTATION_ALGORITHM: &str = "beeline.dev/algorithm";
/// Annotation on Services: `off` keeps their backends from being watched for failures.
pub const ANNOTATION_FAILURE_DETECTION: &str = "beeline.dev/failure-detection";

/// Something in an object that had to be left out. The rest of the object, and all others, are used.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Problem {
    /// `Service ns/name`, `EndpointSlice ns/name` or `Node name`.
    pub object: String,
    /// What is wrong, with the value.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.message)
    }
}

/// How many problems of one object are listed one by one: an object can have thousands of the same kind.
pub const MAX_PROBLEMS: usize = 16;
/// How many characters of a problem's message are kept: it quotes values, which can be of any length.
pub const MAX_MESSAGE: usize = 240;

/// Collects the problems of one object.
pub(crate) struct Problems<'a> {
    kind: &'static str,
    name: &'a ObjectName,
    list: Vec<Problem>,
    unlisted: usize,
}

impl<'a> Problems<'a> {
    pub(crate) const fn new(kind: &'static str, name: &'a ObjectName) -> Self {
        Self {
            kind,
            name,
            list: Vec::new(),
            unlisted: 0,
        }
    }

    pub(crate) fn add(&mut self, message: String) {
        if self.list.len() == MAX_PROBLEMS {
            self.unlisted += 1;
        } else {
            self.push(message);
        }
    }

    fn push(&mut self, mut message: String) {
        if let Some((end, _)) = message.char_indices().nth(MAX_MESSAGE) {
            message.truncate(end);
            message.push('…');
        }
        // the name is as good as the object: no line break of it may end up in a log
        let object = format!("{} {}", self.kind, self.name).escape_debug().to_string();
        self.list.push(Problem { object, message });
    }

    pub(crate) fn finish(mut self) -> Vec<Problem> {
        if self.unlisted > 0 {
            self.push(format!("and {} more problems", self.unlisted));
        }
        self.list
    }
}

/// Namespace and name; an object without a name cannot be told from others.
pub(crate) fn object_name(
    kind: &'static str,
    meta: &ObjectMeta,
    names: &mut Names,
) -> Result<ObjectName, Problem> {
    match (meta.namespace.as_deref(), meta.name.as_deref()) {
        (Some(namespace), Some(name)) if !namespace.is_empty() && !name.is_empty() => Ok(ObjectName {
            namespace: names.get(namespace),
            name: name.into(),
        }),
        (namespace, name) => Err(Problem {
            object: format!(
                "{kind} {}/{}",
                namespace.unwrap_or_default(),
                name.unwrap_or_default()
            ),
            message: "has no name or no namespace".into(),
        }),
    }
}

/// Labels that no API server would take are noise, and a sign of a damaged object. (Not a full check of the syntax.)
pub(crate) fn check_labels(meta: &ObjectMeta, problems: &mut Problems<'_>) {
    let noise = |text: &str| !text.bytes().all(|b| b.is_ascii_graphic());
    for (key, value) in meta.labels.iter().flatten() {
        if noise(key) || noise(value) {
            problems.add(format!(
                "label {key:?} = {value:?} is not a valid label: it is ignored"
            ));
        }
    }
}

pub(crate) fn has_label(meta: &ObjectMeta, label: &str) -> bool {
    meta.labels
        .as_ref()
        .is_some_and(|labels| labels.contains_key(label))
}

/// A port number; 0 and what does not fit are no ports.
pub(crate) fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|&p| p != 0)
}

/// Index of a family in the arrays of the objects.
#[must_use]
pub const fn family_index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

/// What became of a Service: its name, and its reduced form unless it is not ours (headless, ExternalName, another
/// proxy's, nothing usable in it).
pub(crate) type Parsed<T> = Result<(ObjectName, Option<T>, Vec<Problem>), Problem>;
