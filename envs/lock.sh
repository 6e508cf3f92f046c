#!/usr/bin/env bash
# Turns envs/*.in into envs/*.lock: exact versions with hashes. The GPU environment is solved first and binds the
# others, so that tests run what production runs.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-../.venv/bin/uv}
compile() { "$uv" pip compile --quiet --no-header --generate-hashes --python-version 3.12 "$@"; }
compile gpu.in -o gpu.lock
for name in cpu peers uv; do
    compile "$name.in" --constraint gpu.lock -o "$name.lock"
done
