//! One invocation of the plugin, without its process: environment and input in, output out.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::{Agent, ClientError};
use crate::config::{Config, Environment};
use crate::protocol::{Add, Check, Del, Failure, Gc, RELEASES, Request, Response, code};
use crate::result;
use crate::version::{SUPPORTED, Version};

/// Longest network configuration in bytes; a GC names every sandbox of the node.
pub const MAX_CONFIG: u64 = 4 << 20;

/// What a process should do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// For stdout.
    pub stdout: String,
    /// For stderr.
    pub note: Option<String>,
    /// Whether to exit with a failure.
    pub failed: bool,
}

/// A command's result on stdout, and a note for the runtime's log.
type Done = (Option<Value>, Option<String>);

/// Does what `CNI_COMMAND` says. `get` reads environment variables.
#[must_use]
pub fn run(get: &dyn Fn(&str) -> Option<String>, input: &[u8], agent: &dyn Agent) -> Outcome {
    let command = get("CNI_COMMAND").unwrap_or_default();
    let config = if u64::try_from(input.len()).is_ok_and(|length| length > MAX_CONFIG) {
        Err(Failure::new(
            code::DECODE,
            format!("network configuration is longer than {MAX_CONFIG} bytes"),
        ))
    } else if command == "VERSION" && input.iter().all(u8::is_ascii_whitespace) {
        // 0.2.0 let runtimes send nothing
        Ok(Config::default())
    } else {
        Config::parse(input)
    };
    let version = config.as_ref().ok().and_then(|config| config.version().ok());
    match config.and_then(|config| dispatch(&command, get, &config, agent)) {
        Ok((value, note)) => Outcome {
            stdout: value.map(|value| format!("{value}\n")).unwrap_or_default(),
            note,
            failed: false,
        },
        Err(failure) => failed(version, &failure),
    }
}

/// What to say when stdin cannot be read.
#[must_use]
pub fn unreadable(error: &std::io::Error) -> Outcome {
    failed(
        None,
        &Failure::because(code::IO, "cannot read the network configuration", error),
    )
}

fn failed(version: Option<Version>, failure: &Failure) -> Outcome {
    let mut error = json!({
        "cniVersion": version.unwrap_or(Version::V1_1).name(),
        "code": failure.code,
        "msg": failure.msg,
    });
    if !failure.details.is_empty() {
        error["details"] = failure.details.as_str().into();
    }
    Outcome {
        stdout: format!("{error}\n"),
        note: None,
        failed: true,
    }
}

fn dispatch(
    command: &str,
    get: &dyn Fn(&str) -> Option<String>,
    config: &Config,
    agent: &dyn Agent,
) -> Result<Done, Failure> {
    let since = |oldest: Version| {
        let version = config.version()?;
        if version >= oldest {
            return Ok(version);
        }
        let text = format!("config version {:?} does not allow {command}", version.name());
        Err(Failure::new(code::INCOMPATIBLE_VERSION, text))
    };
    match command {
        "ADD" => add(since(Version::V0_1)?, get, config, agent),
        "DEL" => del(since(Version::V0_1)?, get, config, agent),
        "CHECK" => check(since(Version::V0_4)?, get, config, agent),
        "GC" => gc(since(Version::V1_1)?, get, config, agent),
        "STATUS" => status(since(Version::V1_1)?, get, config, agent),
        "VERSION" => {
            let version = config.version().unwrap_or(Version::V1_1).name();
            Ok((
                Some(json!({"cniVersion": version, "supportedVersions": SUPPORTED})),
                None,
            ))
        }
        other => {
            let shown: String = other.chars().take(40).collect();
            Err(Failure::new(
                code::BAD_ENVIRONMENT,
                format!("unknown CNI_COMMAND: {shown}"),
            ))
        }
    }
}

fn add(
    version: Version,
    get: &dyn Fn(&str) -> Option<String>,
    config: &Config,
    agent: &dyn Agent,
) -> Result<Done, Failure> {
    let env = Environment::read(get, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"])?;
    let chained = config.previous_ips()?;
    let request = Request::Add(Box::new(Add {
        key: env.key(config.network()?),
        netns: env.netns.clone(),
        pod: env.args.pod(),
        mtu: config.mtu()?,
        mac: config.mac(&env.args)?,
        ips: config.ips(&env.args)?,
        port_mappings: config.port_mappings()?,
        bandwidth: config.bandwidth(),
        chained: chained.map(Into::into),
    }));
    let netns = open_netns(&env)?;
    match ask(agent, config, &request, Some(&netns))? {
        Response::Added(added) => {
            // behind another plugin: its result, as we changed nothing that it says
            let result = match &config.prev_result {
                Some(previous) => previous.clone(),
                None => result::render(version, &env.ifname, &env.netns, &added, &config.dns()),
            };
            Ok((Some(result), None))
        }
        other => Err(unexpected(&other)),
    }
}

fn del(
    _: Version,
    get: &dyn Fn(&str) -> Option<String>,
    config: &Config,
    agent: &dyn Agent,
) -> Result<Done, Failure> {
    let env = Environment::read(get, &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"])?;
    let del = Del {
        key: env.key(config.network()?),
    };
    let request = Request::Del(del.clone());
    let problem = match agent.ask(&config.socket(), &request, None) {
        Ok(Response::Failed(failure)) => failure.to_string(),
        Ok(_) => return Ok((None, None)),
        Err(error) => error.to_string(),
    };
    // A pod must not stay Terminating for our sake: the agent does it when it can.
    let left = match leave_release(&config.state_dir(), &del) {
        Ok(()) => "left for the agent to do".to_owned(),
        Err(error) => {
            format!("cannot be left for the agent either ({error}); a GC or its next start finds it")
        }
    };
    Ok((None, Some(format!("{problem}; DEL of {} {left}", del.key))))
}

fn check(
    _: Version,
    get: &dyn Fn(&str) -> Option<String>,
    config: &Config,
    agent: &dyn Agent,
) -> Result<Done, Failure> {
    let env = Environment::read(get, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"])?;
    let Some(ips) = config.previous_ips()? else {
        return Err(Failure::new(code::BAD_CONFIG, "required prevResult missing"));
    };
    let netns = open_netns(&env)?;
    let request = Request::Check(Check {
        key: env.key(config.network()?),
        ips,
    });
    done(ask(agent, config, &request, Some(&netns))?)
}

fn gc(
    _: Version,
    get: &dyn Fn(&str) -> Option<String>,
    config: &Config,
    agent: &dyn Agent,
) -> Result<Done, Failure> {
    Environment::read(get, &["CNI_PATH"])?;
    let request = Request::Gc(Gc {
        network: config.network()?,
        valid: config.valid_attachments()?,
    });
    done(ask(agent, config, &request, None)?)
}

fn status(
    _: Version,
    get: &dyn Fn(&str) -> Option<String>,
    config: &Config,
    agent: &dyn Agent,
) -> Result<Done, Failure> {
    Environment::read(get, &["CNI_PATH"])?;
    config.network()?;
    let answer = agent
        .ask(&config.socket(), &Request::Status, None)
        .map_err(|error| Failure::because(code::NOT_AVAILABLE, "plugin not available", error))?;
    match answer {
        Response::Failed(failure) => Err(failure),
        other => done(other),
    }
}

fn done(answer: Response) -> Result<Done, Failure> {
    match answer {
        Response::Done => Ok((None, None)),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(answer: &Response) -> Failure {
    Failure::because(
        code::FAILED,
        "agent of another version?",
        format!("unexpected answer {answer:?}"),
    )
}

fn ask(
    agent: &dyn Agent,
    config: &Config,
    request: &Request,
    netns: Option<&File>,
) -> Result<Response, Failure> {
    match agent.ask(&config.socket(), request, netns) {
        Ok(Response::Failed(failure)) => Err(failure),
        Ok(answer) => Ok(answer),
        Err(error @ ClientError::Absent { .. }) => Err(Failure::because(
            code::TRY_AGAIN,
            "the agent of this node is not running",
            error,
        )),
        Err(error @ ClientError::Broken { .. }) => Err(Failure::because(
            code::TRY_AGAIN,
            "the agent of this node does not answer",
            error,
        )),
    }
}

fn open_netns(env: &Environment) -> Result<File, Failure> {
    let wrong = |cause: &dyn std::fmt::Display| {
        Failure::because(
            code::BAD_ENVIRONMENT,
            format!("cannot open CNI_NETNS {:?}", env.netns),
            cause,
        )
    };
    let file = File::open(&env.netns).map_err(|error| wrong(&error))?;
    let theirs = file.metadata().map_err(|error| wrong(&error))?;
    let ours = fs::metadata("/proc/self/ns/net")
        .map_err(|error| Failure::because(code::IO, "cannot read /proc/self/ns/net", error))?;
    // Everything on nsfs has its device number; a path to anything else is a mistake.
    if theirs.dev() != ours.dev() {
        return Err(wrong(&"it is no namespace"));
    }
    if theirs.ino() == ours.ino() && !env.netns_override {
        return Err(Failure::new(
            code::SAME_NAMESPACE,
            format!("CNI_NETNS {:?} is the plugin's own namespace", env.netns),
        ));
    }
    Ok(file)
}

/// Writes a DEL where the agent finds it when it starts. The name says which attachment, so that a repeated DEL makes no
/// second file.
fn leave_release(state_dir: &Path, del: &Del) -> std::io::Result<()> {
    let dir = state_dir.join(RELEASES);
    fs::create_dir_all(&dir)?;
    let name = format!("{}@{}@{}", del.key.network, del.key.container_id, del.key.ifname);
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(del)?)?;
        file.sync_all()?;
        fs::rename(&temporary, dir.join(name))?;
        File::open(&dir)?.sync_all()
    };
    let result = write();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

#[cfg(test)]
#[path = "plugin_tests.rs"]
mod tests;
