#!/usr/bin/env bash
# The batch script that slurm.sh submits: one process on each node. After SIGTERM the job returns to the queue.
#
#   launch/slurm_job.sh GPUS PYTHON ARGUMENT ...
set -uo pipefail

gpus=$1 python=$2
shift 2
# By default JAX gives each task one GPU. One process with all GPUs of a node loads the model only once.
JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))
export JAX_LOCAL_DEVICE_IDS

trap : TERM # the run handles the SIGTERM of a preemption; this script must not end before it
# A process that has saved and exited must not stop the others.
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 \
    launch/preemptible.sh "$python" -m sgpo_jax.main --distributed "$@"
status=$?
# scancel sends SIGTERM too, but the job is then no longer RUNNING, and stays out of the queue.
if ((status == 75)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "stopped by SIGTERM: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
