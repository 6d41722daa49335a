# shellcheck shell=bash
# Functions that the launch scripts share. The scripts source this file. It works with the bash 3.2 of macOS.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=no
overrides=()

fail() {
    echo "${0##*/}: $1" >&2
    echo "launch/${0##*/} --help tells how to use it" >&2
    exit 2
}

# Prints the comment at the top of a script.
usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
}

# Prints the arguments as one line for a shell, with quotes where they are needed.
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

# Prints a text without control characters as a JSON string, which is also valid YAML.
json_string() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# Runs a command, or prints it in a dry run.
execute() {
    if [[ $dry_run == yes ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# execute_with TEXT COMMAND ...: like execute, with the text as standard input.
execute_with() {
    local text=$1
    shift
    if [[ $dry_run == yes ]]; then
        printf "%s <<'EOF'\n%s\nEOF\n" "$(quoted "$@")" "$text"
    else
        "$@" <<<"$text"
    fi
}

# Prints, in a dry run only, the condition of the commands that follow.
remark() {
    [[ $dry_run == no ]] || echo "# $1"
}

# check OPTION VALUE PATTERN WHAT: the value must match the whole pattern.
check() {
    [[ -n $2 ]] || fail "--$1 is missing"
    [[ $2 =~ ^($3)$ ]] || fail "--$1 must be $4, not '$2'"
}

# parse SUBCOMMAND VALUES FLAGS ARGUMENTS ...: sets a variable for each option. An option in VALUES takes a value, one in
# FLAGS is "yes". The words after -- go into `overrides`.
parse() {
    # Two underscores keep these names apart from the variables of the options.
    local __subcommand=$1 __values=" $2 " __flags=" $3 dry-run " __option
    shift 3
    while (($# > 0)); do
        __option=${1#--}
        if [[ $1 == -- ]]; then
            shift
            overrides=("$@")
            return
        elif [[ $1 == --?* && $__flags == *" $__option "* ]]; then
            printf -v "${__option//-/_}" yes
        elif [[ $1 == --?* && $__values == *" $__option "* ]]; then
            (($# > 1)) || fail "$1 needs a value"
            printf -v "${__option//-/_}" '%s' "$2"
            shift
        else
            fail "$__subcommand takes no '$1'"
        fi
        shift
    done
}

# Fails where a tool that a subcommand needs is not installed. A dry run needs no tools.
need() {
    local tool
    for tool in "$@"; do
        [[ $dry_run == yes ]] || command -v "$tool" >/dev/null || fail "$tool is not installed"
    done
}

check_config() {
    check config "$1" 'configs/[A-Za-z0-9_]+\.py(:[A-Za-z0-9_,=.-]+)?' "configs/FILE.py or configs/FILE.py:METHOD"
    [[ -f $root/${1%%:*} ]] || fail "--config: there is no file ${1%%:*}"
}

check_overrides() {
    local override
    for override in ${overrides[@]+"${overrides[@]}"}; do
        [[ $override != *[[:cntrl:]]* ]] || fail "what follows -- must be without line breaks and control characters"
        [[ $override == --config.?*=* ]] || fail "after -- only --config.field=value may follow, not '$override'"
    done
}

no_overrides() {
    ((${#overrides[@]} == 0)) || fail "$1 takes nothing after --"
}

# The value must be a whole number of seconds.
check_seconds() {
    check "$1" "$2" '[0-9]{1,5}' "a whole number of seconds"
}

check_share() {
    check share "$1" '[A-Za-z0-9.-]+:/[A-Za-z0-9_./-]*' "an NFS share such as 10.0.0.2:/shared"
}

# Whether a place is in a bucket.
in_bucket() {
    [[ $1 == gs://* ]]
}

check_bucket() {
    check "$1" "$2" 'gs://[a-z0-9][a-z0-9_.-]+(/[A-Za-z0-9_.-]+)*' "a place in a bucket, such as gs://my-bucket/qwen7b"
}

# Copies a run from a bucket to a local folder, without its checkpoints.
collect_bucket() {
    execute mkdir -p "$2"
    execute gcloud storage rsync --recursive --exclude '(.*/)?checkpoints/.*' "$1" "$2"
}

# check_committed CONFIG: says what does not reach the machines, which get the committed tree, before they are paid for.
check_committed() {
    local changes
    if [[ $dry_run == yes ]] || ! command -v git >/dev/null; then
        return
    fi
    if [[ -n $1 ]] && ! git -C "$root" cat-file -e "HEAD:${1%%:*}" 2>/dev/null; then
        fail "--config: ${1%%:*} is not committed, and the machines get the committed tree only"
    fi
    changes=$(git -C "$root" status --porcelain --untracked-files=no 2>/dev/null) || return 0
    if [[ -n $changes ]]; then
        echo "${0##*/}: these changes are not committed, and do not reach the machines:" >&2
        echo "$changes" >&2
    fi
}

# Makes an archive of the committed tree, without uncommitted changes.
archive_tree() {
    archive=$root/build/sgpo_jax.tar.gz
    execute mkdir -p "$root/build"
    execute git -C "$root" archive --output "$archive" HEAD
}
