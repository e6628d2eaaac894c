//! What the demo prints: plain lines, with colour only on a terminal.

use std::io::IsTerminal;
use std::time::Instant;

use beeline_tests::LoadReport;

pub(crate) struct Show {
    colour: bool,
    start: Instant,
}

impl Show {
    pub(crate) fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            colour,
            start: Instant::now(),
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub(crate) fn step(&self, text: &str) {
        let time = format!("[{:5.1} s]", self.start.elapsed().as_secs_f64());
        println!("\n{} {}", self.paint("2", &time), self.paint("1;36", text));
    }

    /// A command with its prompt, and what it printed.
    pub(crate) fn output(&self, command: &str, text: &str) {
        println!("  {}", self.paint("1", command));
        self.text(text);
    }

    pub(crate) fn text(&self, text: &str) {
        for line in text.trim_end().lines() {
            println!("  {line}");
        }
    }

    pub(crate) fn note(&self, text: &str) {
        println!("  {}", self.paint("2", text));
    }

    /// Who answered how often.
    pub(crate) fn spread(&self, client: &str, report: &LoadReport) {
        let shares: Vec<String> = report
            .replies
            .iter()
            .map(|(name, count)| format!("{name} {count:3}"))
            .collect();
        println!(
            "  from {client:32} {} ok, {} failed    {}",
            report.ok,
            report.failed,
            shares.join("   ")
        );
        self.errors(report);
    }

    pub(crate) fn counts(&self, client: &str, report: &LoadReport) {
        println!(
            "  from {client:32} {} ok, {} failed, slowest {:.1} ms",
            report.ok, report.failed, report.slowest_ms
        );
        self.errors(report);
    }

    fn errors(&self, report: &LoadReport) {
        for (error, count) in &report.errors {
            self.note(&format!("  {count} x {error}"));
        }
    }

    pub(crate) fn failure(&self, text: &str) {
        eprintln!("\n{} {text}", self.paint("1;31", "demo failed:"));
    }

    pub(crate) fn done(&self) {
        let text = format!(
            "all as it should be, in {:.1} s",
            self.start.elapsed().as_secs_f64()
        );
        println!("\n{}", self.paint("1;32", &text));
    }
}
