#!/usr/bin/env bash
# Compile envs/*.in to envs/*.lock: exact versions with hashes. The GPU environment is solved first and constrains the
# others, so that tests run the versions that production runs.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-../.venv/bin/uv}
compile() { "$uv" pip compile --quiet --no-header --generate-hashes --python-version 3.12 "$@"; }
compile gpu.in -o gpu.lock
for name in cpu peers uv; do
    compile "$name.in" --constraint gpu.lock -o "$name.lock"
done
