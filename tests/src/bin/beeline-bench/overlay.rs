//! Pods of two nodes over VXLAN: with our programs at the devices against the kernel's own forwarding. The same devices and
//! connections, with the programs taken off and put back between the blocks.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use beeline_tests::cluster::{Node, Pod};
use beeline_tests::netns::NetNs;
use beeline_tests::{Cluster, wait_for};
use clap::Args;
use dataplane_common::abi::{self, Addr, BePort, Device, PodDevice, device_flag, masquerade, pod_flag};
use dataplane_user::kernel::{Config, Kernel, NicPrograms, Sizes};
use nix::time::{ClockId, clock_gettime};

use crate::figures::{Figures, Target, quantile};

/// What VXLAN leaves of the uplink's 1500.
const MTU: u32 = 1450;
const BUFFER: usize = 128 << 10;

#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Pairs of blocks to compare
    #[arg(long, default_value_t = 25)]
    pairs: usize,
    /// Length of a block, in milliseconds
    #[arg(long, default_value_t = 400)]
    block: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pairs: 25,
            block: 400,
        }
    }
}

/// A node with its programs and its pods.
struct Side {
    node: Node,
    pods: Vec<Pod>,
    /// What is served, and as what.
    devices: Vec<(u32, Device)>,
    kernel: Kernel,
    programs: NicPrograms,
}

fn index(netns: &NetNs, device: &str) -> Result<u32> {
    let found = netns.run(|| nix::net::if_::if_nametoindex(device))?;
    found.with_context(|| format!("no device {device}"))
}

/// Of the number `number`, on the side that `end` says.
const fn mac(end: u8, number: u8) -> [u8; 6] {
    [2, 0, 0, 0, end, number]
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Side {
    fn new(cluster: &Cluster, number: u8, other: u8, pods: u8) -> Result<Self> {
        let node = cluster.add_node()?;
        let config = Config {
            bpffs_root: node.bpffs().to_owned(),
            cgroup_root: node.cgroup().to_owned(),
            sizes: Sizes::default(),
            ebpf_log_level: 0,
        };
        let kernel = Kernel::open(&config).context("cannot set up the kernel side")?;
        let netns = node.host().netns();
        // flannel's shape (spec of its backend): device, neighbour, forwarding entry, route
        netns.ip_batch(&[
            format!(
                "link add flannel.1 address {} mtu {MTU} type vxlan id 1 dev up0 local {} dstport 8472 nolearning",
                text(mac(9, number)),
                node.v4()
            ),
            format!("addr add 10.244.{number}.0/32 dev flannel.1"),
            "link set flannel.1 up".to_owned(),
            format!(
                "neigh replace 10.244.{other}.0 lladdr {} dev flannel.1 nud permanent",
                text(mac(9, other))
            ),
            format!("route replace 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink"),
        ])?;
        netns
            .run(|| {
                let entry = text(mac(9, other));
                let to = format!("172.31.0.{other}");
                std::process::Command::new("bridge")
                    .args([
                        "fdb",
                        "replace",
                        &entry,
                        "dev",
                        "flannel.1",
                        "dst",
                        &to,
                        "self",
                        "permanent",
                    ])
                    .status()
            })?
            .context("cannot start bridge")?;
        let device = |flags| Device {
            v4: IpAddr::V4(node.v4()).into(),
            v6: Addr::default(),
            flags,
            tunnel: BePort::from_host(8472),
            header: 14,
        };
        let mut devices = vec![
            (index(netns, "flannel.1")?, device(0)),
            (index(netns, "up0")?, device(0)),
        ];
        let mut table = kernel.pod_table()?;
        let mut made = Vec::new();
        for count in 0..pods {
            let pod = node.add_pod(&format!("pod{count}"))?;
            let link = format!("p{}", count + 2);
            netns.ip_batch(&[format!(
                "link set {link} mtu {MTU} address {}",
                text(mac(1, count))
            )])?;
            pod.place()
                .netns()
                .ip_batch(&[format!("link set eth0 mtu {MTU} address {}", text(mac(2, count)))])?;
            let ifindex = index(netns, &link)?;
            let row = abi::Pod {
                ifindex,
                flags: pod_flag::SHORT,
                mtu: MTU,
                mac: mac(2, count),
                host_mac: mac(1, count),
            };
            let limits = PodDevice {
                v4: IpAddr::V4(pod.v4()).into(),
                flags: pod_flag::SHORT,
                ..PodDevice::default()
            };
            table.put(&row, &limits)?;
            devices.push((ifindex, device(device_flag::POD)));
            made.push(pod);
        }
        let nets = [
            (
                "10.244.0.0/16".to_owned(),
                masquerade::EXEMPT | masquerade::REMOTE_PODS,
            ),
            (
                format!("10.244.{number}.0/24"),
                masquerade::EXEMPT | masquerade::SOURCE,
            ),
        ];
        let nets = nets.into_iter().map(|(net, flags)| Ok((net.parse()?, flags)));
        kernel.masquerade_table()?.set(&nets.collect::<Result<_>>()?)?;
        Ok(Self {
            pods: made,
            devices,
            programs: kernel.nic(),
            kernel,
            node,
        })
    }

    /// Takes the programs to the devices, or off.
    fn serve(&self, on: bool) -> Result<()> {
        let mut table = self.kernel.device_table()?;
        self.node.host().netns().run(|| -> Result<()> {
            for (index, device) in &self.devices {
                if on {
                    table.put(*index, device)?;
                    self.programs.attach(*index, None)?;
                } else {
                    self.programs.detach(*index)?;
                }
            }
            Ok(())
        })?
    }

    fn short(&self) -> Result<u64> {
        let counters = self.kernel.counters()?;
        let found = counters.iter().find(|(name, _)| *name == "short_way");
        found.map(|(_, value)| *value).context("no such counter")
    }
}

/// Two connections between two pods.
struct Wire {
    bulk: TcpStream,
    received: Arc<AtomicU64>,
    echo: TcpStream,
}

impl Wire {
    fn new(from: &Pod, to: &Pod) -> Result<Self> {
        let received = Arc::new(AtomicU64::new(0));
        let connect = |serve: Box<dyn FnOnce(TcpStream) + Send>| -> Result<TcpStream> {
            let at: SocketAddr = (to.v4(), 0).into();
            let listener = to.place().netns().run(|| TcpListener::bind(at))??;
            let at = listener.local_addr()?;
            std::thread::spawn(move || {
                if let Ok((stream, _)) = listener.accept() {
                    serve(stream);
                }
            });
            let stream = from
                .place()
                .netns()
                .run(|| TcpStream::connect_timeout(&at, Duration::from_secs(5)))?;
            Ok(stream?)
        };
        let count = Arc::clone(&received);
        let bulk = connect(Box::new(move |mut stream| {
            let mut buffer = vec![0; BUFFER];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
        }))?;
        let echo = connect(Box::new(|mut stream| {
            let mut byte = [0];
            let _ = stream.set_nodelay(true);
            while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
        }))?;
        echo.set_nodelay(true)?;
        Ok(Self { bulk, received, echo })
    }

    fn block(&mut self, length: Duration) -> Result<Block> {
        let (cpu, before) = (busy()?, self.received.load(Ordering::Relaxed));
        let buffer = vec![7; BUFFER];
        let begun = Instant::now();
        while begun.elapsed() < length {
            self.bulk.write_all(&buffer)?;
        }
        let seconds = begun.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let bytes = (self.received.load(Ordering::Relaxed) - before) as f64;
        let cpu = busy()? - cpu;

        let begun = Instant::now();
        let (mut requests, mut byte) = (0.0, [7]);
        while begun.elapsed() < length {
            self.echo.write_all(&byte)?;
            self.echo.read_exact(&mut byte)?;
            requests += 1.0;
        }
        Ok(Block {
            throughput: bytes / seconds,
            requests: requests / begun.elapsed().as_secs_f64(),
            cpu: cpu / bytes,
        })
    }
}

struct Block {
    /// Bytes per second.
    throughput: f64,
    /// Per second.
    requests: f64,
    /// Seconds of CPU time per byte.
    cpu: f64,
}

/// CPU time of both ends, in seconds: a packet is carried on the time of whoever sends it, interrupts included, unless the
/// kernel counts those apart (`CONFIG_IRQ_TIME_ACCOUNTING`).
fn busy() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).context("cannot read the CPU time")?;
    Ok(Duration::from(time).as_secs_f64())
}

pub(crate) fn run(options: &Options, figures: &mut Figures) -> Result<()> {
    let cluster = Cluster::new()?;
    let sides = [Side::new(&cluster, 1, 2, 2)?, Side::new(&cluster, 2, 1, 1)?];
    let pod = |side: usize, pod: usize| {
        let found = sides.get(side).and_then(|side| side.pods.get(pod));
        found.ok_or_else(|| anyhow!("no pod {pod} on node {side}"))
    };
    for (what, to, targets) in [
        (
            "across nodes",
            pod(1, 0)?,
            [Target::AtLeast(1.15), Target::AtLeast(1.0), Target::AtMost(1.0)],
        ),
        ("same node", pod(0, 1)?, [Target::None; 3]),
    ] {
        figures.progress(&format!("overlay: {what}"));
        let mut wire = wait_for("a connection between pods", Duration::from_secs(5), || {
            Ok(Wire::new(pod(0, 0)?, to).ok())
        })?;
        compare(what, options, &sides, &mut wire, targets, figures)?;
    }
    Ok(())
}

fn compare(
    what: &str,
    options: &Options,
    sides: &[Side],
    wire: &mut Wire,
    targets: [Target; 3],
    figures: &mut Figures,
) -> Result<()> {
    let length = Duration::from_millis(options.block);
    let mut block = |on: bool| {
        sides.iter().try_for_each(|side| side.serve(on))?;
        wire.block(length)
    };
    block(false)?;
    let before = sides.iter().map(Side::short).sum::<Result<u64>>()?;
    block(true)?;
    let after = sides.iter().map(Side::short).sum::<Result<u64>>()?;
    anyhow::ensure!(after > before, "no packet took the short way {what}");
    let mut ratios = [vec![], vec![], vec![]];
    let mut values = [vec![], vec![], vec![], vec![]];
    for number in 0..options.pairs {
        // a drift of the machine's speed falls on both alike
        let (plain, ours) = if number % 2 == 0 {
            let plain = block(false)?;
            (plain, block(true)?)
        } else {
            let ours = block(true)?;
            (block(false)?, ours)
        };
        let pair = [
            ours.throughput / plain.throughput,
            ours.requests / plain.requests,
            ours.cpu / plain.cpu,
        ];
        ratios
            .iter_mut()
            .zip(pair)
            .for_each(|(list, ratio)| list.push(ratio));
        let all = [plain.throughput, ours.throughput, plain.requests, ours.requests];
        values
            .iter_mut()
            .zip(all)
            .for_each(|(list, value)| list.push(value));
    }
    let names = ["throughput", "requests", "CPU per byte"];
    for ((name, list), target) in names.iter().zip(&mut ratios).zip(targets) {
        let name = format!("overlay/{what}/{name} against the kernel's");
        figures.add(name, quantile(list, 0.5), "ratio", target);
    }
    let names = [
        ("throughput of the kernel", 8e-9, "Gbit/s"),
        ("throughput", 8e-9, "Gbit/s"),
        ("requests of the kernel", 1.0, "1/s"),
        ("requests", 1.0, "1/s"),
    ];
    for ((name, scale, unit), list) in names.into_iter().zip(&mut values) {
        let value = quantile(list, 0.5) * scale;
        figures.add(format!("overlay/{what}/{name}"), value, unit, Target::None);
    }
    Ok(())
}
