#!/usr/bin/env bash
# Runs a command, and passes SIGTERM on to it. The exit status says whether the command must run again.
#
#   launch/preemptible.sh [--status FILE] COMMAND [ARGUMENT ...]
#
# A run saves on SIGTERM and exits with 0, which a scheduler would take for the end of the job. In that case this script
# exits with 75 (EX_TEMPFAIL), and otherwise with the status of the command. It also writes its status to FILE.
set -uo pipefail

file=/dev/null
if [[ ${1-} == --status ]]; then
    file=$2
    shift 2
fi
child="" stopped=no again=yes
trap 'stopped=yes again=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM

# The command must not inherit the lock that the parent holds as file 9.
"$@" 9>&- &
child=$!
[[ $stopped == no ]] || kill -TERM "$child" 2>/dev/null
while [[ $again == yes ]]; do # a signal ends `wait`, but not the command
    again=no
    wait "$child"
    status=$?
done
if [[ $stopped == yes && ($status == 0 || $status == 143) ]]; then
    status=75
fi
echo "$status" >"$file"
exit "$status"
