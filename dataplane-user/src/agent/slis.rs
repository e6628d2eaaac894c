//! `/metrics/slis`: how the health checks of a component ended, as every Kubernetes component counts them.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CheckLabel {
    name: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    name: &'static str,
    status: &'static str,
    r#type: &'static str,
}

/// The results of health checks.
#[derive(Debug)]
pub struct Slis {
    registry: Registry,
    last: Family<CheckLabel, Gauge>,
    total: Family<ResultLabel, Counter>,
}

impl Default for Slis {
    fn default() -> Self {
        let mut registry = Registry::default();
        let (last, total) = (Family::default(), Family::default());
        registry.register(
            "kubernetes_healthcheck",
            "Result of the last run of a health check",
            Family::clone(&last),
        );
        registry.register(
            "kubernetes_healthchecks",
            "Runs of a health check by result",
            Family::clone(&total),
        );
        Self {
            registry,
            last,
            total,
        }
    }
}

impl Slis {
    /// A check has been made, for this endpoint (`healthz`, `livez`).
    pub fn checked(&self, name: &'static str, endpoint: &'static str, ok: bool) {
        self.last
            .get_or_create(&CheckLabel {
                name,
                r#type: endpoint,
            })
            .set(ok.into());
        self.total
            .get_or_create(&ResultLabel {
                name,
                status: if ok { "success" } else { "error" },
                r#type: endpoint,
            })
            .inc();
    }

    /// In the OpenMetrics text format.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // writing to a String does not fail
        let _: std::fmt::Result = encode(&mut out, &self.registry);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::older_text;
    use super::*;

    #[test]
    fn the_last_result_and_their_number_are_told() {
        let slis = Slis::default();
        slis.checked("ping", "healthz", true);
        slis.checked("ping", "healthz", false);
        slis.checked("ping", "healthz", true);
        let text = older_text(&slis.text());
        for line in [
            "kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1",
            "# TYPE kubernetes_healthchecks_total counter",
            "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 2",
            "kubernetes_healthchecks_total{name=\"ping\",status=\"error\",type=\"healthz\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
    }
}
