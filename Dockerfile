# Two images: `gateway` (the default) and `simulator` (vllm-sim and vllm-load, to try it without a GPU).
#
#   docker build -t vllm-gateway .
#   docker build -t vllm-gateway-simulator --target simulator .
#
# The programs are linked statically: they need nothing of the image that they run in. Alpine is there for its wget, which the health checks
# are made with, and a shell to look around in. `store.url: embedded` cannot work here (docs/ARCHITECTURE.md says why): CLICKHOUSE_URL names a
# server, or `none`.

ARG RUST_VERSION=1.95.0
ARG ALPINE_VERSION=3.22

FROM rust:${RUST_VERSION}-alpine${ALPINE_VERSION} AS build
# Alpine keeps one version of a package, so that a pinned one is soon gone; its release, above, is what is pinned.
# hadolint ignore=DL3018
RUN apk add --no-cache musl-dev
WORKDIR /src
COPY . .
# The workspace has this member too, whose sources no image needs.
RUN mkdir xtask/src && echo 'fn main() {}' > xtask/src/main.rs
# Caches keep what was compiled between two builds; the programs are copied out, since a cache is no part of the image.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --package gateway-user --bins \
    && mkdir /out \
    && cp target/release/vllm-gateway target/release/vllm-sim target/release/vllm-load /out/ \
    && strip /out/*

FROM alpine:${ALPINE_VERSION} AS runtime
# A number, not a name: Kubernetes' runAsNonRoot believes nothing else.
RUN addgroup -S -g 65532 gateway \
    && adduser -S -D -H -h /var/lib/vllm-gateway -u 65532 -G gateway gateway \
    && install -d -o 65532 -g 65532 -m 0750 /var/lib/vllm-gateway
USER 65532:65532

FROM runtime AS simulator
COPY --from=build /out/vllm-sim /out/vllm-load /usr/local/bin/
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
    CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["/usr/local/bin/vllm-sim"]
CMD ["--listen", "0.0.0.0:8000", "--model", "sim-llm"]

FROM runtime AS gateway
COPY --from=build /out/vllm-gateway /usr/local/bin/
COPY LICENSE /usr/share/licenses/vllm-gateway/
COPY config.yaml /etc/vllm-gateway/config.yaml
# Every command finds the file here without being told: `docker exec … vllm-gateway report --since 1h`.
WORKDIR /etc/vllm-gateway
# The spool must outlive the container: a volume belongs on /var/lib/vllm-gateway.
ENV SPOOL_DIR=/var/lib/vllm-gateway/spool
EXPOSE 8080 9464
# The admin port answers 200 while the process serves; whether its upstreams do is at /ready.
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
    CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9464/health"]
ENTRYPOINT ["/usr/local/bin/vllm-gateway"]
CMD ["run"]
