//! The patch types.
