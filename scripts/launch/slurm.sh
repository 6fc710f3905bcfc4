#!/usr/bin/env bash
#SBATCH --job-name=rlhf_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=rlhf_jax-%j.log
# A run on several nodes under SLURM, one process for each node, which has all of its GPUs.
#
# Usage: sbatch [options of sbatch] scripts/launch/slurm.sh [--dry_run] SCRIPT.py [--section.key value ...]
#
#   --dry_run    print what would be run; also outside of SLURM
#
# Options of sbatch take the place of those at the head of this file:
#   --nodes=4                                  another number of nodes
#   --ntasks-per-node=8                        one process for each of 8 GPUs
#   --partition=... --account=... --time=...   as your cluster requires
#
# Submit it from the root of the clone, which all nodes have to see, like --run_dir. The interpreter is
# $PYTHON, by default .venv/bin/python. Five minutes before the time limit, and when it is preempted,
# the run saves; the job is then put back into the queue and continues where it stopped.
set -euo pipefail

usage() { sed -n '/^# A run/,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $1" >&2; exit 2; }

dry_run=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --dry_run) dry_run=yes; shift ;;
    -*) fail "$1 is no option of this helper; settings come after the script. See --help." ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "name a script to run, such as scripts/run_rlhf.py; see --help."

# The processes find each other by what srun puts into their environment. Each has to see all GPUs
# of its node, of which JAX then takes one for each process there.
command=(srun --kill-on-bad-exit=1 --gpu-bind=none "${PYTHON:-.venv/bin/python}" "$@")
[[ -z "$dry_run" ]] || { printf '%q ' "${command[@]}"; echo; exit 0; }
[[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is to be given to sbatch; see --help."

cd "$SLURM_SUBMIT_DIR"
stopping=""
"${command[@]}" &
step=$!
# To the processes alone: srun itself would kill them for it.
trap 'stopping=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do status=0; wait "$step" || status=$?; done
if [[ -n "$stopping" ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
