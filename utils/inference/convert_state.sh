#!/usr/bin/env bash
# What the three convert_*_to_hf.sh share: the conversion command with settings by environment; $1 is the format.
# CHECKPOINT, OUTPUT and BASE (the checkpoint that the training started from) are needed; LAYOUT, DTYPE, CHUNK_SIZE,
# ENCODER_LORA_ALPHA and DECODER_LORA_ALPHA may be set: see `uv run python -m utils.checkpoint.convert --help`.
set -euo pipefail

format=${1:?run one of the convert_*_to_hf.sh beside this file}
shift
checkpoint=${CHECKPOINT:?set CHECKPOINT to a checkpoint folder or weight file of the trainer}
output=${OUTPUT:?set OUTPUT to the folder of the new checkpoint}
base=${BASE:?set BASE to the checkpoint that the training started from}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

arguments=(--base "$base")
add() { if [[ -n $2 ]]; then arguments+=("$1" "$2"); fi; }
add --layout "${LAYOUT:-}"
add --dtype "${DTYPE:-}"
add --chunk-size "${CHUNK_SIZE:-}"
add --encoder-lora-alpha "${ENCODER_LORA_ALPHA:-}"
add --decoder-lora-alpha "${DECODER_LORA_ALPHA:-}"

exec uv run python -m utils.checkpoint.convert "$checkpoint" "$output" --format "$format" "${arguments[@]}" "$@"
