#!/bin/bash
# Two nodes of eight GPUs. `sbatch configs/slurm.sh`; a job that ran out of time resumes from the last
# complete checkpoint when it is submitted again (automatically with --requeue).
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

# One launcher per node; torchrun starts one rank per GPU.
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node 8 \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$head:29500" \
    -m tuna train --config configs/multi_node.yaml --resume
