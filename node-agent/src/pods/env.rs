//! The environment of a container.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    Container, EnvVarSource, ObjectFieldSelector, Pod, ResourceFieldSelector, Service,
};
use kube::api::ListParams;
use kube::{Api, Client};

use super::sources::{Sources, unusable};
use super::statics;
use crate::node;
use crate::runtime::Failure;

/// What a container may ask about its pod beside what the object says.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    pub(super) pod_ips: Vec<IpAddr>,
    pub(super) host_ips: Vec<IpAddr>,
}

/// All variables, later ones replace earlier ones of the same name.
///
/// # Errors
/// When something that the container needs is not there.
pub(super) async fn environment(
    client: &Client,
    pod: &Pod,
    container: &Container,
    facts: &Facts,
) -> Result<Vec<(String, String)>, Failure> {
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let sources = Sources {
        client,
        namespace: &namespace,
    };
    let mut env = BTreeMap::new();
    let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links);
    match sources.services(links.unwrap_or(true)).await {
        Ok(services) => env.extend(services),
        // It may be what the API itself needs.
        Err(_) if statics::is_static(pod) => {}
        Err(failure) => return Err(failure),
    }
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let values = if let Some(of) = &from.config_map_ref {
            sources.config_map(&of.name, of.optional).await?
        } else if let Some(of) = &from.secret_ref {
            sources.secret(&of.name, of.optional).await?
        } else {
            None
        };
        for (key, value) in values.unwrap_or_default() {
            // Variables are text.
            if let Ok(value) = String::from_utf8(value) {
                env.insert(format!("{prefix}{key}"), value);
            }
        }
    }
    for var in container.env.iter().flatten() {
        let value = match &var.value_from {
            None => Some(expand(var.value.as_deref().unwrap_or_default(), &env)),
            Some(from) => sources.value(pod, container, from, facts).await?,
        };
        if let Some(value) = value {
            env.insert(var.name.clone(), value);
        }
    }
    Ok(env.into_iter().collect())
}

impl Sources<'_> {
    async fn value(
        &self,
        pod: &Pod,
        container: &Container,
        from: &EnvVarSource,
        facts: &Facts,
    ) -> Result<Option<String>, Failure> {
        let (values, key, optional, what) = if let Some(of) = &from.config_map_key_ref {
            let values = self.config_map(&of.name, of.optional).await?;
            (values, &of.key, of.optional, format!("configmap {:?}", of.name))
        } else if let Some(of) = &from.secret_key_ref {
            let values = self.secret(&of.name, of.optional).await?;
            (values, &of.key, of.optional, format!("secret {:?}", of.name))
        } else if let Some(of) = &from.field_ref {
            return field(pod, of, facts).map(Some);
        } else if let Some(of) = &from.resource_field_ref {
            return resource(container, of).map(Some);
        } else {
            return Err(unusable("a variable with a source of an unknown kind"));
        };
        match values.unwrap_or_default().remove(key) {
            Some(value) => String::from_utf8(value)
                .map(Some)
                .map_err(|_| unusable(format!("key {key} in {what} is no text"))),
            None if optional == Some(true) => Ok(None),
            None => Err(unusable(format!("couldn't find key {key} in {what}"))),
        }
    }

    /// Variables of Services: those of the pod's namespace, and the API.
    async fn services(&self, links: bool) -> Result<Vec<(String, String)>, Failure> {
        let failed = |error: kube::Error| unusable(format!("services: {error}"));
        let default: Api<Service> = Api::namespaced(self.client.clone(), "default");
        let mut services: Vec<Service> = default
            .get_opt("kubernetes")
            .await
            .map_err(failed)?
            .into_iter()
            .collect();
        if links {
            let own: Api<Service> = Api::namespaced(self.client.clone(), self.namespace);
            services.extend(own.list(&ListParams::default()).await.map_err(failed)?);
        }
        Ok(services.iter().flat_map(service_variables).collect())
    }
}

/// Variables of a Service in the two old forms (kubelet `envvars.FromServices`).
fn service_variables(service: &Service) -> Vec<(String, String)> {
    let Some(spec) = &service.spec else {
        return Vec::new();
    };
    let ip = spec.cluster_ip.clone().unwrap_or_default();
    let ports = spec.ports.as_deref().unwrap_or_default();
    let (Some(first), false) = (ports.first(), ip.is_empty() || ip == "None") else {
        return Vec::new();
    };
    let shout = |text: &str| text.replace('-', "_").to_ascii_uppercase();
    let name = shout(service.metadata.name.as_deref().unwrap_or_default());
    let host = if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.clone()
    };
    let mut variables = vec![
        (format!("{name}_SERVICE_HOST"), ip.clone()),
        (format!("{name}_SERVICE_PORT"), first.port.to_string()),
    ];
    for (i, port) in ports.iter().enumerate() {
        let number = port.port;
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let lower = protocol.to_ascii_lowercase();
        if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            variables.push((
                format!("{name}_SERVICE_PORT_{}", shout(port_name)),
                number.to_string(),
            ));
        }
        let url = format!("{lower}://{host}:{number}");
        if i == 0 {
            variables.push((format!("{name}_PORT"), url.clone()));
        }
        let prefix = format!("{name}_PORT_{number}_{protocol}");
        variables.extend([
            (prefix.clone(), url),
            (format!("{prefix}_PROTO"), lower),
            (format!("{prefix}_PORT"), number.to_string()),
            (format!("{prefix}_ADDR"), ip.clone()),
        ]);
    }
    variables
}

fn joined(ips: &[IpAddr]) -> String {
    let texts: Vec<String> = ips.iter().map(ToString::to_string).collect();
    texts.join(",")
}

/// A field of the pod, by its path.
pub(super) fn field(pod: &Pod, of: &ObjectFieldSelector, facts: &Facts) -> Result<String, Failure> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let one = |ips: &[IpAddr]| ips.first().map(ToString::to_string).unwrap_or_default();
    let path = of.field_path.as_str();
    if let Some((list, key)) = path.split_once("['") {
        let key = key.trim_end_matches("']");
        let map = match list {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return Err(unusable(format!("field {path:?} is not supported"))),
        };
        return Ok(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "spec.nodeName" => spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_default(),
        "status.podIP" => one(&facts.pod_ips),
        "status.podIPs" => joined(&facts.pod_ips),
        "status.hostIP" => one(&facts.host_ips),
        "status.hostIPs" => joined(&facts.host_ips),
        _ => return Err(unusable(format!("field {path:?} is not supported"))),
    })
}

/// A request or limit in units of the divisor, rounded up. What has no limit may use the whole node.
pub(super) fn resource(container: &Container, of: &ResourceFieldSelector) -> Result<String, Failure> {
    let path = of.resource.as_str();
    let resources = container.resources.as_ref();
    let (list, name) = match path.split_once('.') {
        Some(("limits", name)) => (resources.and_then(|all| all.limits.as_ref()), name),
        Some(("requests", name)) => (resources.and_then(|all| all.requests.as_ref()), name),
        _ => return Err(unusable(format!("resource {path:?} is not supported"))),
    };
    let quantity = list.and_then(|list| milli(&list.get(name)?.0));
    let whole = || match name {
        _ if path.starts_with("requests") => 0,
        "cpu" => node::processors() * 1000,
        "memory" => node::memory().saturating_mul(1000),
        _ => 0,
    };
    let divisor = of.divisor.as_ref().and_then(|divisor| milli(&divisor.0));
    let divisor = divisor.filter(|divisor| *divisor > 0).unwrap_or(1000);
    Ok(quantity.unwrap_or_else(whole).div_ceil(divisor).to_string())
}

/// A quantity of the API in thousandths; nothing if it cannot be read.
pub(super) fn milli(text: &str) -> Option<u64> {
    const SUFFIXES: [(&str, u64); 11] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("m", 0),
        ("k", 1000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("E", 1_000_000_000_000_000_000),
        ("", 1),
    ];
    let (number, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    if factor == 0 {
        return Some(whole);
    }
    let digits: String = fraction.chars().chain("000".chars()).take(3).collect();
    let thousandths: u64 = digits.parse().ok()?;
    whole
        .checked_mul(1000)?
        .checked_add(thousandths)?
        .checked_mul(factor)
}

/// Replaces `$(NAME)` by a variable; `$$(NAME)` is `$(NAME)`; names that are not known stay.
pub(super) fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(escaped) = after.strip_prefix('$') {
            out.push('$');
            rest = escaped;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match env.get(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn variables_in_text() {
        let env = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        for (text, expected) in [
            ("x$(A)y", "x1y"),
            ("$$(A)", "$(A)"),
            ("$(B) $A $", "$(B) $A $"),
            ("$(A", "$(A"),
            ("", ""),
        ] {
            assert_eq!(expand(text, &env), expected, "{text}");
        }
    }

    #[test]
    fn quantities() {
        for (text, expected) in [
            ("1", Some(1000)),
            ("250m", Some(250)),
            ("1.5", Some(1500)),
            ("64Mi", Some(64 * 1024 * 1024 * 1000)),
            ("2k", Some(2_000_000)),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(milli(text), expected, "{text}");
        }
    }

    #[test]
    fn resources_in_units_of_the_divisor() {
        let container: Container = serde_json::from_value(json!({
            "name": "c", "resources": {"limits": {"memory": "64Mi"}, "requests": {"cpu": "250m"}},
        }))
        .unwrap();
        let ask = |path: &str, divisor: &str| {
            let of = json!({"resource": path, "divisor": divisor});
            resource(&container, &serde_json::from_value(of).unwrap())
        };
        assert_eq!(ask("limits.memory", "1Mi").unwrap(), "64");
        assert_eq!(ask("limits.memory", "0").unwrap(), "67108864");
        assert_eq!(ask("requests.cpu", "1").unwrap(), "1");
        assert_eq!(ask("requests.cpu", "1m").unwrap(), "250");
        assert_eq!(ask("limits.cpu", "1").unwrap(), node::processors().to_string());
        assert!(ask("memory", "1").is_err());
    }

    #[test]
    fn services_are_in_the_environment() {
        let service = serde_json::from_value(json!({
            "metadata": {"name": "my-web"},
            "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
        }))
        .unwrap();
        let variables: BTreeMap<String, String> = service_variables(&service).into_iter().collect();
        for (name, value) in [
            ("MY_WEB_SERVICE_HOST", "10.96.0.7"),
            ("MY_WEB_SERVICE_PORT", "80"),
            ("MY_WEB_SERVICE_PORT_HTTP", "80"),
            ("MY_WEB_PORT", "tcp://10.96.0.7:80"),
            ("MY_WEB_PORT_80_TCP_ADDR", "10.96.0.7"),
        ] {
            assert_eq!(variables.get(name).map(String::as_str), Some(value), "{name}");
        }
        let headless = serde_json::from_value(json!({
            "metadata": {"name": "h"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]},
        }))
        .unwrap();
        assert!(service_variables(&headless).is_empty());
    }
}
