//! Results: a table for people, or a line of JSON per figure.

use serde_json::json;

/// What a figure should be.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Only for comparison.
    None,
}

struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    target: Target,
}

impl Figure {
    fn ok(&self) -> bool {
        match self.target {
            Target::AtLeast(limit) => self.value >= limit,
            Target::AtMost(limit) => self.value <= limit,
            Target::None => true,
        }
    }
}

pub(crate) struct Figures {
    json: bool,
    list: Vec<Figure>,
}

impl Figures {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            json,
            list: Vec::new(),
        }
    }

    /// What is going on, for people.
    pub(crate) fn progress(&self, text: &str) {
        eprintln!("{text}");
    }

    /// A result; with `--json` it is printed at once.
    pub(crate) fn add(&mut self, name: impl Into<String>, value: f64, unit: &'static str, target: Target) {
        let figure = Figure {
            name: name.into(),
            value,
            unit,
            target,
        };
        if self.json {
            let target = match target {
                Target::AtLeast(limit) | Target::AtMost(limit) => Some(limit),
                Target::None => None,
            };
            let (name, ok) = (&figure.name, figure.ok());
            println!(
                "{}",
                json!({"name": name, "value": value, "unit": unit, "target": target, "ok": ok})
            );
        }
        self.list.push(figure);
    }

    pub(crate) fn finish(&self) {
        if self.json {
            return;
        }
        println!("{:<80} {:>12} {:<6} {:>12}", "figure", "value", "unit", "target");
        for figure in &self.list {
            let target = match figure.target {
                Target::AtLeast(limit) => format!(">= {limit}"),
                Target::AtMost(limit) => format!("<= {limit}"),
                Target::None => String::new(),
            };
            let verdict = if figure.ok() { "" } else { "  MISSED" };
            println!(
                "{:<80} {:>12.3} {:<6} {target:>12}{verdict}",
                figure.name, figure.value, figure.unit
            );
        }
    }

    pub(crate) fn all_ok(&self) -> bool {
        self.list.iter().all(Figure::ok)
    }
}

/// The value below which a share `q` (0 to 1) of the values lies.
pub(crate) fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into a list that fits into memory, q is not negative"
    )]
    let index = ((values.len().saturating_sub(1)) as f64 * q).round() as usize;
    values.get(index).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let mut values = vec![5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(quantile(&mut values, 0.5), 3.0);
        assert_eq!(quantile(&mut values, 0.0), 1.0);
        assert_eq!(quantile(&mut values, 1.0), 5.0);
        assert!(quantile(&mut [], 0.5).is_nan());
    }

    #[test]
    fn targets_have_a_direction() {
        let mut figures = Figures::new(false);
        figures.add("ratio", 0.99, "", Target::AtLeast(0.98));
        figures.add("time", 0.2, "s", Target::AtMost(0.3));
        assert!(figures.all_ok());
        figures.add("memory", 49.0, "MiB", Target::AtMost(48.0));
        assert!(!figures.all_ok());
    }
}
