#!/usr/bin/env bash
# Submits sgpo_jax to a SLURM cluster with GPUs.
#
#   launch/slurm.sh --nodes N --gpus N --time LIMIT --config configs/FILE.py --workdir DIR
#                   [--name NAME] [--partition NAME] [--account NAME] [--qos NAME] [--python PATH] [--grace SECONDS]
#                   [--dry-run] [-- --config.field=value ...]
#
#   --nodes, --gpus   number of nodes, which the job uses alone, and of GPUs of each node.
#   --time            time limit of one job, HH:MM:SS or D-HH:MM:SS; the longest that the cluster allows is best.
#   --workdir         an absolute path that all nodes see. After a failure, the same command resumes the run.
#   --python          Python of the environment with this package and its `gpu` extra; default .venv/bin/python.
#   --grace           seconds that the run has to save before it is stopped; default 120.
#
# Before the time limit, and when the cluster announces a preemption, the run saves and the job returns to the queue. This
# repeats until the run ends by itself. This tree and DIR must be on a file system that all nodes see.
#
#   tail -f DIR/slurm.log      shows the output
#   squeue --me                shows the place in the queue
#   scancel JOB                stops the run for good; it saves
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ ${1-} == --help || ${1-} == -h ]]; then
    usage
    exit
fi
nodes="" gpus="" time="" config="" workdir="" name=sgpo python=.venv/bin/python grace=120
# shellcheck disable=SC2034 # read by their names
partition="" account="" qos=""
parse slurm.sh "nodes gpus time config workdir name partition account qos python grace" "" "$@"

check nodes "$nodes" '[1-9][0-9]{0,3}' "a whole number from 1 on"
check gpus "$gpus" '[1-9][0-9]?' "the number of GPUs of a node"
check time "$time" '([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]' "HH:MM:SS or D-HH:MM:SS"
check_config "$config"
check workdir "$workdir" '/[A-Za-z0-9_./-]+' "a plain absolute path"
check name "$name" '[A-Za-z0-9_.-]{1,64}' "letters, digits, _, . and -"
check python "$python" '[A-Za-z0-9_./-]+' "a plain path"
check_seconds grace "$grace"
((10#$grace > 0)) || fail "--grace must be at least 1"
check_overrides
where=()
for option in partition account qos; do
    if [[ -n ${!option} ]]; then
        check "$option" "${!option}" '[A-Za-z0-9_.,-]+' "letters, digits, _, ., - and commas"
        where+=("--$option=${!option}")
    fi
done
need sbatch
[[ $dry_run == yes || -x $(cd "$root" && command -v "$python") ]] || fail "--python: there is no program $python"

execute mkdir -p "$workdir"
# SLURM may send the signal up to a minute earlier.
execute sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus" --exclusive --mem=0 \
    --time="$time" --signal="TERM@$((10#$grace + 60))" --requeue --open-mode=append --output="$workdir/slurm.log" \
    ${where[@]+"${where[@]}"} --chdir="$root" "$root/launch/slurm_job.sh" "$gpus" "$python" \
    "--workdir=$workdir" "--config=$config" "--config.grace=$grace" ${overrides[@]+"${overrides[@]}"}
