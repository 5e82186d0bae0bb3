#!/bin/sh
# The whole system on one machine. Thin wrappers over `cargo xtask dev`, which has all options.
set -eu

usage() {
    cat >&2 <<'TEXT'
usage: scripts/dev.sh COMMAND [OPTION…]

  mock     build and run everything, with simulators in place of GPUs, until Ctrl-C
  stop     stop what runs in another terminal or in the background
  status   say what runs where
  logs     show the end of the logs

Options are those of `cargo xtask dev`; see `cargo xtask dev --help`.
TEXT
    exit 2
}

[ $# -gt 0 ] || usage
command=$1
shift
cd "$(dirname "$0")/.."
case $command in
mock) exec cargo xtask dev "$@" ;;
stop | status | logs) exec cargo xtask dev "$command" "$@" ;;
*) usage ;;
esac
