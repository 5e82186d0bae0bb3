#!/bin/sh
# The whole system on one machine. Thin wrappers over `cargo xtask dev`, which has all options.
set -eu

usage() {
    cat >&2 <<'TEXT'
usage: scripts/dev.sh COMMAND [OPTION…]

  mock     build and run everything, with simulators in place of GPUs, until Ctrl-C
  metal    on a Mac with Apple Silicon: the same with vLLM on its GPU, which is installed once
  stop     metal    on a Mac with Apple Silicon: the same with vLLM on its GPU, which is installed once
  stop what runs in another terminal or in the background
  status   say what runs where
  logs     show the end of the logs

Options are those of `cargo xtask dev`; see `cargo xtask dev --help`. `metal` heeds METAL_VLLM (a vllm that is
installed), METAL_PYTHON, METAL_CHAT_MODEL and METAL_EMBEDDINGS_MODEL (`none` to go without).
TEXT
    exit 2
}

[ $# -gt 0 ] || usage
command=$1
shift
cd "$(dirname "$0")/.."
case $command in
mock) exec cargo xtask dev "$@" ;;
metal) exec cargo xtask dev --metal "$@" ;;
stop | status | logs) exec cargo xtask dev "$command" "$@" ;;
*) usage ;;
esac
