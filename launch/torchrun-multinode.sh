#!/usr/bin/env bash
# On every node, with the same arguments and a run folder that all of them see; HEAD is one of them:
#   HEAD=node0:29500 NODES=8 launch/torchrun-multinode.sh vit-b-32 --run-dir /shared/runs/b32
# NODES=4:8 goes on with as few as four when others are lost, and takes them back when they return. The global batch stays
# what it is, so it must be a multiple of the processes that are left. HEAD itself must stay.
set -euo pipefail
processes="${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
[ "$processes" -gt 0 ] || { echo "no GPU found: set PROCESSES to run on the CPU" >&2; exit 2; }
: "${HEAD:?HOST:PORT of the node that holds the rendezvous}" "${NODES:?how many nodes, or MIN:MAX}"
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_SECONDS:-120}"
exec torchrun --nnodes="$NODES" --nproc-per-node="$processes" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-clip-train}" \
  -m clip_train train "$@"
