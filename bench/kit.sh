#!/bin/sh
# Tests and measurements on a GPU, in under ten minutes, without network; made by `make gpu-kit`.
#
#   sh run.sh              everything: tests on the GPU, then bench/gpu.py
#   sh run.sh tests        one of the two ("tests" or "bench")
#   sh run.sh dry          the same on the CPU at toy size
#
# Tables and the tests' report go to $OUT, or to results/ beside this file. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")"
what=${1:-all}
python=${PYTHON:-python3}
out=${OUT:-$PWD/results}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$out"

if ls wheels/*.whl >/dev/null 2>&1; then
  # What is for another kind of machine stays out; such a machine must have it.
  case $(uname -m) in x86_64) chosen=$(ls wheels/*.whl) ;; *) chosen=$(ls wheels/*-none-any.whl) ;; esac
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" $chosen
fi
PYTHONPATH=$site:$PWD
HF_HUB_OFFLINE=1
export PYTHONPATH HF_HUB_OFFLINE
command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi || echo "no nvidia-smi here"

status=0
marked=gpu bench="--rounds 30"
if [ "$what" = dry ]; then
  marked="not gpu and not slow" bench="--device cpu --tiny --rounds 1"
fi
if [ "$what" != bench ]; then
  "$python" -m pytest tests/gpu -m "$marked" -p no:cacheprovider --junitxml "$out/gpu-tests.xml" -q || status=$?
fi
if [ "$what" != tests ]; then
  "$python" bench/gpu.py $bench --out "$out" || status=$?
fi
exit $status
