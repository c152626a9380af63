#!/usr/bin/env bash
# One node, all its GPUs:            launch/torchrun.sh vit-b-32 --set data.batch_size=4096
# On a CPU, two gloo processes:      PROCESSES=2 launch/torchrun.sh debug
# A run that was cut goes on where its newest checkpoint stands: start it again with the same arguments.
set -euo pipefail
processes="${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
[ "$processes" -gt 0 ] || { echo "no GPU found: set PROCESSES to run on the CPU" >&2; exit 2; }
exec torchrun --standalone --nproc-per-node="$processes" -m clip_train train "$@"
