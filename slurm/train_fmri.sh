#!/usr/bin/env bash
# Trains on a 4D fMRI run (+exp=fmri). On as many nodes as are asked for; what comes behind the script overrides its
# settings:
#
#   sbatch slurm/train_fmri.sh data.path=RUN.nii.gz
#   sbatch --nodes=4 --account=ME --partition=gpu slurm/train_fmri.sh model=internvl3_8b data.path=RUN.nii.gz
#
# Five minutes ahead of the time limit, or when `scancel --signal=USR1 JOB` says so, it saves, and is queued again.
# Settings of the environment: slurm/common.sh. What happens when: docs/slurm.md.
#SBATCH --job-name=fmri
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

. slurm/common.sh || { echo "megamed: error: call sbatch in megamed's folder, not in $PWD" >&2; exit 2; }
megamed_begin
megamed_train +exp=fmri "$@"
