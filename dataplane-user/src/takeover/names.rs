//! What kube-proxy calls what it writes: chains in the tables of iptables (its iptables and ipvs modes), tables in its
//! nftables mode. The names are stable: kube-proxy's own `--cleanup` goes by them.
//!
//! Not all that begins with `KUBE-` is kube-proxy's. kubelet has KUBE-FIREWALL, KUBE-MARK-DROP, KUBE-KUBELET-CANARY and
//! KUBE-IPTABLES-HINT, network policies of kube-router (k3s) have KUBE-ROUTER-*, KUBE-NWPLCY-* and KUBE-POD-FW-*. So
//! the names are listed here, not a prefix.

/// Name of the tables that kube-proxy's nftables mode has, one for IPv4 and one for IPv6.
pub(super) const NFT_TABLE: &str = "kube-proxy";

/// The device that its ipvs mode binds Service addresses to.
pub(super) const IPVS_DEVICE: &str = "kube-ipvs0";

/// Tables of iptables that kube-proxy writes to.
pub(super) const TABLES: [&str; 3] = ["nat", "filter", "mangle"];

/// The chain through which all traffic to Services goes, in table `nat`.
pub(super) const SERVICES: &str = "KUBE-SERVICES";

/// Accepts packets of established connections where the policy of FORWARD is DROP, in table `filter`.
pub(super) const FORWARD: &str = "KUBE-FORWARD";

/// Marks packets to be masqueraded; CNI plugins for host ports may be configured to use it, too.
pub(super) const MARK_MASQ: &str = "KUBE-MARK-MASQ";

/// Masquerades marked packets.
pub(super) const POSTROUTING: &str = "KUBE-POSTROUTING";

/// One chain per service, endpoint or firewall: the prefix is followed by a hash.
const HASHED: [&str; 6] = [
    "KUBE-SVC-",
    "KUBE-SVL-",
    "KUBE-EXT-",
    "KUBE-SEP-",
    "KUBE-FW-",
    // before 1.24
    "KUBE-XLB-",
];

/// Both modes, all tables: no other program uses one of these names in another table.
const FIXED: [&str; 13] = [
    SERVICES,
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    POSTROUTING,
    MARK_MASQ,
    FORWARD,
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    // ipvs mode
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];

/// True if kube-proxy makes a chain of this name.
pub(super) fn is_chain(name: &str) -> bool {
    FIXED.contains(&name)
        || HASHED.iter().any(|prefix| {
            name.strip_prefix(prefix)
                .is_some_and(|hash| !hash.is_empty() && hash.bytes().all(|b| b.is_ascii_alphanumeric()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kube_proxys_chains_are_taken_for_its_own() {
        for name in [
            "KUBE-SERVICES",
            "KUBE-SVC-TCOU7JCQXEZGVUNU",
            "KUBE-SEP-2B44WDLFGZRIX6S5",
            "KUBE-PROXY-CANARY",
            "KUBE-IPVS-OUT-FILTER",
        ] {
            assert!(is_chain(name), "{name}");
        }
        for name in [
            "KUBE-FIREWALL",
            "KUBE-KUBELET-CANARY",
            "KUBE-IPTABLES-HINT",
            "KUBE-MARK-DROP",
            "KUBE-ROUTER-FORWARD",
            "KUBE-NWPLCY-DEFAULT",
            "KUBE-POD-FW-ABC",
            "KUBE-SVC-",
            "CNI-HOSTPORT-DNAT",
            "POSTROUTING",
            "kube-services",
        ] {
            assert!(!is_chain(name), "{name}");
        }
    }
}
