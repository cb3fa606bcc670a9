#!/bin/bash
# Pretraining on SLURM, requeued until it is complete: sbatch deploy/slurm.sh [changes of settings]
#   sbatch --nodes=8 deploy/slurm.sh --config-name=experiment/production output=runs/large train.trainer.strategy=fsdp2
#SBATCH --job-name=gp2vec
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --time=24:00:00
# Two minutes before its time is over the run is told, saves and ends with 75; what is appended to is one log.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
settings=("${@:---config-name=experiment/production}")

srun --kill-on-bad-exit=1 python -m gp2vec.train.train "${settings[@]}" \
    train.trainer.num_nodes="${SLURM_NNODES:-1}" train.trainer.devices="${SLURM_NTASKS_PER_NODE:-1}"
status=$?

if [ "$status" -eq 75 ]; then
    echo "told to stop and saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
