# The image that manifests/ name, from what `cargo xtask dist` has built:
#   cargo xtask dist && docker build -t beeline:latest .
FROM debian:trixie-slim
COPY dist/beeline dist/beeline-cni /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/beeline"]
