//! Metrics that kube-proxy has in one of its modes only, for dashboards and alerts that ask for them: what they count never
//! happens here, so they stay at 0.

use dataplane_model::Family as IpFamily;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::labels::FamilyLabel;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TableLabel {
    table: &'static str,
    ip_family: &'static str,
}

/// Registers them (spec kube-proxy 4), each with a sample of 0.
pub(super) fn register(registry: &mut Registry) {
    let families = [IpFamily::V4, IpFamily::V6].map(FamilyLabel::of);
    for (name, help) in [
        (
            "kubeproxy_sync_proxy_rules_iptables_restore_failures",
            "Always 0: no iptables rules are written",
        ),
        (
            "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures",
            "Always 0: no iptables rules are written",
        ),
        (
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures",
            "Always 0: no chains are left to be removed later",
        ),
    ] {
        let counter = Family::<FamilyLabel, Counter>::default();
        families
            .iter()
            .for_each(|family| drop(counter.get_or_create(family)));
        registry.register(name, help, counter);
    }
    for name in [
        "kubeproxy_sync_proxy_rules_iptables_total",
        "kubeproxy_sync_proxy_rules_iptables_last",
    ] {
        let gauge = Family::<TableLabel, Gauge>::default();
        for table in ["filter", "nat"] {
            for FamilyLabel { ip_family } in families.clone() {
                drop(gauge.get_or_create(&TableLabel { table, ip_family }));
            }
        }
        registry.register(name, "Always 0: no iptables rules are written", gauge);
    }
    for name in [
        "kubeproxy_iptables_ct_state_invalid_dropped_packets",
        "kubeproxy_iptables_localhost_nodeports_accepted_packets",
    ] {
        registry.register(
            name,
            "Always 0: no iptables rules are written",
            Counter::<u64>::default(),
        );
    }
}
