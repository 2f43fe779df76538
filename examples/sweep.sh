#!/usr/bin/env bash
# Students x teachers x widths of the head from one cache of views: every teacher is embedded once, every combination is a run,
# then all are probed and ranked in one report.
#
#   TEACHERS="WEIGHTS..." examples/sweep.sh SHARDS PROBE_SHARDS VAL_SHARDS OUTPUT [TRAINING OPTIONS...]
#
# TEACHERS    checkpoints or finished runs, separated by spaces
# STUDENTS    architectures [resnet18 resnet34]
# HEAD_HIDDEN hidden widths of the students' heads [512 2048]
# JOBS        runs side by side [1]
# THREADS     threads of each [the cores divided by JOBS]
# DRY_RUN=1   prints what every run would be and need, and stops
#
# Options after OUTPUT go to every `student-train distill`. Run it again to go on after an interruption, or with more students
# or teachers: what is finished is skipped. A run that fails does not stop the others; the script then ends with status 1.
#
# After the quickstart, in a few minutes:
#   TEACHERS=out/quickstart/teacher examples/sweep.sh out/quickstart/{shards,probe-shards,val-shards} out/sweep \
#     --epochs 10 --batch-size 16 --queue-size 128 --lr 0.06 --temperature 0.1
set -euo pipefail

if (($# < 4)) || [ -z "${TEACHERS:-}" ]; then
  sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
shards=$1 probe_shards=$2 val_shards=$3 output=$4
shift 4
jobs=${JOBS:-1}
cores=$(getconf _NPROCESSORS_ONLN)
threads=${THREADS:-$((cores / jobs > 0 ? cores / jobs : 1))}
command -v student-train >/dev/null || PATH="${CARGO_TARGET_DIR:-$(cd "$(dirname "$0")/.." && pwd)/target}/release:$PATH"
quiet=()
if ((jobs > 1)); then quiet=(--quiet); fi

# Each word of a list, one to a line; the lists are split at spaces.
words() { tr -s ' ' '\n' <<<"$1" | sed '/^$/d'; }
# A short name for a teacher: that of its file or directory.
name_of() { basename "${1%/}" | sed 's/\.[^.]*$//'; }

for teacher in $(words "$TEACHERS"); do
  embeddings=$output/embeddings/$(name_of "$teacher")
  if [ -n "${DRY_RUN:-}" ] && [ ! -e "$embeddings/manifest.json" ]; then
    echo "teacher-embed embed --shards $shards --weights $teacher --output $embeddings"
    continue
  fi
  teacher-embed embed --shards "$shards" --weights "$teacher" --output "$embeddings"
done

# One run, started by xargs; its arguments are student, embeddings, width of the head, output, and options.
# shellcheck disable=SC2329
train() {
  local student=$1 embeddings=$2 head_hidden=$3 run=$4
  shift 4
  if [ -n "${DRY_RUN:-}" ]; then
    [ -e "$embeddings/manifest.json" ] || return 0
    set -- "$@" --dry-run
  fi
  student-train distill --shards "$shards" --embeddings "$embeddings" --output "$run" \
    --student "$student" --head-hidden "$head_hidden" "$@"
}
export -f train
export shards
runs=() work=()
for student in $(words "${STUDENTS:-resnet18 resnet34}"); do
  for teacher in $(words "$TEACHERS"); do
    for head_hidden in $(words "${HEAD_HIDDEN:-512 2048}"); do
      name=$(name_of "$teacher")
      run=$output/runs/$student-$name-hidden$head_hidden
      runs+=("$run")
      work+=("$student" "$output/embeddings/$name" "$head_hidden" "$run")
    done
  done
done
failed=0
# shellcheck disable=SC2016 # the inner shell expands them
printf '%s\0' "${work[@]}" |
  xargs -0 -n 4 -P "$jobs" bash -c 'n=$(($# - 4)); train "${@:n+1}" "${@:1:n}" || exit 1' _ \
    --threads "$threads" ${quiet[@]+"${quiet[@]}"} "$@" || failed=1
if [ -n "${DRY_RUN:-}" ]; then exit "$failed"; fi

finished=()
for run in "${runs[@]}"; do
  if [ -e "$run/manifest.json" ]; then finished+=("$run"); else echo "not finished: $run" >&2; fi
done
if ((${#finished[@]} == 0)); then exit 1; fi
student-eval knn --train "$probe_shards" --val "$val_shards" "${finished[@]}"
student-eval linear --train "$probe_shards" --val "$val_shards" --normalize standardize --lr 0.01,0.1,1 "${finished[@]}"
student-eval report "${runs[@]}" --output "$output/report"
exit "$failed"
