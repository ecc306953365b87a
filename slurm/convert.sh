#!/usr/bin/env bash
# Converts a Hugging Face folder to a checkpoint, or back, on one node without a GPU:
#
#   sbatch slurm/convert.sh import HF_DIR --to CKPT
#   sbatch slurm/convert.sh export CKPT --to HF_DIR
#
# Cut short by its time limit, it is queued again and goes on with the files that it has. Settings: slurm/common.sh.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

. slurm/common.sh || { echo "megamed: error: call sbatch in megamed's folder, not in $PWD" >&2; exit 2; }
MEGAMED_GPUS_PER_NODE=1 megamed_begin
trap 'echo "megamed: the time is nearly over; queued again, to go on"; scontrol requeue "$SLURM_JOB_ID"' USR1
"${run[@]}" "$python" tools/convert.py "$@" &
wait $!
