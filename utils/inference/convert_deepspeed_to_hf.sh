#!/usr/bin/env bash
# Turn a DeepSpeed ZeRO checkpoint (stages 1 to 3; needs the package deepspeed) into a checkpoint; convert_state.sh lists the settings.
#
#   CHECKPOINT=runs/a/checkpoint_3 OUTPUT=pairs/a BASE=pairs/start utils/inference/convert_deepspeed_to_hf.sh [more flags]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_state.sh" deepspeed "$@"
