//! What is to be removed from a table, whatever backend it is read from.

use std::collections::BTreeSet;

use super::names;

/// A rule that jumps to one of kube-proxy's chains from a chain that is not kube-proxy's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Jump<R> {
    /// The chain that has the rule.
    pub(super) from: String,
    /// True if the kernel enters that chain by a hook (`PREROUTING`); false for a chain that a program or a person made.
    pub(super) from_base: bool,
    /// kube-proxy's chain.
    pub(super) to: String,
    /// The rule, as the backend names it.
    pub(super) rule: R,
}

/// What kube-proxy has in one table of iptables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Found<R> {
    /// `nat`, `filter` or `mangle`.
    pub(super) table: String,
    /// Its chains.
    pub(super) chains: BTreeSet<String>,
    /// The ways to them.
    pub(super) jumps: Vec<Jump<R>>,
}

impl<R> Found<R> {
    pub(super) fn new(table: &str) -> Self {
        Self {
            table: table.into(),
            chains: BTreeSet::new(),
            jumps: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.jumps.is_empty()
    }
}

/// What goes now, and what goes when the connections that kube-proxy translated have ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// All by which new connections are decided on. What stays is the chain that lets packets of established
    /// connections through where the policy of FORWARD is DROP.
    Rules,
    /// The rest.
    Rest,
}

/// What is to be removed from one table, all in one transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Removal<R> {
    pub(super) table: String,
    /// Rules in chains that are not kube-proxy's: (chain, rule).
    pub(super) rules: Vec<(String, R)>,
    /// Chains, with all that is in them.
    pub(super) chains: Vec<String>,
    /// Chains that stay for good, because a chain that is not kube-proxy's uses them: (chain, used by).
    pub(super) kept: Vec<(String, String)>,
}

impl<R> Removal<R> {
    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.chains.is_empty()
    }
}

/// Decides for one table.
pub(super) fn removal<R: Clone>(found: &Found<R>, stage: Stage) -> Removal<R> {
    // Host port plugins may have been told to mark their packets by kube-proxy's chain. It means nothing without the
    // one that masquerades what is marked.
    let marked_by: Vec<&Jump<R>> = found
        .jumps
        .iter()
        .filter(|jump| jump.to == names::MARK_MASQ && !jump.from_base)
        .collect();
    let stays = |chain: &str| match chain {
        names::MARK_MASQ | names::POSTROUTING => found.table == "nat" && !marked_by.is_empty(),
        names::FORWARD => found.table == "filter" && stage == Stage::Rules,
        _ => false,
    };
    Removal {
        table: found.table.clone(),
        rules: found
            .jumps
            .iter()
            .filter(|jump| !stays(&jump.to))
            .map(|jump| (jump.from.clone(), jump.rule.clone()))
            .collect(),
        chains: found
            .chains
            .iter()
            .filter(|chain| !stays(chain))
            .cloned()
            .collect(),
        kept: marked_by
            .iter()
            .map(|jump| (jump.to.clone(), jump.from.clone()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jump(from: &str, from_base: bool, to: &str) -> Jump<u32> {
        Jump {
            from: from.into(),
            from_base,
            to: to.into(),
            rule: 7,
        }
    }

    #[test]
    fn what_established_connections_need_goes_last() {
        let found = Found {
            table: "filter".into(),
            chains: ["KUBE-FORWARD".into(), "KUBE-SERVICES".into()].into(),
            jumps: vec![
                jump("FORWARD", true, "KUBE-FORWARD"),
                jump("FORWARD", true, "KUBE-SERVICES"),
            ],
        };
        let first = removal(&found, Stage::Rules);
        assert_eq!(first.chains, ["KUBE-SERVICES"]);
        assert_eq!(first.rules.len(), 1);
        let second = removal(&found, Stage::Rest);
        assert_eq!((second.chains.len(), second.rules.len()), (2, 2));
    }

    #[test]
    fn a_chain_that_others_mark_with_stays() {
        let mut found = Found {
            table: "nat".into(),
            chains: [
                names::MARK_MASQ.into(),
                names::POSTROUTING.into(),
                "KUBE-SERVICES".into(),
            ]
            .into(),
            jumps: vec![
                jump("PREROUTING", true, "KUBE-SERVICES"),
                jump("POSTROUTING", true, names::POSTROUTING),
                jump("CNI-HOSTPORT-SETMARK", false, names::MARK_MASQ),
            ],
        };
        for stage in [Stage::Rules, Stage::Rest] {
            let some = removal(&found, stage);
            assert_eq!(some.chains, ["KUBE-SERVICES"]);
            assert_eq!(some.rules, [("PREROUTING".into(), 7)]);
            assert_eq!(
                some.kept,
                [(names::MARK_MASQ.into(), "CNI-HOSTPORT-SETMARK".into())]
            );
        }
        found.jumps.pop();
        let all = removal(&found, Stage::Rules);
        assert_eq!((all.chains.len(), all.rules.len(), all.kept.len()), (3, 2, 0));
    }
}
