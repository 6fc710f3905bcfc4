#!/usr/bin/env bash
# A run on one machine with one or several GPUs.
#
# Usage: scripts/launch/gpus.sh [--dry_run] [--processes N] [--port PORT] SCRIPT.py [--section.key value ...]
#
#   --processes N   N processes with one GPU each (device 0 to N - 1); by default one process has all
#                   GPUs, which is JAX's usual way and nearly always the better one
#   --port PORT     where they find each other; by default a free one
#   --dry_run       print what would be run
#
# The interpreter is $PYTHON, by default .venv/bin/python. Ctrl-C and SIGTERM reach all processes:
# they save, and the same command continues.
set -euo pipefail

usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $1" >&2; exit 2; }

processes=1 port="" dry_run=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --dry_run) dry_run=yes; shift ;;
    --processes) processes="${2:-}"; shift 2 || fail "--processes needs a number." ;;
    --port) port="${2:-}"; shift 2 || fail "--port needs a number." ;;
    -*) fail "$1 is no option of this helper; settings come after the script. See --help." ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "name a script to run, such as scripts/run_rlhf.py; see --help."
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--processes must be a number from 1 on, but is '$processes'."
[[ "$port" =~ ^[0-9]*$ ]] || fail "--port must be a number, but is '$port'."

python="${PYTHON:-.venv/bin/python}"
if [[ "$processes" == 1 ]]; then
  command=("$python" "$@")
  [[ -z "$dry_run" ]] || { printf '%q ' "${command[@]}"; echo; exit 0; }
  exec "${command[@]}"
fi

if [[ -z "$port" && -z "$dry_run" ]]; then
  port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
fi
set -m  # each process in a group of its own: a signal reaches it once, from here
started=()
for ((place = 0; place < processes; place++)); do
  command=("$python" "$@"
    --distributed.coordinator "localhost:${port:-PORT}"
    --distributed.num_processes "$processes"
    --distributed.process_id "$place"
    --distributed.local_device_ids "[$place]")
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "${command[@]}"; echo
  else
    "${command[@]}" &
    started+=("$!")
  fi
done
[[ -z "$dry_run" ]] || exit 0

# A signal ends `wait` early; the processes then save, and are waited for again.
trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM
trap 'kill -INT "${started[@]}" 2>/dev/null || true' INT
status=0
for process in "${started[@]}"; do
  ended=0
  wait "$process" || ended=$?
  while kill -0 "$process" 2>/dev/null; do ended=0; wait "$process" || ended=$?; done
  [[ "$ended" == 0 ]] || status="$ended"
done
exit "$status"
