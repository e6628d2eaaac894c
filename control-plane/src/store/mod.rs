//! The revisioned store.
