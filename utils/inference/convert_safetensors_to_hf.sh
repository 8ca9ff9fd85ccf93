#!/usr/bin/env bash
# Turn a trainer's safetensors, one file or shards, into a checkpoint; convert_state.sh lists the settings.
#
#   CHECKPOINT=runs/a/model.safetensors OUTPUT=pairs/a BASE=pairs/start utils/inference/convert_safetensors_to_hf.sh [more flags]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_state.sh" safetensors "$@"
