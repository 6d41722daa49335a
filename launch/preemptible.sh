#!/usr/bin/env bash
# Runs a command, passes SIGTERM on to it, and tells by its own status whether there is more to do.
#
#   launch/preemptible.sh [--status FILE] COMMAND [ARGUMENT ...]
#
# A run answers SIGTERM by saving, and exits with 0; a scheduler would take that for the end of the job. This exits with
# 75 (EX_TEMPFAIL) then, and otherwise with the command's status, which FILE gets as well.
set -uo pipefail

file=/dev/null
if [[ ${1-} == --status ]]; then
    file=$2
    shift 2
fi
child="" stopped=no again=yes
trap 'stopped=yes again=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM

# The command must not keep a lock that its parent holds as file 9.
"$@" 9>&- &
child=$!
[[ $stopped == no ]] || kill -TERM "$child" 2>/dev/null
while [[ $again == yes ]]; do # the signal ends the waiting, not the command
    again=no
    wait "$child"
    status=$?
done
if [[ $stopped == yes && ($status == 0 || $status == 143) ]]; then
    status=75
fi
echo "$status" >"$file"
exit "$status"
