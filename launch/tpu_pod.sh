#!/usr/bin/env bash
# Runs a command of this repository on every host of a Cloud TPU slice, again after every preemption.
#
#   launch/tpu_pod.sh [--dry_run] create | setup | delete
#   launch/tpu_pod.sh [--dry_run] run launch/train.py --config configs/refatomnet_cached.py --workdir DIR
#
# `run` creates and sets up the slice where there is none, and starts over when it was preempted; the command goes on from
# its last checkpoint. It ends with the command's exit code. DIR and the data are on storage that all hosts share.
# --dry_run prints the commands and runs none. From the environment:
#
#   TPU_NAME        of the slice                          TPU_ZONE       such as us-west4-a
#   TPU_TYPE        v5litepod-16 if not set               TPU_SOFTWARE   v2-alpha-tpuv5-lite if not set
#   TPU_SPOT        1 (cheaper, preempted) if not set     TPU_REPOSITORY git address that the hosts can clone
#   TPU_COMMIT      what they check out, main if not set
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

DRY_RUN=0
if [[ "${1:-}" == "--dry_run" ]]; then
  DRY_RUN=1
  shift
fi
ACTION="${1:-}"
[[ $# -gt 0 ]] && shift
for name in TPU_NAME TPU_ZONE; do
  [[ -n "${!name:-}" ]] || fail "$name is not set"
done
TPU_TYPE="${TPU_TYPE:-v5litepod-16}"
TPU_SOFTWARE="${TPU_SOFTWARE:-v2-alpha-tpuv5-lite}"
TPU_SPOT="${TPU_SPOT:-1}"
TPU_COMMIT="${TPU_COMMIT:-main}"

# Prints a command, and runs it unless this is a dry run.
act() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ "$DRY_RUN" == 1 ]] || "$@"
}

on_all_hosts() {
  act gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$TPU_ZONE" --worker=all --command="$1"
}

state() {
  [[ "$DRY_RUN" == 1 ]] && return 0
  gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$TPU_ZONE" --format='value(state)' 2>/dev/null || true
}

create() {
  local spot=()
  [[ "$TPU_SPOT" == 1 ]] && spot=(--spot)
  act gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$TPU_ZONE" \
    --accelerator-type="$TPU_TYPE" --version="$TPU_SOFTWARE" "${spot[@]}"
}

setup() {
  [[ -n "${TPU_REPOSITORY:-}" ]] || fail "TPU_REPOSITORY is not set"
  local clone install
  clone="rm -rf ravar_jax && git clone -q $(printf %q "$TPU_REPOSITORY") ravar_jax && cd ravar_jax"
  clone+=" && git checkout -q $(printf %q "$TPU_COMMIT")"
  install="python3 -m venv .venv && .venv/bin/pip install -q 'jax[tpu]' -r requirements.txt"
  on_all_hosts "$clone && $install"
}

delete() {
  act gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$TPU_ZONE" --quiet
}

run() {
  [[ $# -gt 0 ]] || fail "run needs a command, such as launch/train.py --config ..."
  local command code
  command="cd ravar_jax && .venv/bin/python$(printf ' %q' "$@")"
  while true; do
    case "$(state)" in
      READY) ;;
      "")
        create
        setup
        ;;
      *) # preempted, or half made
        delete
        create
        setup
        ;;
    esac
    code=0
    on_all_hosts "$command" || code=$?
    # A command that failed on a slice that is well would fail again.
    if [[ "$code" == 0 || "$(state)" == READY ]]; then
      return "$code"
    fi
    echo "the slice is gone; starting over" >&2
  done
}

case "$ACTION" in
  create | setup | delete) "$ACTION" ;;
  run) run "$@" ;;
  *) fail "expected create, setup, run or delete, not '$ACTION'" ;;
esac
