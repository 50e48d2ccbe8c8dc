#!/bin/bash
#SBATCH --job-name=kanlm-tokenize
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=%x-%A-%a.log
# Usage: sbatch [--array=1-N] scripts/slurm-tokenize.sh CONFIG.toml [section.key=value ...]
#
# Each task packs its share of the training tokens into data.cache_dir, which all of them have to see. The order of
# the tasks does not matter; the last one to end makes the cache whole. A task that was stopped goes on after its
# last whole shard (16 MB), so the same sbatch command may be given again.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch [--array=1-N] scripts/slurm-tokenize.sh CONFIG.toml [section.key=value ...]" >&2
    exit 2
fi
exec python -m kanlm tokenize "$@" --workers "$SLURM_CPUS_PER_TASK" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
