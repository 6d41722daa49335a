#!/usr/bin/env bash
# The batch script that slurm.sh submits: one process on each node, and back into the queue when SIGTERM has stopped it.
#
#   launch/slurm_job.sh GPUS PYTHON ARGUMENT ...
set -uo pipefail

gpus=$1 python=$2
shift 2
# By itself JAX takes each task for one with one GPU. One process with all GPUs of a node loads the model once.
JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))
export JAX_LOCAL_DEVICE_IDS

trap : TERM # of a preemption, which is for the run; without this the script would end before it
# One that has saved must not take the others down with it.
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 \
    launch/preemptible.sh "$python" -m sgpo_jax.main --distributed "$@"
status=$?
# Not after scancel, which has sent SIGTERM as well.
if ((status == 75)) && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "stopped by SIGTERM: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
