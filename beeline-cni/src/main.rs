//! The CNI plugin.

use std::io::{Read, Write};
use std::process::ExitCode;

use beeline_cni::plugin;

fn main() -> ExitCode {
    let environment = |name: &str| std::env::var(name).ok();
    if environment("CNI_COMMAND").is_none() {
        // what the plugins of the reference do, so that a person who starts one learns what it is
        eprintln!("CNI plugin beeline-cni {}", env!("CARGO_PKG_VERSION"));
        eprintln!(
            "CNI protocol versions supported: {}",
            beeline_cni::version::SUPPORTED.join(", ")
        );
        return ExitCode::SUCCESS;
    }
    let mut input = Vec::new();
    let read = std::io::stdin()
        .lock()
        .take(plugin::MAX_CONFIG + 1)
        .read_to_end(&mut input);
    let outcome = match read {
        Ok(_) => plugin::run(&environment, &input, &beeline_cni::client::Socket),
        Err(error) => plugin::unreadable(&error),
    };
    if let Some(note) = &outcome.note {
        eprintln!("beeline-cni: {note}");
    }
    let mut stdout = std::io::stdout().lock();
    let written = stdout
        .write_all(outcome.stdout.as_bytes())
        .and_then(|()| stdout.flush());
    if outcome.failed || written.is_err() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
