#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Run the suite with the oldest and the newest versions that setup.cfg allows, each in an environment of its own:
#
#     tests/version_matrix.sh [oldest|newest] [arguments of pytest...]
#
# PYTHON is the interpreter to make them with, TORCH the version of torch to hold both ends at (by default the end's
# own), MATRIX the folder of the environments.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
MATRIX=${MATRIX:-.matrix}

case ${1:-} in
    oldest | newest) ends=$1 && shift ;;
    *) ends="oldest newest" ;;
esac

failed=
for end in $ends; do
    venv=$MATRIX/$end
    "$PYTHON" -m venv "$venv"
    # The lower bounds are read from setup.cfg, `name >= version` as `name == version`; newest needs no bound.
    "$PYTHON" - "$end" "${TORCH:-}" > "$venv/constraints.txt" <<'PROGRAM'
import configparser
import sys

end, torch = sys.argv[1:]
config = configparser.ConfigParser()
config.read("setup.cfg")
lines = config["options"]["install_requires"].split("\n")
pins = {} if end == "newest" else dict(line.split(",")[0].split(" >= ") for line in lines if line)
if torch:
    pins["torch"] = torch
print("\n".join(f"{name}=={version}" for name, version in pins.items()))
PROGRAM
    "$venv/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager -c "$venv/constraints.txt" -e '.[test]'
    echo "== $end: $("$venv/bin/python" -m pip list --format freeze | grep -E \
        '^(accelerate|diffusers|huggingface_hub|numpy|peft|tokenizers|torch|transformers)==' | tr '\n' ' ')"
    "$venv/bin/python" -m pytest "$@" || failed="$failed $end"
done
test -z "$failed" || { echo "failed:$failed" >&2; exit 1; }
