#!/usr/bin/env bash
# Turn a DeepSpeed ZeRO checkpoint (stages 1 to 3; needs the package deepspeed) into a checkpoint.
# Settings by environment.
#
#   CHECKPOINT=runs/a/checkpoint_3 OUTPUT=pairs/a BASE=pairs/start utils/inference/convert_deepspeed_to_hf.sh [more flags]
#
# BASE is the checkpoint that the training started from. LAYOUT, DTYPE, CHUNK_SIZE, ENCODER_LORA_ALPHA and
# DECODER_LORA_ALPHA may be set, too: see `uv run python -m utils.checkpoint.convert --help`.
exec "$(dirname "${BASH_SOURCE[0]}")/convert_state.sh" deepspeed "$@"
