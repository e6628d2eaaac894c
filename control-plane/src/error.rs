//! Errors as the API reports them.
