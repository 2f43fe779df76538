#!/usr/bin/env bash
# The whole pipeline on 192 photos: pack, pretrain a small teacher, embed, train a student alone and one distilled, probe, report.
#
#   examples/quickstart.sh [OUTPUT]        default OUTPUT: out/quickstart
#
# It shows the machinery, not the accuracy of the paper: 145 photos to learn from and 47 to test on are far too few, and
# accuracies move in steps of two points. Run it again after an interruption: finished stages are skipped, the one that was
# interrupted goes on. QUICKSTART_EPOCHS=N trains every network for N epochs (a quick look: 2).
set -euo pipefail

photos=$(cd "$(dirname "$0")" && pwd)/photos
cd "$(dirname "$0")/.."
out=${1:-out/quickstart}
teacher_epochs=${QUICKSTART_EPOCHS:-50}
student_epochs=${QUICKSTART_EPOCHS:-40}
say() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

say "Building"
cargo build --release --locked
PATH="${CARGO_TARGET_DIR:-$PWD/target}/release:$PATH"

say "Splitting the photos: every fourth of a class is for testing"
mkdir -p "$out/photos"
for class in "$photos"/*/; do
  name=$(basename "$class")
  mkdir -p "$out/photos/train/$name" "$out/photos/val/$name"
  number=0
  for photo in "$class"*.jpg; do
    number=$((number + 1))
    if ((number % 4 == 0)); then part=val; else part=train; fi
    [ -e "$out/photos/$part/$name/${photo##*/}" ] || cp "$photo" "$out/photos/$part/$name/"
  done
done

say "1. data-prep: photos to shards of augmented views"
# Training views for the contrastive stages, plain crops for the probes, centre crops for testing.
data-prep pack --input "$out/photos/train" --output "$out/shards" --recipe moco-v2 --views 16 --size 64
data-prep pack --input "$out/photos/train" --output "$out/probe-shards" --recipe linear-train --views 8 --size 64
data-prep pack --input "$out/photos/val" --output "$out/val-shards" --recipe eval-center --size 64
data-prep inspect "$out/shards" --grid "$out/views.png"

say "2. student-train pretrain: a small teacher, without labels"
# The defaults are for ImageNet. So few photos want small batches, a queue shorter than the set and a sharper softmax.
small="--batch-size 16 --queue-size 128 --lr 0.06 --temperature 0.1 --embedding-dim 64"
student-train pretrain --shards "$out/shards" --student resnet34 --output "$out/teacher" \
  --epochs "$teacher_epochs" $small

say "3. teacher-embed: the teacher's embeddings of every view, once for all students"
teacher-embed embed --shards "$out/shards" --weights "$out/teacher" --output "$out/embeddings"

say "4. student-train: one student alone, one distilled"
student-train pretrain --shards "$out/shards" --student resnet18 --output "$out/runs/alone" \
  --epochs "$student_epochs" $small
student-train distill --shards "$out/shards" --embeddings "$out/embeddings" --student resnet18 \
  --output "$out/runs/distilled" --epochs "$student_epochs" $small
student-train export "$out/runs/distilled" --format safetensors --output "$out/distilled-resnet18.safetensors" --overwrite

say "5. student-eval: probes on frozen features, and a report"
runs=("$out/teacher" "$out/runs/alone" "$out/runs/distilled")
student-eval knn --train "$out/probe-shards" --val "$out/val-shards" "${runs[@]}"
student-eval linear --train "$out/probe-shards" --val "$out/val-shards" --normalize standardize --lr 0.01,0.1,1 "${runs[@]}"
student-eval report "${runs[@]}" --output "$out/report"

say "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s, building included"
cat >&2 <<END
  contact sheet of the views   $out/views.png
  report with plots            $out/report/report.md
  distilled ResNet-18          $out/distilled-resnet18.safetensors (timm names)
145 photos show the machinery, not the accuracy of the paper.
END
