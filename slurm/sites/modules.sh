# shellcheck shell=bash disable=SC2154
# The environment of every job on a site with modules: cp slurm/sites/modules.sh slurm/env.sh, then edit the lines
# marked 1 and 2. It is sourced on the compute node; $root is the repository.

# 1. The modules that were loaded when .venv was made, in the same order. Some bring Python packages (arrow brings
#    pyarrow, others torch), which .venv lacks without them.
# shellcheck source=/dev/null
type module &> /dev/null || source /etc/profile.d/modules.sh # where batch jobs do not know `module`: often lmod.sh
module load python/3.11 gcc arrow/19.0.1

# shellcheck source=/dev/null
source "$root/.venv/bin/activate"

# 2. The cache that `submit.py --prefetch` fills: a folder that the compute nodes see, too.
export HF_HOME=/project/abc/$USER/huggingface
export HF_HUB_OFFLINE=1

# One thread per core of the allocation, not per core of the node.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}"
