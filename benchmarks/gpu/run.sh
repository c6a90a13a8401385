#!/usr/bin/env bash
# Tests and measurements on a machine with a GPU, in about ten minutes. Each part has a time limit and a log.
#
#   bash benchmarks/gpu/run.sh OUT                  all parts; a part that has succeeded in OUT is not repeated
#   bash benchmarks/gpu/run.sh OUT loss sampling    only these parts
#   TRIAL=1 bash benchmarks/gpu/run.sh OUT          tiny sizes on a CPU
#
# OUT gets PART.log, PART.status, the parts' JSON files and summary.json. PYTHON: the interpreter.
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,8p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- tests loss learning sampling smoke geo3k
python=${PYTHON:-python}
tiny=${TRIAL:+--tiny}
export BENCHMARK_RESULTS=$out
[ -z "${TRIAL:-}" ] || export TRITON_INTERPRET=1

# PART SECONDS COMMAND: run the command within a time limit, and record its exit code and duration.
part() {
    local name=$1 limit=$2 started=$SECONDS code
    shift 2
    if grep -qs '^0 ' "$out/$name.status"; then return; fi
    echo "$name ..."
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "$code $((SECONDS - started))" >"$out/$name.status"
    tail -n 3 "$out/$name.log"
}

cd "$root" || exit 1
for name in "$@"; do
    case $name in
        tests) part tests 120 "$python" -m pytest -q -m gpu tests/unit ;;
        loss) part loss 150 "$python" benchmarks/gpu/loss.py "$out/loss.json" accuracy table ;;
        learning) part learning 120 "$python" benchmarks/gpu_step.py --repeats 2 --models 0.5B $tiny ;;
        sampling) part sampling 90 "$python" benchmarks/gpu/sampling.py "$out/sampling.json" ;;
        smoke) SMOKE_DIR=$out/smoke.$(date +%s) part smoke 300 bash recipe/SDPO/prove.sh text images ;;
        geo3k) part geo3k 270 "$python" benchmarks/gpu/geo3k.py "$out/geo3k.$(date +%s)" $tiny ;;
        *)
            echo "$name: no such part; choose from tests, loss, learning, sampling, smoke, geo3k" >&2
            exit 2
            ;;
    esac
done

"$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out, rows = Path(sys.argv[1]), {}
for status in sorted(out.glob("*.status"), key=lambda path: path.stat().st_mtime):
    code, seconds = map(int, status.read_text().split())
    last = (out / f"{status.stem}.log").read_text(errors="replace").strip().splitlines()[-1:]
    result = {0: "ok", 124: "time limit", 137: "time limit"}.get(code, f"exit code {code}")
    rows[status.stem] = {"result": result, "seconds": seconds, "last_line": last[0] if last else ""}
(out / "summary.json").write_text(json.dumps(rows, indent=2))
for name, row in rows.items():
    print(f"{name:10} {row['result']:14} {row['seconds']:4} s  {row['last_line'][:90]}")
sys.exit(any(row["result"] != "ok" for row in rows.values()))
PYTHON
