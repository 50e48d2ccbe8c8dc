#!/bin/bash
#SBATCH --job-name=kanlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Usage: sbatch scripts/slurm-2x8.sh CONFIG.toml [section.key=value ...]
#
# SLURM sends SIGTERM five minutes before the time limit: the run finishes its step and writes a checkpoint, and the
# same sbatch command goes on from there. (torchrun ends with a status other than 0 after any signal.) Launching the same file with `--nodes=N` changes the
# number of machines. For FSDP2 set ACCELERATE_CONFIG=configs/accelerate/8-gpus-fsdp2.yaml.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch scripts/slurm-2x8.sh CONFIG.toml [section.key=value ...]" >&2
    exit 2
fi
: "${ACCELERATE_CONFIG:=configs/accelerate/2x8-gpus.yaml}"
GPUS_PER_NODE=8
FIRST_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270  # seconds that torchrun gives its processes after SIGTERM; 30 otherwise
export FIRST_HOST ACCELERATE_CONFIG GPUS_PER_NODE

# One task a node; SLURM_PROCID is the node's rank. `exec` lets the signal reach the launcher, which passes it on.
exec srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$ACCELERATE_CONFIG" \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
        --machine_rank "$SLURM_PROCID" --main_process_ip "$FIRST_HOST" --main_process_port 29500 \
        --rdzv_backend c10d -m kanlm train "$@"' kanlm "$@"
