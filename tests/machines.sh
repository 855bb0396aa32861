#!/usr/bin/env bash
# The fast suite as on other machines, one after another: bash tests/machines.sh PYTHON [PYTEST ARGUMENTS]
# Ends with a table; the status is that of the worst run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: machines.sh PYTHON [PYTEST ARGUMENTS]}
shift
arguments=("$@")
[ ${#arguments[@]} -gt 0 ] || arguments=(-n 2 --dist worksteal -m "not slow")

settings=(
  ""
  "ATEN_CPU_CAPABILITY=default"
  "ATEN_CPU_CAPABILITY=avx2"
  "ATEN_CPU_CAPABILITY=avx512"
  "MKL_CBWR=COMPATIBLE"
  "REGARD_NATIVE=0"
  "OMP_NUM_THREADS=1 REGARD_TEST_THREADS=1"
  "OMP_NUM_THREADS=2 REGARD_TEST_THREADS=2"
  "REGARD_LANES=4"
  "REGARD_LANES=8"
  "REGARD_LANES=16"
)
table=""
worst=0
for setting in "${settings[@]}"; do
  name=${setting:-as it is}
  if [[ $setting == *avx512* || $setting == *LANES=16* ]] && ! grep -q avx512f /proc/cpuinfo 2>/dev/null; then
    table+=$(printf '%-42s %s' "$name" "not run: this processor has no AVX-512")$'\n'
    continue
  fi
  echo "== $name"
  # shellcheck disable=SC2086  # a setting is several words
  last=$(env $setting "$python" -m pytest -p no:cacheprovider "${arguments[@]}" 2>&1 | tee /dev/stderr | tail -n 1)
  [[ $last == *passed* && $last != *failed* && $last != *error* ]] || worst=1
  table+=$(printf '%-42s %s' "$name" "$last")$'\n'
done
printf '\n%s' "$table"
exit $worst
