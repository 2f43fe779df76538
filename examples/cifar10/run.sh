#!/usr/bin/env bash
# CIFAR-10: students distilled from a teacher that was trained here, and the same students alone. README has the results.
#
#   examples/cifar10/run.sh CIFAR OUT     # CIFAR: the folder of cifar-10-batches-bin, the binary version; OUT: everything else
#
# About an hour on 2 quiet cores. Every stage resumes; what is finished is not repeated. Settings by environment:
#   SEEDS="0 1 2"  TEACHER=resnet18  TEACHER_EPOCHS=20  STUDENT=mobilenetv3_large_100  STUDENT_EPOCHS=3
#   VIEWS="2 32"   further numbers of stored views, distilled with the first seed; 8 is what all others have
#   HEADS="512"    further hidden widths of the projection head, distilled with the first seed
set -euo pipefail
if (($# != 2)) || [ ! -d "$1" ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
cifar=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/../.."
cargo build --release --locked
export PATH="${CARGO_TARGET_DIR:-$PWD/target}/release:$PATH"
recipes=examples/cifar10
seeds=${SEEDS:-0 1 2}
student=${STUDENT:-mobilenetv3_large_100}
# The queue and the key encoder of ImageNet's 256,000 steps are too slow for a few thousand.
contrast="--batch-size 128 --queue-size 2048 --key-momentum 0.99"

pack() { data-prep pack --input "$cifar" --output "$out/$1" --split "$2" --recipe "$3" --views "$4" --size 32; }
pack views-8 train $recipes/views.toml 8
pack whole-train train $recipes/whole.toml 1
pack whole-val val $recipes/whole.toml 1

student-train pretrain --shards "$out/views-8" --student "${TEACHER:-resnet18}" --output "$out/teacher" \
  --epochs "${TEACHER_EPOCHS:-20}" $contrast
teacher-embed embed --shards "$out/views-8" --weights "$out/teacher" --output "$out/embeddings-8"

# distill NAME VIEWS SEED MORE...
distill() {
  student-train distill --shards "$out/views-$2" --embeddings "$out/embeddings-$2" --output "$out/runs/$1" --seed "$3" \
    --student "$student" --epochs "${STUDENT_EPOCHS:-3}" $contrast "${@:4}"
}
# alone NAME SEED MORE...
alone() {
  student-train pretrain --shards "$out/views-8" --output "$out/runs/$1" --seed "$2" --student "$student" \
    --epochs "${STUDENT_EPOCHS:-3}" $contrast "${@:3}"
}

for seed in $seeds; do
  distill "distilled-$seed" 8 "$seed"
  alone "alone-$seed" "$seed"
done
first=${seeds%% *}
for views in ${VIEWS-2 32}; do
  pack "views-$views" train $recipes/views.toml "$views"
  teacher-embed embed --shards "$out/views-$views" --weights "$out/teacher" --output "$out/embeddings-$views"
  distill "distilled-views$views-$first" "$views" "$first"
done
for head in ${HEADS-512}; do
  distill "distilled-head$head-$first" 8 "$first" --head-hidden "$head"
done
# What a random backbone is worth: it sees an epoch, for its batch-norm statistics, and learns nothing.
STUDENT_EPOCHS=1 alone "random-$first" "$first" --lr 1e-12

runs=("$out/teacher" "$out"/runs/*)
student-eval knn --train "$out/whole-train" --val "$out/whole-val" "${runs[@]}"
student-eval linear --train "$out/whole-train" --val "$out/whole-val" --normalize standardize --lr 0.01,0.1,1 --epochs 30 "${runs[@]}"
student-eval report "${runs[@]}" --output "$out/report"
