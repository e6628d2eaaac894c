//! Just enough of a Kubernetes API to feed an agent: paged lists of fixed objects, and watches that stay silent or tell of
//! changed endpoints at a steady rate.
//!
//! The control plane could do it, too, but storing 20,000 objects first would take longer than all else.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use beeline_tests::Node;
use serde_json::{Value, json};

use crate::population::Population;

/// The objects, as text: they are only ever sent.
struct Objects {
    population: Population,
    services: Vec<String>,
    slices: Vec<String>,
    /// Changed endpoints per second.
    rate: u32,
}

/// Serves a population inside the node's namespace until the process ends, with so many changed endpoints per second;
/// returns a kubeconfig for it.
pub(crate) fn serve(node: &Node, population: Population, rate: u32, dir: &Path) -> Result<PathBuf> {
    let (services, slices) = population
        .objects()
        .map(|(service, slice)| (service.to_string(), slice.to_string()))
        .unzip();
    let objects = Arc::new(Objects {
        population,
        services,
        slices,
        rate,
    });
    // A socket stays in the namespace where it was made.
    let listener = node
        .host()
        .netns()
        .run(|| TcpListener::bind("127.0.0.1:0"))?
        .context("cannot listen")?;
    let address = listener.local_addr().context("no local address")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let objects = Arc::clone(&objects);
            // A client that goes away is its own business.
            std::thread::spawn(move || answer(&stream, &objects));
        }
    });
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bench",
        "clusters": [{"name": "bench", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "bench", "user": {}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
    });
    let file = dir.join("bench.kubeconfig");
    std::fs::write(&file, kubeconfig.to_string())
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}

fn answer(stream: &TcpStream, objects: &Objects) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut line = String::new();
        while reader.read_line(&mut line)? > 2 {
            line.clear();
        }
        let target = request.split(' ').nth(1).context("no target")?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let field = |name: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        if field("watch").is_some_and(|value| value == "true" || value == "1") {
            writer.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            if objects.rate > 0 && path.ends_with("/endpointslices") {
                return changes(writer, objects);
            }
            // Until the client goes away.
            reader.read_line(&mut line)?;
            return Ok(());
        }
        let (kind, version, items): (&str, &str, &[String]) = match path.rsplit('/').next() {
            Some("services") => ("ServiceList", "v1", &objects.services),
            Some("endpointslices") => ("EndpointSliceList", "discovery.k8s.io/v1", &objects.slices),
            Some("servicecidrs") => ("ServiceCIDRList", "networking.k8s.io/v1", &[]),
            _ => ("NodeList", "v1", &[]),
        };
        let number = |name: &str| field(name).and_then(|text| text.parse::<usize>().ok());
        let from = number("continue").unwrap_or(0).min(items.len());
        let to = number("limit").map_or(items.len(), |limit| (from + limit).min(items.len()));
        let mut metadata = json!({"resourceVersion": "1000000"});
        if to < items.len() {
            metadata["continue"] = Value::String(to.to_string());
        }
        let body = format!(
            "{{\"kind\":\"{kind}\",\"apiVersion\":\"{version}\",\"metadata\":{metadata},\"items\":[{}]}}",
            items[from..to].join(",")
        );
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:";
        writer.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes())?;
    }
}

/// Tells of changed endpoints, one service after the other, until the client goes away.
fn changes(mut writer: &TcpStream, objects: &Objects) -> Result<()> {
    let start = Instant::now();
    for number in 0_u32.. {
        let due = start + Duration::from_secs(1) * number / objects.rate;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let service = u32::try_from(u64::from(number) * 7919 % u64::from(objects.population.services))?;
        let mut slice = serde_json::to_value(objects.population.slice(service, number + 1)?)?;
        slice["metadata"]["resourceVersion"] = (2_000_000 + number).to_string().into();
        let event = json!({"type": "MODIFIED", "object": slice}).to_string();
        writer.write_all(format!("{:x}\r\n{event}\n\r\n", event.len() + 1).as_bytes())?;
    }
    Ok(())
}
