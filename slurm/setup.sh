# Shared set-up, sourced by every job of this folder and by those that `pixart-ds launch` submits.

# The run: a folder that all nodes see. Make it once: pixart-ds create "$RUN" --chain chain --set 'stage2.data.sets=[{path: …}]'
export RUN=${RUN:-$SLURM_SUBMIT_DIR/runs/first}

# Software. Modules of your site here (in a profile: `setup`), then the environment that `make setup` (or pip) made.
# module load cuda/12.6
venv=${VENV:-$SLURM_SUBMIT_DIR/.venv}
if [ -f "$venv/bin/activate" ]; then source "$venv/bin/activate"; else export PATH=$venv/bin:$PATH; fi # conda's have none

# Attempts run the run's own copy of the code, once there is one: editing the checkout then changes no job.
if [ -f "$RUN/code/current.json" ]; then
  frozen=$RUN/code/$(sed -n 's/.*"hash": *"\([0-9a-f]*\)".*/\1/p' "$RUN/code/current.json")
  export PYTHONSAFEPATH=1 PYTHONPATH=$frozen${PYTHONPATH:+:$PYTHONPATH}
fi

# A few threads for each rank: the loader's and torch's would otherwise take each other's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Where the ranks meet (MASTER_ADDR, MASTER_PORT) and how many share a node (LOCAL_WORLD_SIZE) is not set here: each task derives it
# from what Slurm says of its own step, so that it is right after a node was lost and for a second start of the ranks, whose port must
# be another one. Values that you export would win.

# NCCL: a rank whose peer is gone raises an error instead of waiting for ever, so that a lost node ends the launch.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Warnings tell which link or interface failed; INFO would write thousands of lines at each start.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Where nodes have several interfaces and NCCL picks a slow one (in a profile: `environment`):
# export NCCL_SOCKET_IFNAME=ib0
# Without InfiniBand: export NCCL_IB_DISABLE=1

# Compute nodes often have no way to a hub, and a job must not wait for one.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# From here on until the supervisor listens (a moment) the warning is ignored; it asks Slurm itself for time limit and preemption.
trap '' USR1
