//! What the API serves, and the rules for each kind.
