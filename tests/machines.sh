#!/usr/bin/env bash
# The fast suite as on other machines, one after another: bash tests/machines.sh PYTHON [PYTEST ARGUMENTS]
# Ends with a table; the status is that of the worst run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: machines.sh PYTHON [PYTEST ARGUMENTS]}
shift
arguments=("$@")
[ ${#arguments[@]} -gt 0 ] || arguments=(-n 2 --dist worksteal -m "not slow")

# what does not touch the same code is set together: vectors of torch, of MKL and of the compiled kernels, and threads
settings=(
  ""
  "ATEN_CPU_CAPABILITY=default REGARD_LANES=4 OMP_NUM_THREADS=1 REGARD_TEST_THREADS=1"
  "ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE REGARD_LANES=8 OMP_NUM_THREADS=2 REGARD_TEST_THREADS=2"
  "ATEN_CPU_CAPABILITY=avx512 REGARD_LANES=16"
  "REGARD_NATIVE=0"
)
table=""
worst=0
for setting in "${settings[@]}"; do
  name=${setting:-as it is}
  if [[ $setting == *avx512* || $setting == *LANES=16* ]] && ! grep -q avx512f /proc/cpuinfo 2>/dev/null; then
    table+=$(printf '%-100s %s' "$name" "not run: this processor has no AVX-512")$'\n'
    continue
  fi
  echo "== $name"
  compiled=$(mktemp -d)  # what torch compiles for one width of vectors does not serve another
  # shellcheck disable=SC2086  # a setting is several words
  last=$(env $setting TORCHINDUCTOR_CACHE_DIR="$compiled" "$python" -m pytest -p no:cacheprovider "${arguments[@]}" 2>&1 | tee /dev/stderr | tail -n 1)
  rm -rf "$compiled"
  [[ $last == *passed* && $last != *failed* && $last != *error* ]] || worst=1
  table+=$(printf '%-100s %s' "$name" "$last")$'\n'
done
printf '\n%s' "$table"
exit $worst
