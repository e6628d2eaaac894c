//! What comes from outside the cluster, and what happens when a node dies.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use beeline_tests::client::{Mode, Question};
use beeline_tests::{Load, wait_for};

use crate::{Demo, PROPAGATION};

/// The node port of the Service.
pub(crate) const NODE_PORT: u16 = 30001;
const REQUESTS: u64 = 120;

impl Demo<'_> {
    /// The node port from a host outside, with both traffic policies.
    pub(crate) fn ask_from_outside(&self) -> Result<()> {
        self.show.step(&format!(
            "from a host outside the cluster ({}): node port {NODE_PORT} of both nodes",
            self.outside.v4()
        ));
        for node in &self.nodes {
            let target = SocketAddr::new(node.v4().into(), NODE_PORT);
            let report = Load::ask(self.outside.place(), target, Mode::Http, REQUESTS)?;
            self.show.spread(&format!("outside to {target}"), &report);
            ensure!(
                report.ok == REQUESTS,
                "{} of {REQUESTS} requests from outside to {target} failed: {:?}",
                report.failed,
                report.errors
            );
            ensure!(
                report.replies.len() == self.pods.len(),
                "not every pod answers at {target}: {:?}",
                report.replies
            );
        }

        self.show.step(
            "externalTrafficPolicy: Local: a pod of the node answers, and sees the client's own address",
        );
        let said = self.plane.kubectl(&[
            "patch",
            "service",
            "myweb",
            "-p",
            r#"{"spec":{"externalTrafficPolicy":"Local"}}"#,
        ])?;
        self.show.output(
            r#"$ kubectl patch service myweb -p '{"spec":{"externalTrafficPolicy":"Local"}}'"#,
            &said,
        );
        let question = Question {
            source: true,
            ..Mode::Http.into()
        };
        let client = self.outside.v4().to_string();
        for node in &self.nodes {
            let target = SocketAddr::new(node.v4().into(), NODE_PORT);
            wait_for("the policy to take effect", PROPAGATION, || {
                let report = Load::ask(self.outside.place(), target, question, 24)?;
                let only = report.replies.keys().all(|source| *source == client);
                Ok((report.failed == 0 && only).then_some(()))
            })?;
            let report = Load::ask(self.outside.place(), target, question, REQUESTS)?;
            self.show
                .spread(&format!("outside; the pod of {} sees", node.name()), &report);
            ensure!(
                report.failed == 0 && report.replies.len() == 1 && report.replies.contains_key(&client),
                "the pods should see {client}: {report:?}"
            );
        }
        self.plane
            .kubectl(&[
                "patch",
                "service",
                "myweb",
                "-p",
                r#"{"spec":{"externalTrafficPolicy":"Cluster"}}"#,
            ])
            .map(drop)
    }

    /// A node loses its network without a word: nothing tells the others.
    pub(crate) fn lose_a_node(&self) -> Result<()> {
        let (first, second) = (&self.nodes[0], &self.nodes[1]);
        self.show.step(&format!(
            "{} loses its network without a word, under 200 requests per second",
            second.name()
        ));
        let question = Question {
            timeout_ms: 1500,
            ..Mode::Http.into()
        };
        let places = [
            ("pod client on node-1", self.client.place()),
            ("node-1 itself", first.host()),
        ];
        let loads = places
            .iter()
            .map(|(name, place)| Ok((*name, Load::start(place, self.service, question, 200, 64)?)))
            .collect::<Result<Vec<_>>>()?;
        self.cluster.unplug(second)?;
        std::thread::sleep(Duration::from_secs(2));
        let later: Vec<(&str, Load)> = places
            .iter()
            .map(|(name, place)| Ok((*name, Load::start(place, self.service, question, 200, 64)?)))
            .collect::<Result<_>>()?;
        std::thread::sleep(Duration::from_secs(2));
        for (name, load) in loads {
            let report = load.stop()?;
            self.show.counts(&format!("{name}, 4 s in all"), &report);
        }
        for (name, load) in later {
            let report = load.stop()?;
            self.show.counts(&format!("{name}, begun after 2 s"), &report);
            ensure!(
                report.failed * 1000 <= report.ok,
                "{name}: requests fail more than 2 s after the node was lost: {report:?}"
            );
        }
        self.cluster.plug_in(second)?;
        wait_for("all pods to answer again", PROPAGATION, || {
            let report = Load::ask(self.client.place(), self.service, question, 40)?;
            Ok((report.failed == 0 && report.replies.len() == self.pods.len()).then_some(()))
        })?;
        self.show
            .note("its network is back, and its pods get connections again");
        Ok(())
    }
}
