#!/usr/bin/env bash
# One node, all its GPUs:            launch/torchrun.sh vit-b-32 --set data.batch_size=4096
# On a CPU, two gloo processes:      PROCESSES=2 launch/torchrun.sh debug
# A process that dies is started again with all others, RESTARTS times; the run goes on from its newest checkpoint.
# A run that was cut goes on there too: start it again with the same arguments.
set -euo pipefail
processes="${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
[ "$processes" -gt 0 ] || { echo "no GPU found: set PROCESSES to run on the CPU" >&2; exit 2; }
# SIGUSR1 is passed on like SIGTERM, and there is time to write a checkpoint before torchrun kills what is left.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_SECONDS:-120}"
exec torchrun --standalone --nproc-per-node="$processes" --max-restarts="${RESTARTS:-3}" -m clip_train train "$@"
