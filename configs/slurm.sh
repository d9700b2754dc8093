#!/bin/bash
# Two nodes of eight GPUs. `sbatch configs/slurm.sh`; a job that ran out of time goes on where it was when it is
# submitted again (or by itself: --requeue), from the last complete checkpoint.
#SBATCH --job-name=tuna
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=tuna-%j.log
set -euo pipefail

source .venv/bin/activate
export OMP_NUM_THREADS=8
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One launcher a node; torchrun starts a rank a GPU.
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node 8 \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$head:29500" \
    -m tuna train --config configs/multi_node.yaml --resume
