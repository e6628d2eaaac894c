//! API discovery documents.
