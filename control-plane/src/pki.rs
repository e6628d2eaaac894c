//! Certificates and the kubeconfig.
