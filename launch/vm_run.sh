#!/usr/bin/env bash
# Starts the run on a worker of a TPU VM, follows its output, and exits with its status. `tpu_vm.sh run` calls it on every
# worker.
#
#   launch/vm_run.sh WORKDIR [ARGUMENT ...]
#
# The run outlives the connection. While it is active, the same command only follows it. The exit status is that of the
# run. It is 75 when SIGTERM stopped the run, which can then resume, and 69 when something is not installed.
set -euo pipefail

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $1 == /shared/* ]] && ! mountpoint --quiet /shared; then
    echo "/shared is not mounted; launch/tpu_vm.sh install --share mounts it" >&2
    exit 69
fi
cd # a relative WORKDIR is in the home folder
mkdir -p sgpo_jax.run
state=$PWD/sgpo_jax.run
if [[ $1 == gs://* ]]; then
    workdir=$1 outputs=$state
else
    mkdir -p "$1"
    workdir=$(cd "$1" && pwd)
    outputs=$workdir
fi
shift
cd "$tree"

# The host name of a worker ends in its number.
log=$outputs/output.${HOSTNAME##*-}.log
command=(.venv/bin/python -m sgpo_jax.main --distributed "--workdir=$workdir" "$@")
text=$(printf '%q ' "${command[@]}")
exec 9>>"$state/lock"
if flock --nonblock 9; then
    printf '%s' "$text" >"$state/command"
    rm -f "$state/status"
    touch "$log"
    stat -c %s "$log" >"$state/start"
    if [[ -d /shared ]]; then
        export HF_HOME=/shared/huggingface # downloaded once, not by every worker
    fi
    nohup launch/preemptible.sh --status "$state/status" "${command[@]}" >>"$log" 2>&1 </dev/null &
    echo $! >"$state/pid"
elif [[ $(<"$state/command") != "$text" ]]; then
    echo "another run is active here: $(<"$state/command")" >&2
    exit 1
fi
exec 9>&-
tail --pid="$(<"$state/pid")" --sleep-interval=0.2 -c "+$(($(<"$state/start") + 1))" -f "$log"
if [[ ! -f $state/status ]]; then
    echo "the run was killed" >&2
    exit 137
fi
exit "$(<"$state/status")"
