# shellcheck shell=bash disable=SC2154
# The environment of every job on a site with conda: cp slurm/sites/conda.sh slurm/env.sh, then edit the lines marked
# 1 to 3. It is sourced on the compute node; $root is the repository.

# 1. Where conda is. Batch jobs do not read ~/.bashrc, where `conda init` defines the command. With a module instead:
#    module load miniforge
# shellcheck source=/dev/null
source "$HOME/miniforge3/etc/profile.d/conda.sh"

# 2. The environment's name, or its folder if the compute nodes have another $HOME.
conda activate embeddings

# 3. The cache that `submit.py --prefetch` fills: a folder that the compute nodes see, too.
export HF_HOME=/scratch/$USER/huggingface
export HF_HUB_OFFLINE=1

# One thread per core of the allocation, not per core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
