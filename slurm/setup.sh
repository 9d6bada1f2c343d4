# Sourced by every job of this folder. Edit this file for your site; the jobs themselves need their #SBATCH lines edited only.

# The run: a folder that all nodes see. Make it once: pixart-ds create "$RUN" --chain chain --set 'stage2.data.sets=[{path: …}]'
export RUN=${RUN:-$SLURM_SUBMIT_DIR/runs/first}

# Software. Modules of your site, then the environment that `make setup` (or pip) made.
# module load cuda/12.6
source "${VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"

# One thread for each rank: the loader's threads and torch's would otherwise take each other's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# NCCL ends a collective whose peer is gone instead of waiting for ever, so that a lost node ends the launch.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Set the interface if nodes have several and NCCL picks a slow one:
# export NCCL_SOCKET_IFNAME=ib0
# Without InfiniBand: export NCCL_IB_DISABLE=1

# Nothing is fetched from a hub inside a job.
export HF_HUB_OFFLINE=1
