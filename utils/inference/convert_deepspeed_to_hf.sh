#!/usr/bin/env bash
# Turn a DeepSpeed ZeRO checkpoint (stages 1 to 3; needs the package deepspeed) into a checkpoint.
# Settings by environment.
#
#   CHECKPOINT=runs/a/checkpoint_3 OUTPUT=pairs/a BASE=pairs/start utils/inference/convert_deepspeed_to_hf.sh [more flags]
#
# BASE is the checkpoint that the training started from. LAYOUT, DTYPE, CHUNK_SIZE, ENCODER_LORA_ALPHA and
# DECODER_LORA_ALPHA may be set, too: see `uv run python -m utils.inference.convert --help`.
set -euo pipefail

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

exec uv run python -m utils.inference.convert "$checkpoint" "$output" --format deepspeed "${arguments[@]}" "$@"
