#!/usr/bin/env bash
# A run on the hosts of a Cloud TPU slice, by gcloud.
#
# Usage: scripts/launch/tpu_vm.sh [--dry_run] --name NAME --zone ZONE [--project PROJECT] ACTION ...
#
#   create --type TYPE --version VERSION [--spot]
#           requests the slice as a queued resource, which is created when there is capacity
#   state   prints its state
#   setup   copies this clone's last commit to all hosts, and installs it there
#   start SCRIPT.py [--section.key value ...]
#           starts the script on all hosts, in the background
#   log     follows what the first host prints
#   stop    lets the run save and end; the same start continues it
#   delete  gives the slice back
#
#   --name, --zone, --project   of the slice; the project is gcloud's own by default
#   --dry_run                   print what would be run
#
# An example of a type and its version: v5litepod-16, v2-alpha-tpuv5-lite. On the hosts the clone is
# in ~/rlhf_jax and the output in ~/rlhf_jax/run.log; --run_dir has to be an address such as gs://.
set -euo pipefail

usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $1" >&2; exit 2; }
run() { if [[ -n "$dry_run" ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

name="" dry_run="" where=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --dry_run) dry_run=yes; shift ;;
    --name) name="${2:-}"; shift 2 || fail "--name needs a name." ;;
    --zone | --project) where+=("$1=${2:-}"); shift 2 || fail "an option lacks its value." ;;
    -*) fail "$1 is no option of this helper; see --help." ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "name an action: create, state, setup, start, log, stop or delete; see --help."
[[ -n "$name" ]] || fail "give the slice's --name."
[[ " ${where[*]} " == *" --zone="* ]] || fail "give the slice's --zone."
action="$1"; shift

tpu=(gcloud compute tpus)
everywhere() { run "${tpu[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

create() {
  local type="" version="" extra=()
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --type) type="${2:-}"; shift 2 || fail "--type needs a value." ;;
      --version) version="${2:-}"; shift 2 || fail "--version needs a value." ;;
      --spot) extra+=(--spot); shift ;;
      *) fail "create knows --type, --version and --spot, but no $1." ;;
    esac
  done
  [[ -n "$type" && -n "$version" ]] || fail "create needs --type and --version."
  run "${tpu[@]}" queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${extra[@]+"${extra[@]}"}
}

setup() {
  # A name that nobody else on this machine can know before.
  archive="$(mktemp)"
  trap 'rm -f "$archive"' EXIT
  run git archive --format=tar.gz --output="$archive" HEAD
  run "${tpu[@]}" tpu-vm scp "$archive" "$name:rlhf_jax.tar.gz" "${where[@]}" --worker=all
  everywhere "mkdir -p rlhf_jax && tar -xzf rlhf_jax.tar.gz -C rlhf_jax && cd rlhf_jax && python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python 3.12 .venv && ~/.local/bin/uv pip install --quiet -e '.[train,tpu]' gcsfs"
}

start() {
  [[ $# -gt 0 ]] || fail "start needs a script, such as scripts/run_rlhf.py."
  # The processes find each other by what Google's cloud tells them of the slice.
  everywhere "cd rlhf_jax && { nohup .venv/bin/python $(printf '%q ' "$@")>> run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
}

case "$action" in
  create) create "$@" ;;
  state) run "${tpu[@]}" queued-resources describe "$name" "${where[@]}" --format="value(state.state)" ;;
  setup) setup ;;
  start) start "$@" ;;
  log) run "${tpu[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 --command="tail -n 50 -f rlhf_jax/run.log" ;;
  stop) everywhere "kill -TERM \$(cat rlhf_jax/run.pid)" ;;
  delete) run "${tpu[@]}" queued-resources delete "$name" "${where[@]}" --force ;;
  *) fail "$action is no action; they are create, state, setup, start, log, stop and delete." ;;
esac
