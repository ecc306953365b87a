#!/usr/bin/env bash
# One training job for each combination of values, as a job array. Values are separated by commas:
#
#   sbatch --array=0-5 --nodes=1 slurm/sweep.sh +exp=fmri optim.lr=1e-3,3e-4,1e-4 train.seed=1,2
#   python tools/sweep.py +exp=fmri optim.lr=1e-3,3e-4,1e-4 train.seed=1,2        # which number is which
#
# Each is a run of its own, RUN_NAME-NUMBER; all else is as in the other training scripts.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -uo pipefail

. slurm/common.sh || { echo "megamed: error: call sbatch in megamed's folder, not in $PWD" >&2; exit 2; }
megamed_begin
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || megamed_fail "this is a job array; say how many: sbatch --array=0-N slurm/sweep.sh"
chosen="$("$python" tools/sweep.py --index "$SLURM_ARRAY_TASK_ID" "$@")" || exit 2
mapfile -t settings <<<"$chosen"
megamed_train "${settings[@]}"
