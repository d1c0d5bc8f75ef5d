#!/bin/sh
# Tests and measurements on a GPU, in under ten minutes, without network; made by `make gpu-kit`.
#
#   sh run.sh              everything: tests on the GPU, then bench/gpu.py
#   sh run.sh tests        one of the two ("tests" or "bench")
#   sh run.sh quick        in about 90 seconds what is most likely to fail, then a few rounds (QUICK_TESTS and
#                          QUICK_BENCH: seconds of each, 40 and 45)
#   sh run.sh dry          everything on the CPU at toy size
#   sh run.sh quick-dry    the quick part there
#
# Tables and the tests' report go to $OUT as they come, or to results/ beside this file. PYTHON names another interpreter.
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
tests=tests/gpu
marked=gpu bench="--rounds 30" shown="-q"
case $what in
  *dry) marked="not gpu and not slow" bench="--device cpu --tiny --rounds 1" ;;
esac
case $what in
  quick*)
    hosts=tests/gpu/test_gpu_hosts.py
    tests="$hosts::test_a_pipeline_draws_the_same_picture $hosts::test_compiled_blocks
      $hosts::test_forwards_leave_nothing_behind_and_release_gives_back"
    shown="-v --tb=short --show-capture=no --durations=0"
    if [ "$what" = quick ]; then bench="--rounds 6 --experts 16"; fi
    bench="$bench --seconds ${QUICK_BENCH:-45}"
    limit="timeout -s INT ${QUICK_TESTS:-40}"
    ;;
esac
# The exit status of pytest, not of tee, is what counts.
if [ "$what" != bench ]; then
  { ${limit:-} "$python" -u -m pytest $tests -m "$marked" -p no:cacheprovider --junitxml "$out/gpu-tests.xml" $shown 2>&1 ||
    echo $? >"$site/failed"; } | tee "$out/gpu-tests.txt"
  if [ -f "$site/failed" ]; then status=$(cat "$site/failed"); fi
fi
if [ "$what" != tests ]; then
  "$python" -u bench/gpu.py $bench --out "$out" || status=$?
fi
exit "$status"
