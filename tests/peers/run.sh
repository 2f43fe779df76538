#!/usr/bin/env bash
# Times whole networks, this project against PyTorch, alternating in one run; prints a table of medians in Markdown.
#
#   tests/peers/run.sh [--json FILE] [--rounds 7] [--threads 2] [--only ROW,...] [--batch 32] [--size 224] [--isa SET] [--formats]
#   tests/peers/run.sh --smoke          one small round, without PyTorch where it is not installed
#
# PEER_PYTHON names the interpreter that has torch, torchvision and timm (default: python3). Run it on a quiet machine.
set -euo pipefail

cd "$(dirname "$0")/../.."
cargo build --release --locked --quiet -p tests --example peer
exec python3 tests/peers/run.py "${CARGO_TARGET_DIR:-target}/release/examples/peer" "$@"
