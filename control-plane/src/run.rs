//! Brings the control plane up and down.
