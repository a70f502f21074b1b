# Sourced by the batch scripts beside it: `launch <options of train_lora.py>` trains on all nodes of the job, and decides
# what becomes of the job when that fails. docs/cluster.md says more. What sbatch's environment may set:
#   VENV                the environment that `make setup` made (.venv)
#   ACCELERATE_CONFIG   accelerate_configs/multi_node.yaml, or another
#   ACCELERATE_OPTIONS  more options of accelerate launch
#   PROCESSES_PER_NODE  as many as the node's GPUs in this job
#   MAX_REQUEUES        how often a job may have started again and still requeue itself after a failure (20)
set -euo pipefail
trap '' USR1 # a warning is for the processes that train

[[ -f train_lora.py ]] || { echo "error: run sbatch in the folder of train_lora.py" >&2; exit 2; }
source "${VENV:-.venv}/bin/activate"

export PYTHONUNBUFFERED=1                   # the last lines of a killed process are what one wants to read
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30} # seconds between two lines of a progress bar
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it, --max_restarts on several nodes hangs (pytorch issue 135712)
# Seconds to save in after SIGTERM. SLURM ends them after its own KillWait, which the cluster decides.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-30}

# Prints the run's output_dir. What is wrong with the options is said here, within seconds and with exit code 2.
output_dir() {
    python - "$@" <<'PYTHON'
import sys
from train_lora import USER_ERRORS, fail
from training.load_config import load_config
from training.rundir import check_output_dir
try:
    config = load_config(sys.argv[1:])
    check_output_dir(config)
except USER_ERRORS as error:
    sys.exit(fail(error, 2))
print(config.output_dir)
PYTHON
}

# One task per node: a launcher, which starts the processes of its node. Arguments: options of train_lora.py.
run_on_all_nodes() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --label \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c '
            trap "" USR1 # torchrun would die of it; the processes that it starts handle it
            exec accelerate launch --config_file "$ACCELERATE_CONFIG" \
                --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" \
                --num_processes $((SLURM_JOB_NUM_NODES * PROCESSES_PER_NODE)) \
                --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
                --tee 3 --log_dir "$LOGS/$SLURMD_NODENAME" ${ACCELERATE_OPTIONS:-} \
                train_lora.py "$@"' launch "$@"
}

# SLURM requeues by itself what a dead node or a preemption ends, and the run what a time limit would. What is left are
# failures of a process. Starting again helps against a broken device, but not against a mistake, a full disk or a loss
# that diverges: these fail again before the next checkpoint. So a job is requeued if it has written one since its start.
requeue_if_it_helps() {
    local output=$1 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    if [[ -z $(find "$output/checkpoints" -maxdepth 1 -name 'step_*' -newer "$LOGS/started" 2>/dev/null) ]]; then
        echo "failed without a new checkpoint: not requeued" >&2
    elif ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-20})); then
        echo "failed after ${SLURM_RESTART_COUNT} restarts: not requeued" >&2
    else
        echo "failed after a new checkpoint: requeued, and will go on from it" >&2
        scontrol requeue "${job:-$SLURM_JOB_ID}"
    fi
}

launch() {
    local output hosts status=0 restarts=${SLURM_RESTART_COUNT:-0}
    ((restarts == 0)) || set -- "$@" --resume auto --no_overwrite # other values spoke of what was there before
    output=$(output_dir "$@")
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]}
    export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # one for each job, below those of outgoing connections
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
