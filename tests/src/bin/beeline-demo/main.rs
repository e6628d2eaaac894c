//! `cargo xtask demo`: a cluster on this machine, from the first object to the last refusal.
//!
//! It is a smoke test too: whatever it shows is checked, and the exit code says whether all was as it should be.

mod north_south;
mod show;

use std::net::{IpAddr, SocketAddr};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use beeline_tests::client::Mode;
use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::{
    Agent, Cluster, ControlPlane, Load, LoadReport, Node, OutsideHost, Place, Pod, agent, pod_network,
    process, program, signals, wait_for,
};
use clap::Parser;
use show::Show;

/// As a user would write it.
const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: myweb}
spec: {type: NodePort, ports: [{port: 8080, nodePort: 30001}], selector: {app: myweb}}
";
/// Requests from each client.
const REQUESTS: u64 = 300;
/// How long a change may take from the API to the kernels of all nodes.
const PROPAGATION: Duration = Duration::from_secs(10);

#[derive(Parser)]
#[command(
    name = "cargo xtask demo",
    about = "A cluster on this machine: pods connected by CNI and VXLAN, and a Service balanced by eBPF"
)]
struct Args {
    /// Leave the cluster running, with three pods behind the Service; `cargo xtask sweep` removes it
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let show = Show::new();
    match run(&args, &show) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            signals::leave_to_clean_up();
            show.failure(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, show: &Show) -> Result<()> {
    show.step("starting a control plane and two nodes (network namespace, cgroup and bpffs directory each)");
    let cluster = if args.keep {
        Cluster::kept()?
    } else {
        Cluster::new()?
    };
    let result = Demo::start(&cluster, show).and_then(|mut demo| {
        demo.balance()?;
        demo.ask_from_outside()?;
        demo.add_a_node()?;
        demo.remove_a_pod()?;
        demo.lose_a_node()?;
        demo.scale_to_zero()?;
        if args.keep {
            demo.scale_up_again()?;
            demo.explain()?;
        }
        Ok(())
    });
    if result.is_err() && args.keep {
        show.note(&format!(
            "the cluster {} is left as it is: `cargo xtask sweep` removes it",
            cluster.name()
        ));
    }
    result?;
    if !args.keep {
        let name = cluster.name().to_owned();
        drop(cluster);
        let left: Vec<String> = beeline_tests::residue::listing()?
            .into_iter()
            .filter(|line| line.contains(&name))
            .collect();
        ensure!(left.is_empty(), "the demo left behind:\n  {}", left.join("\n  "));
    }
    show.done();
    Ok(())
}

struct Demo<'a> {
    show: &'a Show,
    cluster: &'a Cluster,
    plane: ControlPlane,
    nodes: Vec<Node>,
    /// Kept for their `Drop`, and to show their logs.
    agents: Vec<Agent>,
    client: Pod,
    outside: OutsideHost,
    /// The `myweb` pods with the index of their node.
    pods: Vec<(usize, Pod)>,
    service: SocketAddr,
}

impl<'a> Demo<'a> {
    fn start(cluster: &'a Cluster, show: &'a Show) -> Result<Self> {
        let plane = ControlPlane::start(cluster)?;
        let nodes = vec![cluster.add_node()?, cluster.add_node()?];
        let mut agents = Vec::new();
        for node in &nodes {
            agents.push(start_agent(&plane, node)?);
        }
        for (agent, node) in agents.iter_mut().zip(&nodes) {
            wait_agent(&plane, agent, node)?;
        }
        show.output(
            "$ kubectl get nodes -o wide",
            &plane.kubectl(&["get", "nodes", "-o", "wide"])?,
        );

        show.step("starting three pods `myweb-…` by the CNI plugin, that answer with their name, and applying the Service");
        let client = pod_network::add_pod(&nodes[0], "client")?;
        let outside = cluster.add_outside_host()?;
        let mut demo = Self {
            show,
            cluster,
            plane,
            nodes,
            agents,
            client,
            outside,
            pods: Vec::new(),
            service: SocketAddr::new(IpAddr::from([0, 0, 0, 0]), ECHO_PORT),
        };
        demo.add_pods()?;
        show.text(SERVICE);
        let said = demo.plane.kubectl_stdin(&["apply"], SERVICE)?;
        show.output("$ kubectl apply -f myweb.yaml", &said);
        let ip = demo
            .plane
            .kubectl(&["get", "service", "myweb", "-o", "jsonpath={.spec.clusterIP}"])?;
        let ip: IpAddr = ip
            .trim()
            .parse()
            .with_context(|| format!("the Service's ClusterIP is {ip:?}"))?;
        demo.service.set_ip(ip);
        demo.wait_backends()?;
        show.output(
            "$ kubectl get pods,services,endpointslices -o wide",
            &demo
                .plane
                .kubectl(&["get", "pods,services,endpointslices", "-o", "wide"])?,
        );
        Ok(demo)
    }

    fn add_pods(&mut self) -> Result<()> {
        for (number, index) in [(1, 0), (2, 1), (3, 1)] {
            self.add_pod(number, index)?;
        }
        Ok(())
    }

    /// `myweb-<number>` on the node with this index.
    fn add_pod(&mut self, number: usize, index: usize) -> Result<()> {
        let node = &self.nodes[index];
        let mut pod = pod_network::add_pod(node, &format!("myweb-{number}"))?;
        pod.start_echo(ECHO_PORT)?;
        self.plane.register_pod(node, &pod, "myweb", ECHO_PORT)?;
        self.pods.push((index, pod));
        Ok(())
    }

    /// A node joins while everything runs, and a pod on it is reached at once.
    fn add_a_node(&mut self) -> Result<()> {
        let node = self.cluster.add_node()?;
        self.show.step(&format!("{} joins, and gets a pod", node.name()));
        let mut agent = start_agent(&self.plane, &node)?;
        wait_agent(&self.plane, &mut agent, &node)?;
        self.nodes.push(node);
        self.agents.push(agent);
        self.add_pod(4, 2)?;
        self.wait_backends()?;
        let first = &self.nodes[0];
        wait_for("the ways to all nodes", PROPAGATION, || {
            let list = agent::beeline_json(first, &["node", "list"])?;
            let ways = list["nodes"].as_array().map_or(0, |nodes| {
                nodes.iter().filter(|node| node["path"] == "ok").count()
            });
            // two families of two nodes
            Ok((ways == 4).then_some(()))
        })?;
        let list = process::output(agent::beeline(first, &["node", "list"])?)?;
        self.show
            .output(&format!("{} $ beeline node list", first.name()), &list);
        let report = Load::ask(self.client.place(), self.service, Mode::Http, REQUESTS)?;
        self.show.spread("pod client on node-1", &report);
        ensure!(
            report.ok == REQUESTS && report.replies.contains_key("myweb-4"),
            "the new node's pod should answer, too: {report:?}"
        );
        Ok(())
    }

    /// Waits until every agent offers exactly the pods that there are now.
    fn wait_backends(&self) -> Result<()> {
        let mut wanted: Vec<SocketAddr> = self
            .pods
            .iter()
            .map(|(_, pod)| SocketAddr::new(pod.v4().into(), ECHO_PORT))
            .collect();
        wanted.sort_unstable();
        for node in &self.nodes {
            let what = format!(
                "{} to have {} backends for {}",
                node.name(),
                wanted.len(),
                self.service
            );
            wait_for(&what, PROPAGATION, || {
                let mut have = agent::usable_backends(node, self.service)?;
                have.sort_unstable();
                Ok((have == wanted).then_some(()))
            })?;
        }
        Ok(())
    }

    fn clients(&self) -> [(&'static str, &Place); 3] {
        [
            ("pod client on node-1", self.client.place()),
            ("node-1 itself", self.nodes[0].host()),
            ("node-2 itself", self.nodes[1].host()),
        ]
    }

    /// Requests from a pod and from each node, and what an operator would look at.
    fn balance(&self) -> Result<()> {
        self.show.step(&format!(
            "{REQUESTS} requests to http://{} from a pod and from each node",
            self.service
        ));
        for (name, place) in self.clients() {
            let report = Load::ask(place, self.service, Mode::Http, REQUESTS)?;
            self.show.spread(name, &report);
            ensure!(
                report.ok == REQUESTS,
                "of {REQUESTS} requests from {name} {} failed: {:?}",
                report.failed,
                report.errors
            );
            for (_, pod) in &self.pods {
                let share = report.replies.get(pod.name()).copied().unwrap_or_default();
                // Binomial with 300 tries and p = 1/3: this is 5 standard deviations, one run in a million.
                ensure!(
                    (60..=140).contains(&share),
                    "{} answered {share} of {REQUESTS} requests from {name}",
                    pod.name()
                );
            }
        }

        self.show.step("what an operator looks at");
        for node in &self.nodes {
            let url = format!("http://{}/proxyMode", agent::METRICS);
            let mode = node.host().output("curl", &["-sS", "--fail", &url])?;
            self.show.output(&format!("{} $ curl {url}", node.name()), &mode);
            ensure!(
                mode.trim() == "ebpf",
                "{} says that its proxy mode is {mode:?}",
                node.name()
            );
        }
        let node = &self.nodes[0];
        let list = process::output(agent::beeline(node, &["service", "list"])?)?;
        self.show
            .output(&format!("{} $ beeline service list", node.name()), &list);
        ensure!(
            list.contains(&self.service.to_string()),
            "`beeline service list` does not show {}",
            self.service
        );
        for (_, pod) in &self.pods {
            let backend = format!("{}:{ECHO_PORT}", pod.v4());
            ensure!(
                list.contains(&backend),
                "`beeline service list` does not show {} ({backend})",
                pod.name()
            );
        }
        Ok(())
    }

    /// A pod goes, as with `kubectl delete pod` and a kubelet: no request may fail.
    fn remove_a_pod(&mut self) -> Result<()> {
        // each node has one then: of a node that dies less than half of all goes
        let (index, mut gone) = self.pods.remove(2);
        self.show.step(&format!(
            "removing {} under 200 requests per second from each client",
            gone.name()
        ));
        let loads: Vec<(&str, Load)> = self
            .clients()
            .into_iter()
            .map(|(name, place)| Ok((name, Load::start(place, self.service, Mode::Http, 200, 4)?)))
            .collect::<Result<_>>()?;
        let before = self.answers_of(gone.name())?;
        self.plane
            .kubectl(&["delete", "pod", gone.name(), "--wait=false"])?;
        self.wait_backends()?;
        // What kubelet does: the container ends after the endpoint is out of use, then the object goes.
        gone.stop_echo()?;
        self.finish_delete(gone.name())?;
        let after = self.answers_of(gone.name())?;
        // Requests go on for a while without it.
        std::thread::sleep(Duration::from_secs(1));
        ensure!(
            before > 0,
            "{} on node-{} answered nothing before it was removed",
            gone.name(),
            index + 1
        );
        ensure!(after == 0, "{} is still asked after it was removed", gone.name());
        let mut failures = 0;
        for (name, load) in loads {
            let report = load.stop()?;
            self.show.counts(name, &report);
            failures += report.failed;
            ensure!(report.ok > 100, "{name} made only {} requests", report.ok);
        }
        ensure!(
            failures == 0,
            "{failures} requests failed while a pod was removed"
        );
        Ok(())
    }

    /// How many of 60 fresh requests this pod answers.
    fn answers_of(&self, pod: &str) -> Result<u64> {
        let report = Load::ask(self.client.place(), self.service, Mode::Http, 60)?;
        ensure!(report.failed == 0, "requests fail: {:?}", report.errors);
        Ok(report.replies.get(pod).copied().unwrap_or_default())
    }

    /// What kubelet does when the containers have ended.
    fn finish_delete(&self, pod: &str) -> Result<()> {
        self.plane
            .kubectl(&[
                "delete",
                "pod",
                pod,
                "--force",
                "--grace-period=0",
                "--ignore-not-found",
            ])
            .map(|_| ())
    }

    /// No pod left: clients must be told at once, not left waiting.
    fn scale_to_zero(&mut self) -> Result<()> {
        self.show
            .step("scaling to 0: clients are refused at once, not left waiting");
        let pods: Vec<Pod> = self.pods.drain(..).map(|(_, pod)| pod).collect();
        for pod in &pods {
            self.plane
                .kubectl(&["delete", "pod", pod.name(), "--wait=false"])?;
        }
        for pod in &pods {
            self.finish_delete(pod.name())?;
        }
        self.wait_backends()?;
        for mut pod in pods {
            pod.stop_echo()?;
        }
        for (name, place) in self.clients() {
            let report = Load::ask(place, self.service, Mode::Http, 10)?;
            self.show.counts(name, &report);
            refused(name, &report)?;
        }
        let url = format!("http://{}", self.service);
        let curl = place_output(self.client.place(), "curl", &["-sS", "--max-time", "5", &url])?;
        self.show.output(&format!("client $ curl {url}"), &curl.1);
        // 7 is "failed to connect to host".
        ensure!(
            curl.0 == Some(7),
            "curl ended with {:?} where the connection should be refused",
            curl.0
        );
        Ok(())
    }

    fn scale_up_again(&mut self) -> Result<()> {
        self.show.step("scaling back to three pods");
        self.add_pods()?;
        self.wait_backends()
    }

    /// How to go on by hand.
    fn explain(&self) -> Result<()> {
        let kubeconfig = self.plane.kubeconfig().display();
        let switch = self.cluster.switch().netns().name();
        self.show.step("the cluster is left running");
        let enter = |place: &Place| {
            format!(
                "sh -c 'echo $$ > {}/cgroup.procs; exec ip netns exec {} bash'",
                place.cgroup().display(),
                place.netns().name()
            )
        };
        let beeline = program("beeline")?;
        let node = &self.nodes[0];
        self.show.text(&format!(
            "kubeconfig        {kubeconfig}\n\
             kubectl           ip netns exec {switch} kubectl --kubeconfig {kubeconfig} get services\n\
             enter node-1      {}\n\
             enter node-2      {}\n\
             enter the client  {}\n\
             there             curl http://{}\n\
             on node-1         {} service list --state-dir {}\n\
             logs              {}/*/agent.log and control-plane.log\n\
             remove it all     cargo xtask sweep\n",
            enter(node.host()),
            enter(self.nodes[1].host()),
            enter(self.client.place()),
            self.service,
            beeline.display(),
            node.state().display(),
            self.cluster.state().display(),
        ));
        for agent in &self.agents {
            self.show
                .note(&format!("agent with process id {}", agent.process.pid()));
        }
        Ok(())
    }
}

/// An agent that makes its node's pod network, too.
fn start_agent(plane: &ControlPlane, node: &Node) -> Result<Agent> {
    plane.register_node(node)?;
    let options = pod_network::options(plane, node, pod_network::NET_CONF)?;
    Agent::start(node, &options.flag("--path-probe-interval", 1))
}

fn wait_agent(plane: &ControlPlane, agent: &mut Agent, node: &Node) -> Result<()> {
    agent.wait_synced(node)?;
    pod_network::wait_ready(plane, node, agent)
}

/// All failed, each at once with ECONNREFUSED.
fn refused(name: &str, report: &LoadReport) -> Result<()> {
    let refusals = report
        .errors
        .get("connect: ECONNREFUSED")
        .copied()
        .unwrap_or_default();
    if report.ok > 0 || refusals != report.failed {
        bail!("requests from {name} should all be refused: {report:?}");
    }
    ensure!(
        report.slowest_ms < 500.0,
        "a refusal took {:.0} ms",
        report.slowest_ms
    );
    Ok(())
}

/// Exit code, and all that it wrote.
fn place_output(place: &Place, program: &str, args: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command: Command = place.command(program)?;
    let output = command
        .args(args)
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code(), text))
}
