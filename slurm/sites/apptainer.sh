# shellcheck shell=bash disable=SC2154
# The environment of every job on a site with containers: cp slurm/sites/apptainer.sh slurm/env.sh, then edit the lines
# marked 1 to 3. It is sourced on the compute node; $root is the repository.

# 1. The image, which holds Python and its packages but not the pipeline (docs/installing.md).
# module load apptainer
export EMBEDDINGS_IMAGE=/project/abc/embeddings.sif

# 2. The folders that jobs read and write. $HOME and the current folder are in the container anyway.
export APPTAINER_BIND="$root,/scratch/$USER"

# Jobs call `python`: this one starts it in the container.
export PATH="$root/slurm/sites/in_container:$PATH"

# 3. The cache that `submit.py --prefetch` fills: in one of the folders of 2.
export HF_HOME=/scratch/$USER/huggingface
export HF_HUB_OFFLINE=1

# One thread per core of the allocation, not per core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
