//! What kube-proxy calls what it writes: chains in the tables of iptables (its iptables and ipvs modes), tables in its
//! nftables mode. The names are stable: kube-proxy's own `--cleanup` goes by them.
//!
//! Not all that begins with `KUBE-` is kube-proxy's. kubelet has KUBE-FIREWALL, KUBE-MARK-DROP, KUBE-KUBELET-CANARY and
//! KUBE-IPTABLES-HINT, network policies of kube-router (k3s) have KUBE-ROUTER-*, KUBE-NWPLCY-* and KUBE-POD-FW-*. So
//! the names are listed here, not a prefix.

/// Name of the tables that kube-proxy's nftables mode has, one for IPv4 and one for IPv6.
pub(super) const NFT_TABLE: &str = "kube-proxy";

/// The device that its ipvs mode binds Service addresses to.
pub(crate) const IPVS_DEVICE: &str = "kube-ipvs0";

/// Its sets of ports at which every address of the node is served.
pub(super) const NODE_PORT_SETS: [&str; 6] = [
    "KUBE-NODE-PORT-TCP",
    "KUBE-NODE-PORT-UDP",
    "KUBE-NODE-PORT-SCTP-HASH",
    "KUBE-6-NODE-PORT-TCP",
    "KUBE-6-NODE-PORT-UDP",
    "KUBE-6-NODE-PORT-SCTP-HASH",
];

/// What follows `KUBE-` in the names of its sets, and `KUBE-6-` in those of its sets for IPv6.
const SETS: [&str; 18] = [
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "EXTERNAL-IP-LOCAL",
    "LOAD-BALANCER",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-SOURCE-IP",
    "LOAD-BALANCER-SOURCE-CIDR",
    "NODE-PORT-TCP",
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-UDP",
    "NODE-PORT-LOCAL-UDP",
    "NODE-PORT-SCTP-HASH",
    "NODE-PORT-LOCAL-SCTP-HASH",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
    // before 1.16
    "NODE-PORT-SCTP",
];

/// The kernel's limit for the name of a set, in bytes; kube-proxy cuts what is longer.
const SET_NAME: usize = 31;

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

/// True if kube-proxy's ipvs mode makes a set of this name. Network policies of kube-router have sets, too: KUBE-SRC-* and
/// KUBE-DST-*.
pub(super) fn is_set(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("KUBE-") else {
        return false;
    };
    let v6 = rest.strip_prefix("6-");
    let room = SET_NAME - (name.len() - v6.unwrap_or(rest).len());
    SETS.iter()
        .any(|set| v6.unwrap_or(rest) == set.get(..room).unwrap_or(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kube_proxys_sets_are_taken_for_its_own() {
        for name in [
            "KUBE-LOOP-BACK",
            "KUBE-6-LOOP-BACK",
            "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
            "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS",
            "KUBE-6-LOAD-BALANCER-SOURCE-CID",
        ] {
            assert!(name.len() <= SET_NAME && is_set(name), "{name}");
        }
        for name in [
            "KUBE-SRC-ABCDEF",
            "KUBE-DST-ABCDEF",
            "KUBE-LOAD-BALANCER-SOURCE-CID",
            "KUBE-",
            "KUBE-6-",
            "KUBE-CLUSTER-IP-2",
            "CLUSTER-IP",
            "cali40all-ipam-pools",
        ] {
            assert!(!is_set(name), "{name}");
        }
        assert!(NODE_PORT_SETS.into_iter().all(is_set));
    }

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
