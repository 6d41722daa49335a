#!/usr/bin/env bash
# Runs sgpo_jax on one Cloud TPU VM.
#
#   launch/tpu_vm.sh create  --name NAME --zone ZONE --type TYPE [--spot]
#   launch/tpu_vm.sh install --name NAME --zone ZONE
#   launch/tpu_vm.sh run     --name NAME --zone ZONE --config configs/FILE.py --workdir DIR [-- --config.field=value ...]
#   launch/tpu_vm.sh fetch   --name NAME --zone ZONE --workdir DIR --to LOCAL_DIR
#   launch/tpu_vm.sh delete  --name NAME --zone ZONE
#
# Every subcommand also takes --project PROJECT (default: gcloud's own setting) and --dry-run, which
# prints the commands and runs none of them.
#
#   create   makes the VM. TYPE is a slice with one host: v6e-1, v6e-4, v6e-8, v5litepod-1,
#            v5litepod-4, v5litepod-8, v5p-8, v4-8, v3-8 or v2-8. --spot: cheaper, may be taken away.
#   install  copies the committed tree to ~/sgpo_jax on the VM and installs it with its `tpu` extra.
#   run      starts training and follows its output. Losing the connection or pressing Ctrl-C stops
#            only the following. The same command given again after the run was stopped resumes it.
#   fetch    copies DIR from the VM to LOCAL_DIR.
#   delete   deletes the VM with everything on it, without asking.
#
# gcloud must be installed and logged in; nothing secret is read or stored here.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "tpu_vm.sh: $1" >&2
    echo "launch/tpu_vm.sh --help tells how to use it" >&2
    exit 2
}

# Prints the arguments as one line for a shell, quoted where they must be.
quoted() {
    local line="" argument
    for argument in "$@"; do
        if [[ ! $argument =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then
            argument="'${argument//\'/\'\\\'\'}'"
        fi
        line+="${line:+ }$argument"
    done
    printf '%s\n' "$line"
}

execute() {
    if [[ $dry_run == yes ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# check FIELD VALUE PATTERN WHAT: the value must match the whole pattern.
check() {
    [[ -n $2 ]] || fail "--$1 is missing"
    [[ $2 =~ ^($3)$ ]] || fail "--$1 must be $4, not '$2'"
}

(($# > 0)) || fail "the subcommand is missing: create, install, run, fetch or delete"
subcommand=$1
shift
case $subcommand in
--help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
create) takes=" type spot " ;;
install | delete) takes=" " ;;
run) takes=" config workdir " ;;
fetch) takes=" workdir to " ;;
*) fail "unknown subcommand '$subcommand': it must be create, install, run, fetch or delete" ;;
esac

dry_run=no name="" zone="" project="" type="" spot=no config="" workdir="" to=""
overrides=()
while (($# > 0)); do
    option=${1#--}
    case $1 in
    --dry-run) dry_run=yes ;;
    --)
        [[ $subcommand == run ]] || fail "only run takes arguments after --"
        shift
        overrides=("$@")
        break
        ;;
    --name | --zone | --project | --type | --spot | --config | --workdir | --to)
        [[ " name zone project$takes" == *" $option "* ]] || fail "$subcommand takes no $1"
        if [[ $1 == --spot ]]; then
            spot=yes
        else
            (($# > 1)) || fail "$1 needs a value"
            printf -v "$option" '%s' "$2"
            shift
        fi
        ;;
    *) fail "unknown argument '$1'" ;;
    esac
    shift
done

check name "$name" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' \
    "lower-case letters, digits and hyphens, at most 63, the first a letter"
check zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-east5-a"
where=(--zone "$zone")
if [[ -n $project ]]; then
    check project "$project" '[a-z][a-z0-9-]{4,28}[a-z0-9]' "a project id"
    where+=(--project "$project")
fi
if [[ " run fetch " == *" $subcommand "* ]]; then
    # Relative to the home folder on the VM, unless absolute.
    check workdir "$workdir" '[A-Za-z0-9_./][A-Za-z0-9_./-]*' "a plain path on the VM"
fi
[[ $dry_run == yes ]] || command -v gcloud >/dev/null || fail "gcloud is not installed"

tpu=(gcloud compute tpus tpu-vm)
case $subcommand in
create)
    check type "$type" '(v6e|v5litepod)-[148]|(v5p|v4|v3|v2)-8' \
        "a slice with one host (v6e-8, v5litepod-8, v5p-8, v4-8, ...)"
    case $type in
    v6e-*) version="v2-alpha-tpuv6e" ;;
    v5p-*) version="v2-alpha-tpuv5" ;;
    v5litepod-*) version="v2-alpha-tpuv5-lite" ;;
    *) version="tpu-ubuntu2204-base" ;;
    esac
    arguments=("$name" "${where[@]}" --accelerator-type "$type" --version "$version")
    if [[ $spot == yes ]]; then
        arguments+=(--spot)
    fi
    execute "${tpu[@]}" create "${arguments[@]}"
    ;;
install)
    archive=$root/build/sgpo_jax.tar.gz
    execute mkdir -p "$root/build"
    execute git -C "$root" archive --output "$archive" HEAD
    execute "${tpu[@]}" scp "$archive" "$name:sgpo_jax.tar.gz" "${where[@]}"
    # The images come with Python 3.10; uv brings a newer one.
    execute "${tpu[@]}" ssh "$name" "${where[@]}" --command "set -e
mkdir -p sgpo_jax
tar -xzf sgpo_jax.tar.gz -C sgpo_jax
cd sgpo_jax
python3 -m pip install --quiet --user uv
[ -d .venv ] || python3 -m uv venv --python 3.12 .venv
python3 -m uv pip install --python .venv -e '.[tpu]'
.venv/bin/python -c 'import jax; print(jax.devices())'"
    ;;
run)
    check config "$config" 'configs/[A-Za-z0-9_]+\.py(:[A-Za-z0-9_,=.-]+)?' "configs/FILE.py"
    [[ -f $root/${config%%:*} ]] || fail "--config: there is no file ${config%%:*}"
    arguments=("--config=$config")
    for override in ${overrides[@]+"${overrides[@]}"}; do
        [[ $override == --config.?*=* ]] ||
            fail "after -- only --config.field=value may follow, not '$override'"
        arguments+=("$override")
    done
    # nohup keeps the run alive without the connection, and the lock keeps a second one out of its
    # folder; tail ends with the run, wait hands on its status.
    execute "${tpu[@]}" ssh "$name" "${where[@]}" --command "set -e
mkdir -p $workdir
workdir=\$(cd $workdir && pwd)
log=\$workdir/output.log
touch \"\$log\"
flock --nonblock \"\$workdir/run.lock\" true || {
  echo \"a run is already writing to \$workdir\" >&2
  exit 1
}
cd sgpo_jax
start=\$((\$(stat -c %s \"\$log\") + 1))
nohup flock --close \"\$workdir/run.lock\" .venv/bin/python -m sgpo_jax.main --workdir=\"\$workdir\" $(quoted "${arguments[@]}") >>\"\$log\" 2>&1 </dev/null &
tail --pid=\$! -c +\$start -f \"\$log\"
wait \$!"
    ;;
fetch)
    [[ -n $to ]] || fail "--to is missing"
    execute mkdir -p "$to"
    execute "${tpu[@]}" scp --recurse "$name:$workdir" "$to" "${where[@]}"
    ;;
delete)
    execute "${tpu[@]}" delete "$name" "${where[@]}" --quiet
    ;;
esac
