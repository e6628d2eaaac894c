//! What is wrong with objects, said once each.

use std::collections::{HashSet, VecDeque};

use dataplane_model::Problem;
use tracing::warn;

/// Problems that `beeline status` shows.
const SHOWN: usize = 20;
/// Problems that are remembered so as not to be logged again.
const REMEMBERED: usize = 10_000;

/// The problems that have been said.
#[derive(Debug, Default)]
pub(super) struct Problems {
    shown: VecDeque<Problem>,
    known: HashSet<Problem>,
}

impl Problems {
    /// Logs a problem, unless it has been.
    pub(super) fn say(&mut self, problem: Problem) {
        if self.known.len() >= REMEMBERED {
            self.known.clear();
        }
        if self.known.insert(problem.clone()) {
            warn!(object = %problem.object, "{}", problem.message);
            self.shown.retain(|shown| *shown != problem);
            self.shown.push_back(problem);
            if self.shown.len() > SHOWN {
                self.shown.pop_front();
            }
        }
    }

    /// The last ones, oldest first.
    pub(super) fn shown(&self) -> Vec<String> {
        self.shown.iter().map(ToString::to_string).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_said_once_and_the_last_are_shown() {
        let mut problems = Problems::default();
        for number in (0..SHOWN + 5).flat_map(|number| [number, number]) {
            problems.say(Problem {
                object: format!("Service a/{number}"),
                message: "is bad".into(),
            });
        }
        let shown = problems.shown();
        assert_eq!(shown.len(), SHOWN);
        assert_eq!(shown.first().map(String::as_str), Some("Service a/5: is bad"));
        assert_eq!(shown.last().map(String::as_str), Some("Service a/24: is bad"));
        problems.say(Problem {
            object: "Service a/0".into(),
            message: "is bad".into(),
        });
        assert_eq!(problems.shown(), shown, "not again");
    }
}
