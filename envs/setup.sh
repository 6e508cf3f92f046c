#!/usr/bin/env bash
# Install a locked environment into this folder's .venv, unless it is there already.
#
#   envs/setup.sh [cpu|gpu|peers]     default: gpu if an NVIDIA GPU is found, else cpu. An installed gpu environment,
#                                     which includes cpu's, is kept: nodes of a cluster may share this folder
set -uo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: setup: $*" >&2
    exit 1
}

name=${1:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
lock=envs/$name.lock
[ -f "$lock" ] || fail "no $lock: use cpu, gpu or peers"
venv=.venv
[ "$name" = peers ] && venv=.venv-peers
digest() { sha256sum "$1" | cut -d ' ' -f 1; }
wanted=$(digest "$lock")
ready=$(cat "$venv/.ready" 2>/dev/null)
[ "$ready" = "$wanted" ] && exit 0
[ $# = 0 ] && [ "$ready" = "$(digest envs/gpu.lock)" ] && exit 0

# Python 3.12: on PATH, from pyenv, or fetched by uv.
python=3.12
for candidate in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
    # The base interpreter's path, not that of an active virtual environment.
    found=$("$candidate" -c 'import sys; print(sys._base_executable if sys.version_info[:2] == (3, 12) else "")' 2>/dev/null)
    if [ -n "$found" ]; then
        python=$found
        break
    fi
done
starter=$([ "$python" = 3.12 ] && echo python3 || echo "$python")
command -v "$starter" >/dev/null || fail "no Python 3: install Python 3.12 and run again"

room=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
need=$([ "$name" = gpu ] && echo 20 || echo 9)
[ "$room" -ge "$need" ] || fail "needs about $need GiB of disk here and $room GiB are free"

log=setup.log
run() { # MESSAGE COMMAND...: run the command; fail with the message
    local message=$1
    shift
    "$@" >"$log" 2>&1 && return
    grep -qiE 'no space left|disk quota' "$log" && fail "the disk is full: make room and run again"
    grep -qiE 'name resolution|dns|connect|timed? ?out|unreachable|network' "$log" &&
        fail "$message: the package registry can't be reached (details: $log)"
    fail "$message (details: $log)"
}

echo "setting up $venv from $lock ..." >&2
if [ ! -x .venv-uv/bin/uv ]; then
    run "python3 can't make a virtual environment: install its venv package" "$starter" -m venv .venv-uv
    run "uv could not be installed" .venv-uv/bin/python -m pip install --quiet --require-hashes -r envs/uv.lock
fi
uv=.venv-uv/bin/uv
"$venv/bin/python" -c '' 2>/dev/null ||
    run "no Python 3.12 here and none could be fetched: install it and run again" "$uv" venv --quiet --clear --python "$python" "$venv"
rm -f "$venv/.ready"
run "the packages of $lock could not be installed" "$uv" pip sync --quiet --compile-bytecode --require-hashes --python "$venv/bin/python" "$lock"
rm -f "$log"
echo "$wanted" >"$venv/.ready"
