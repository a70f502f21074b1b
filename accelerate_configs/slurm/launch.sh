# Sourced by the batch scripts in this folder. `launch <options of train_lora.py>` trains on all nodes of the job, and
# decides whether the job is requeued after a failure. See docs/cluster.md. Environment variables of sbatch:
#   VENV                the environment that `make setup` made (.venv)
#   ACCELERATE_CONFIG   accelerate_configs/multi_node.yaml, or another one
#   ACCELERATE_OPTIONS  more options of accelerate launch
#   PROCESSES_PER_NODE  default: the number of the node's GPUs in this job
#   MAX_REQUEUES        number of restarts after which a failed job is not requeued (20)
set -euo pipefail
trap '' USR1 # only the training processes handle warnings

[[ -f train_lora.py ]] || { echo "error: run sbatch in the folder of train_lora.py" >&2; exit 2; }
source "${VENV:-.venv}/bin/activate"

export PYTHONUNBUFFERED=1                   # so that the last lines of a killed process are in the log
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30} # seconds between two lines of a progress bar
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it, --max_restarts on several nodes hangs (pytorch issue 135712)
# Seconds for saving after SIGTERM. SLURM kills the processes after its KillWait in any case.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-30}

# Prints the run's output_dir. Mistakes in the options are printed within seconds, with exit code 2.
output_dir() {
    python - "$@" <<'PYTHON'
import sys
from common.errors import UserError
from training.cli import load_config
from training.run import print_error
from training.run_folder import check_output_dir
try:
    config = load_config(sys.argv[1:])
    check_output_dir(config)
except UserError as error:
    print_error(str(error))
    sys.exit(2)
print(config.output_dir)
PYTHON
}

# Starts a launcher on each node, which starts the processes of its node. Arguments: options of train_lora.py.
run_on_all_nodes() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --label \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c '
            trap "" USR1 # it would end torchrun; the training processes handle it
            exec accelerate launch --config_file "$ACCELERATE_CONFIG" \
                --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" \
                --num_processes $((SLURM_JOB_NUM_NODES * PROCESSES_PER_NODE)) \
                --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
                --tee 3 --log_dir "$LOGS/$SLURMD_NODENAME" ${ACCELERATE_OPTIONS:-} \
                train_lora.py "$@"' launch "$@"
}

# SLURM requeues a job after a dead node or a preemption, and the run requeues its job before the time limit. This
# function decides after other failures. A restart helps if a device was broken. It does not help after a mistake, on a
# full disk, or if the loss diverges: these jobs fail again before the next checkpoint. So a job is requeued if it has
# written a checkpoint since its start.
requeue_if_it_helps() {
    local output=$1 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    if [[ -z $(find "$output/checkpoints" -maxdepth 1 -name 'step_*' -newer "$LOGS/started" 2>/dev/null) ]]; then
        echo "failed without a new checkpoint: not requeued" >&2
    elif ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-20})); then
        echo "failed after ${SLURM_RESTART_COUNT} restarts: not requeued" >&2
    else
        echo "failed after a new checkpoint: requeued, to resume from it" >&2
        scontrol requeue "${job:-$SLURM_JOB_ID}"
    fi
}

launch() {
    local output hosts status=0 restarts=${SLURM_RESTART_COUNT:-0}
    ((restarts == 0)) || set -- "$@" --resume auto --no_overwrite # other values apply to the first start only
    output=$(output_dir "$@")
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]}
    export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # different for each job, and below the ports of outgoing connections
    export ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-accelerate_configs/multi_node.yaml}
    export PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export LOGS=$output/logs/$SLURM_JOB_ID.$restarts # a folder per node, and in it a file per process
    mkdir -p "$LOGS"
    touch "$LOGS/started"
    echo "start $((restarts + 1)) of job $SLURM_JOB_ID: ${hosts[*]}, $PROCESSES_PER_NODE processes each; logs in $LOGS"
    run_on_all_nodes "$@" || status=$?
    ((status == 0)) || requeue_if_it_helps "$output"
    exit "$status"
}
