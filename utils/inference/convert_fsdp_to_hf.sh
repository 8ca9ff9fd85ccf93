#!/usr/bin/env bash
# Turn an FSDP checkpoint (torch.distributed.checkpoint, as accelerate saves it) into a checkpoint; convert_state.sh lists the settings.
#
#   CHECKPOINT=runs/a/checkpoint_3 OUTPUT=pairs/a BASE=pairs/start utils/inference/convert_fsdp_to_hf.sh [more flags]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_state.sh" fsdp "$@"
