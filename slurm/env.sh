# shellcheck shell=bash disable=SC2154
# The environment of every job: yours to edit. It is sourced on the compute node; $root is the repository.

# module load python/3.11 cuda/12.6
# conda activate embeddings
# umask 002 # where several people share the project's folder: see docs/slurm.md
if [ -f "$root/.venv/bin/activate" ]; then
    # shellcheck source=/dev/null
    source "$root/.venv/bin/activate"
fi

# Compute nodes often have no network: models come from the cache that `submit.py --prefetch` fills. It lies below
# $HOME; if compute nodes have another $HOME, or a small one, name a folder that all nodes see:
# export HF_HOME=/scratch/$USER/huggingface
export HF_HUB_OFFLINE=1

# One thread per core of the allocation, not per core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
