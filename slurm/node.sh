#!/usr/bin/env bash
# Runs a torchrun on one node, and passes Slurm's signal on to its ranks: they are in sessions of their own, where Slurm
# may not find them, and torchrun itself would end of it.
#
#   srun ... bash slurm/node.sh python -m torch.distributed.run ...
set -u

(trap "" USR1 && exec "$@") &
torchrun=$!
trap 'kill -USR1 $(cat /proc/$torchrun/task/*/children) 2>/dev/null' USR1
trap 'kill -TERM "$torchrun" 2>/dev/null' TERM INT
while :; do
    wait "$torchrun" # which a signal ends, too
    kill -0 "$torchrun" 2>/dev/null || break
done
wait "$torchrun"
