# The environment of every job: yours to edit. It is sourced in the repository's root, on the compute node.

# module load python/3.11 cuda/12.6
# conda activate embeddings
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

# Compute nodes often have no network: models come from the cache that the login node filled.
export HF_HUB_OFFLINE=1
export WANDB_MODE=offline

# One thread per core of the allocation, not per core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
