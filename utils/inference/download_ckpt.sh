#!/usr/bin/env bash
# Download a checkpoint from the Hugging Face hub into a folder and check that it is whole. Needs a network.
#
#   REPO_ID=latent-context/0.6b-4b-LCLM-16x utils/inference/download_ckpt.sh
#   REPO_ID=org/name OUTPUT=checkpoints/name REVISION=main CHUNK_SIZE=8 utils/inference/download_ckpt.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

repo_id=${REPO_ID:?set REPO_ID to a hub id such as latent-context/0.6b-4b-LCLM-16x}
output=${OUTPUT:-checkpoints/${repo_id##*/}}

uv run hf download "$repo_id" --revision "${REVISION:-main}" --local-dir "$output"
uv run python -m utils.checkpoint.describe "$output" ${CHUNK_SIZE:+--chunk-size "$CHUNK_SIZE"}
