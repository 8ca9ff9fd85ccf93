#!/usr/bin/env bash
# Answer the examples of a test file from a checkpoint. Settings by environment; what is unset keeps the default.
#
#   CHECKPOINT=checkpoints/my-pair TEST_DATA=examples.json utils/inference/run_inference.sh [more flags]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

arguments=()
add() { if [[ -n $2 ]]; then arguments+=("$1" "$2"); fi; }
add --checkpoint "${CHECKPOINT:-}"
add --test-data "${TEST_DATA:-}"
add --num-examples "${NUM_EXAMPLES:-}"
add --device "${DEVICE:-}"
add --max-tokens "${MAX_TOKENS:-}"
add --temperature "${TEMPERATURE:-}"
add --seed "${SEED:-}"
add --chunk-size "${CHUNK_SIZE:-}"
add --max-code-length "${MAX_CODE_LENGTH:-}"
add --attn-implementation "${ATTN_IMPLEMENTATION:-}"

exec uv run python -m utils.inference.inference "${arguments[@]}" "$@"
