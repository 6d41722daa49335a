#!/usr/bin/env bash
# Runs sgpo_jax on Cloud TPU VMs: on one, or on all workers of a pod slice.
#
#   launch/tpu_vm.sh create  WHERE --type TYPE [--spot] [--queued]
#   launch/tpu_vm.sh install WHERE [--share SERVER:/SHARE]
#   launch/tpu_vm.sh put     WHERE --from LOCAL_PATH --to PATH
#   launch/tpu_vm.sh exec    WHERE [--worker N] -- COMMAND [ARGUMENT ...]
#   launch/tpu_vm.sh run     WHERE --config configs/FILE.py --workdir DIR [-- --config.field=value ...]
#   launch/tpu_vm.sh keep    WHERE --type TYPE [--spot] [--queued] [--share SERVER:/SHARE] [--retries N] [--poll SECONDS]
#                            --config configs/FILE.py --workdir DIR [-- --config.field=value ...]
#   launch/tpu_vm.sh stop    WHERE
#   launch/tpu_vm.sh collect WHERE --workdir DIR --to LOCAL_DIR
#   launch/tpu_vm.sh fetch   WHERE --from PATH --to LOCAL_DIR
#   launch/tpu_vm.sh delete  WHERE [--queued]
#
# WHERE is --name NAME --zone ZONE [--project PROJECT]; the default project is that of gcloud. Every subcommand takes
# --dry-run, which prints the commands and runs none of them.
#
#   create   makes the TPU VM, or all VMs of a slice. TYPE is v6e-N or v5litepod-N with N chips (1, 4, 8, 16, 32, 64, 128,
#            256), v5p-N or v4-N with N/2 chips, v3-N or v2-N. --spot: cheaper, but can be preempted. --queued: makes a
#            queued resource of the same name, and waits until it is ready.
#   install  copies the committed tree to ~/sgpo_jax on every worker and installs it with its `tpu` extra. --share mounts
#            an NFS share at /shared, and makes data/ a link to /shared/data.
#   put      copies a local file or folder to worker 0, or to a bucket: --to gs://BUCKET/PATH.
#   exec     runs a command in ~/sgpo_jax, with the virtual environment, on worker N or on `all`; the default is worker 0.
#   run      starts training on every worker and follows its output. A lost connection or Ctrl-C does not stop the run: the
#            same command follows it again. Where the run has stopped, the command resumes it. On more than one worker, DIR
#            must be in a bucket, gs://BUCKET/PATH, or on the share, /shared/NAME.
#   keep     runs until the run ends by itself. Creates the TPU and installs the package where the TPU is missing or was
#            preempted, and asks again as long as there is no room. Gives up after N failures (3) in a row on a TPU that is
#            ready, each within an hour. Waits SECONDS (60) before each new attempt.
#   stop     sends SIGTERM to the run, which saves and ends.
#   collect  copies the results in DIR, without the checkpoints, to LOCAL_DIR.
#   fetch    copies any file or folder from worker 0, or from a bucket, to LOCAL_DIR.
#   delete   deletes the TPU with everything on it, without asking.
#
# gcloud must be installed and logged in. This script reads and stores no secrets. For more than one worker, gcloud needs
# its key in the SSH agent: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

known="create, install, put, exec, run, keep, stop, collect, fetch or delete"
(($# > 0)) || fail "the subcommand is missing: $known"
subcommand=$1
shift
values="name zone project" flags=""
case $subcommand in
--help | -h)
    usage
    exit
    ;;
create) values+=" type" flags="spot queued" ;;
install) values+=" share" ;;
put | fetch) values+=" from to" ;;
exec) values+=" worker" ;;
run) values+=" config workdir" ;;
keep) values+=" type share config workdir retries poll" flags="spot queued" ;;
stop) ;;
collect) values+=" workdir to" ;;
delete) flags="queued" ;;
*) fail "unknown subcommand '$subcommand': it must be $known" ;;
esac

name="" zone="" project="" type="" share="" from="" to="" worker=0 config="" workdir="" retries=3 poll=60
spot=no queued=no
parse "$subcommand" "$values" "$flags" "$@"

check name "$name" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' \
    "lower-case letters, digits and hyphens, at most 63, the first a letter"
check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-east5-a"
where=(--zone "$zone")
if [[ -n $project ]]; then
    check project "$project" '[a-z][a-z0-9-]{4,28}[a-z0-9]' "a project id"
    where+=(--project "$project")
fi
[[ -z $share ]] || check_share "$share"
[[ " exec run keep " == *" $subcommand "* ]] || no_overrides "$subcommand"

tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

# A path on the VM: relative to the home folder, unless absolute.
check_path() {
    if in_bucket "$2"; then
        check_bucket "$1" "$2"
        return
    fi
    check "$1" "$2" '[A-Za-z0-9_./][A-Za-z0-9_./-]*' "a plain path on the VM"
}

# Sets `version` to the software version that the type needs.
check_type() {
    local what="v6e-N or v5litepod-N with N of 1, 4, 8, 16, ... 256, or v5p-N, v4-N, v3-N or v2-N with N a multiple of 8"
    check type "$type" '(v6e|v5litepod)-(1|4|8|16|32|64|128|256)|(v5p|v[234])-[1-9][0-9]{0,4}' "$what"
    case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *)
        ((${type#*-} % 8 == 0)) || fail "--type must be $what, not '$type'"
        version="tpu-ubuntu2204-base"
        if [[ $type == v5p-* ]]; then
            version=v2-alpha-tpuv5
        fi
        ;;
    esac
}

check_run() {
    check_config "$config"
    check_path workdir "$workdir"
    check_overrides
}

request_state=("${queue[@]}" list "${where[@]}" --filter "name ~ /$name\$" --format "value(state.state)")
node_state=("${tpu[@]}" list "${where[@]}" --filter "name ~ /$name\$" --format "value(state)")

# Prints the state of the TPU, or of the request for it with --queued, in one word: ready, coming, gone or absent.
look() {
    local state absent=absent
    if [[ $queued == yes ]]; then
        state=$("${request_state[@]}") || return
        case $state in
        ACTIVE) absent=gone ;;
        "") echo absent && return ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING) echo gone && return ;;
        *) echo coming && return ;;
        esac
    fi
    state=$("${node_state[@]}") || return
    case $state in
    READY) echo ready ;;
    CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING) echo coming ;;
    "") echo $absent ;;
    *) echo gone ;; # PREEMPTED, TERMINATED, STOPPED, ...
    esac
}

# Runs or prints the commands of `look`.
show_look() {
    [[ $queued == no ]] || execute "${request_state[@]}"
    execute "${node_state[@]}"
}

# Runs another subcommand of this script with the same WHERE.
again() {
    local dry=()
    if [[ $dry_run == yes ]]; then
        dry=(--dry-run)
    fi
    local other=$1
    shift
    "${BASH_SOURCE[0]}" "$other" --name "$name" "${where[@]}" ${dry[@]+"${dry[@]}"} "$@"
}

keep() {
    local state status started failures=0
    local request=() creating=() installing=()
    [[ $queued == no ]] || request=(--queued)
    [[ $spot == no ]] || creating=(--spot)
    [[ -z $share ]] || installing=(--share "$share")
    bring() { again create --type "$type" ${creating[@]+"${creating[@]}"} ${request[@]+"${request[@]}"}; }
    give_up() { again delete ${request[@]+"${request[@]}"}; }
    install() { again install ${installing[@]+"${installing[@]}"}; }
    run() { again run --config "$config" --workdir "$workdir" -- ${overrides[@]+"${overrides[@]}"}; }

    if [[ $dry_run == yes ]]; then
        remark "every $poll seconds at most, while there is no run to follow:"
        show_look
        remark "whenever it was taken away:"
        give_up
        remark "then, or where there is none:"
        bring
        install
        remark "then, and again until the run has ended by itself:"
        run
        return
    fi
    while :; do
        started=$SECONDS status=0
        if state=$(look); then
            echo "$(date '+%F %T') $name: $state"
            case $state in
            coming) sleep "$poll" && continue ;;
            ready) run || status=$? ;;
            *)
                [[ $state != gone ]] || give_up || status=$?
                if ((status == 0)); then
                    { bring && install && run; } || status=$?
                fi
                ;;
            esac
            if ((status == 69)); then
                status=0
                { install && run; } || status=$?
            fi
            ((status != 0)) || return 0
        else
            status=$?
        fi
        sleep "$poll" # a preemption shows in the state only after a while
        if ((status == 75)); then
            echo "$(date '+%F %T') $name: stopped by SIGTERM; it resumes"
        elif state=$(look) && [[ $state != ready ]]; then
            echo "$(date '+%F %T') $name: status $status, because it is $state"
        else
            ((SECONDS - started < 3600)) || failures=0
            failures=$((failures + 1))
            echo "$(date '+%F %T') $name: status $status, failure $failures of $retries"
            ((failures < retries)) || return "$status"
        fi
    done
}

case $subcommand in
create)
    check_type
    need gcloud
    check_committed ""
    arguments=(--accelerator-type "$type")
    [[ $spot == no ]] || arguments+=(--spot)
    if [[ $queued == no ]]; then
        execute "${tpu[@]}" create "$name" "${where[@]}" "${arguments[@]}" --version "$version"
        exit
    fi
    execute "${queue[@]}" create "$name" --node-id "$name" "${where[@]}" "${arguments[@]}" --runtime-version "$version"
    if [[ $dry_run == yes ]]; then
        remark "every 30 seconds, until it is READY:"
        show_look
    fi
    while [[ $dry_run == no ]]; do
        state=$(look)
        [[ $state != ready ]] || exit 0
        if [[ $state == gone ]]; then
            echo "the request has failed; launch/tpu_vm.sh delete --queued takes it back" >&2
            exit 1
        fi
        sleep 30
    done
    ;;
install)
    need gcloud git
    check_committed ""
    archive_tree
    execute "${tpu[@]}" scp "$archive" "$name:sgpo_jax.tar.gz" "${where[@]}" --worker all
    execute "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "set -e
[ ! -e sgpo_jax.run/lock ] || flock --nonblock sgpo_jax.run/lock true || {
  echo 'a run is active here; launch/tpu_vm.sh stop ends it' >&2
  exit 1
}
mkdir -p sgpo_jax
tar -xzf sgpo_jax.tar.gz -C sgpo_jax
exec sgpo_jax/launch/vm_setup.sh${share:+ $share}"
    ;;
put)
    [[ -n $from ]] || fail "--from is missing"
    check_path to "$to"
    need gcloud
    if in_bucket "$to"; then
        execute gcloud storage cp --recursive "$from" "$to"
        exit
    fi
    execute "${tpu[@]}" scp --recurse "$from" "$name:$to" "${where[@]}" --worker 0
    ;;
exec)
    check worker "$worker" '[0-9]{1,4}|all' "the number of a worker, or all"
    ((${#overrides[@]} > 0)) || fail "the command is missing: -- COMMAND [ARGUMENT ...]"
    need gcloud
    execute "${tpu[@]}" ssh "$name" "${where[@]}" --worker "$worker" --command "cd sgpo_jax || exit 69
export PATH=\"\$PWD/.venv/bin:\$PATH\"
$(quoted "${overrides[@]}")"
    ;;
run)
    check_run
    need gcloud
    # Preemption leaves a TPU 30 seconds.
    execute "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command "[ -x sgpo_jax/launch/vm_run.sh ] || exit 69
exec sgpo_jax/launch/vm_run.sh $(quoted "$workdir" "--config=$config" --config.grace=20 ${overrides[@]+"${overrides[@]}"})"
    ;;
keep)
    check_type
    check_run
    check retries "$retries" '[1-9][0-9]{0,2}' "a whole number from 1 on"
    check_seconds poll "$poll"
    need gcloud git
    check_committed "$config"
    keep
    ;;
stop)
    need gcloud
    # shellcheck disable=SC2016 # the remote shell expands it
    execute "${tpu[@]}" ssh "$name" "${where[@]}" --worker all --command 'kill -TERM "$(cat sgpo_jax.run/pid)"'
    ;;
collect)
    check_path workdir "$workdir"
    [[ -n $to ]] || fail "--to is missing"
    need gcloud tar
    if in_bucket "$workdir"; then
        collect_bucket "$workdir" "$to"
        exit
    fi
    execute "${tpu[@]}" ssh "$name" "${where[@]}" --worker 0 \
        --command "tar -czf sgpo_jax.results.tar.gz --exclude=checkpoints -C $workdir . || [ \$? -eq 1 ]" # 1: a file changed while tar read it
    execute mkdir -p "$to"
    execute "${tpu[@]}" scp "$name:sgpo_jax.results.tar.gz" "$to/results.tar.gz" "${where[@]}" --worker 0
    execute tar -xzf "$to/results.tar.gz" -C "$to"
    execute rm "$to/results.tar.gz"
    ;;
fetch)
    check_path from "$from"
    [[ -n $to ]] || fail "--to is missing"
    need gcloud
    execute mkdir -p "$to"
    if in_bucket "$from"; then
        execute gcloud storage cp --recursive "$from" "$to"
        exit
    fi
    execute "${tpu[@]}" scp --recurse "$name:$from" "$to" "${where[@]}" --worker 0
    ;;
delete)
    need gcloud
    if [[ $queued == yes ]]; then
        execute "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
    else
        execute "${tpu[@]}" delete "$name" "${where[@]}" --quiet
    fi
    ;;
esac
