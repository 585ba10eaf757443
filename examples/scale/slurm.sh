#!/bin/bash
# One training on four machines under SLURM: sbatch slurm.sh
# Checked for syntax; not run: no such cluster was at hand.
#SBATCH --job-name=normlab
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@60
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# torchrun on each machine; --kill-on-bad-exit ends all of them when one ends badly.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${PROCESSES_PER_NODE:-2}" \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:29500" \
    -m normlab train "${RECIPE:-fast94}" --out "runs/slurm-$SLURM_JOB_ID"
