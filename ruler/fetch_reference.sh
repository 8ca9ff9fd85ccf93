#!/usr/bin/env bash
# Clones the reference program, NVIDIA/RULER (Apache-2.0), at the commit that this project is measured against.
# usage: fetch_reference.sh [FOLDER]      (default: reference)
set -euo pipefail

url="https://github.com/NVIDIA/RULER.git"
commit="c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a"
folder="${1:-reference}"

if [ -e "$folder" ]; then
    echo "error: $folder exists already: name another folder" >&2
    exit 1
fi
git clone --quiet --filter=blob:none --no-checkout "$url" "$folder"
git -C "$folder" checkout --quiet --detach "$commit"
echo "$folder is NVIDIA/RULER at $commit"
