#!/usr/bin/env bash
# Many students from one cache: every combination of architecture, head width and distillation weight, then one report.
#
#   examples/sweep.sh SHARDS EMBEDDINGS PROBE_SHARDS VAL_SHARDS OUTPUT [TRAINING OPTIONS...]
#
# The teacher was embedded once; no run computes it again. Options after OUTPUT go to every `student-train distill`, for example
# --epochs 100 --threads 8. Run it again to go on after an interruption: finished runs are skipped.
#
# After the quickstart, in a few minutes:
#   examples/sweep.sh out/quickstart/{shards,embeddings,probe-shards,val-shards} out/sweep \
#     --epochs 10 --batch-size 16 --queue-size 128 --lr 0.06 --temperature 0.1
set -euo pipefail

if (($# < 5)); then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
shards=$1 embeddings=$2 probe_shards=$3 val_shards=$4 output=$5
shift 5
command -v student-train >/dev/null || PATH="${CARGO_TARGET_DIR:-$(cd "$(dirname "$0")/.." && pwd)/target}/release:$PATH"

runs=()
for student in ${STUDENTS:-resnet18 resnet34}; do
  for head_hidden in ${HEAD_HIDDEN:-512 2048}; do
    for distill_weight in ${DISTILL_WEIGHTS:-32}; do
      run="$output/$student-hidden$head_hidden-weight$distill_weight"
      student-train distill --shards "$shards" --embeddings "$embeddings" --output "$run" \
        --student "$student" --head-hidden "$head_hidden" --distill-weight "$distill_weight" "$@"
      runs+=("$run")
    done
  done
done
student-eval knn --train "$probe_shards" --val "$val_shards" "${runs[@]}"
student-eval linear --train "$probe_shards" --val "$val_shards" --normalize standardize --lr 0.01,0.1,1 "${runs[@]}"
student-eval report "${runs[@]}" --output "$output/report"
