//! Names that many objects share (namespaces, port names), kept once.

use std::sync::Arc;

use hashbrown::HashSet;

/// How many names may be known before those that nobody uses any more are looked for.
const SWEEP_AT_LEAST: usize = 1024;

/// The names in use.
#[derive(Debug, Default)]
pub(crate) struct Names {
    known: HashSet<Arc<str>>,
    sweep_at: usize,
}

impl Names {
    /// The name as everybody else has it.
    pub(crate) fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(name) = self.known.get(text) {
            return Arc::clone(name);
        }
        if self.known.len() >= self.sweep_at.max(SWEEP_AT_LEAST) {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.sweep_at = self.known.len() * 2;
        }
        let name: Arc<str> = text.into();
        self.known.insert(Arc::clone(&name));
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shared_and_forgotten() {
        let mut names = Names::default();
        let kept = names.get("http");
        assert!(Arc::ptr_eq(&kept, &names.get("http")));
        for i in 0..10 * SWEEP_AT_LEAST {
            names.get(&i.to_string());
        }
        assert!(names.known.len() <= 2 * SWEEP_AT_LEAST, "{}", names.known.len());
        assert!(Arc::ptr_eq(&kept, &names.get("http")));
    }
}
