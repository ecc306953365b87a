# shellcheck shell=bash
# What the job scripts share; they source it. Needs nothing of a cluster but Slurm, and a folder that all nodes see.
#
# Settings, as environment variables of sbatch (all optional):
#   MEGAMED_PYTHON         the Python with megamed (default: .venv/bin/python of the folder that sbatch was called in)
#   MEGAMED_CONTAINER      an image for srun's --container-image, where Pyxis is; MEGAMED_MOUNTS for --container-mounts
#   MEGAMED_GPUS_PER_NODE  processes a node (default: the GPUs that Slurm gave, or those that nvidia-smi lists)
#   MEGAMED_MAX_RESTARTS   how often torchrun starts all ranks again after one has failed or hung (default: 3)
#   MEGAMED_MAX_REQUEUES   how often the job is queued again after a node was lost (default: 10)
#   MEGAMED_CHECK          0 leaves out the check of nodes, network and storage
#   MEGAMED_LOGS           folder of the logs (default: runs/slurm)

megamed_fail() {
    echo "megamed: error: $*" >&2
    exit 2
}

# Find Python, nodes and the place for logs. Sets $run, the command that runs a command on every node.
megamed_begin() {
    [ -n "${SLURM_JOB_ID:-}" ] || megamed_fail "this is a job script; submit it: sbatch slurm/${0##*/} [key=value ...]"
    [ -f launch/pretrain.py ] || megamed_fail "$PWD has no launch/pretrain.py; call sbatch in megamed's folder"
    python="${MEGAMED_PYTHON:-$PWD/.venv/bin/python}"
    nodes="${SLURM_JOB_NUM_NODES:-1}"
    restart="${SLURM_RESTART_COUNT:-0}"
    logs="${MEGAMED_LOGS:-runs/slurm}/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}"
    mkdir -p "$logs" || megamed_fail "$logs cannot be made; set MEGAMED_LOGS to a folder that can"
    logs="$(cd "$logs" && pwd)"
    run=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
    [ -z "${SLURM_CPUS_ON_NODE:-}" ] || run+=(--cpus-per-task="$SLURM_CPUS_ON_NODE") # since 22.05 it is not inherited
    if [ -n "${MEGAMED_CONTAINER:-}" ]; then
        run+=(--container-image="$MEGAMED_CONTAINER" --container-workdir="$PWD")
        run+=(--container-mounts="$PWD:$PWD${MEGAMED_MOUNTS:+,$MEGAMED_MOUNTS}")
        python="${MEGAMED_PYTHON:-python}"
    elif ! command -v "$python" >/dev/null; then
        megamed_fail "$python is not there; run make install in $PWD, or set MEGAMED_PYTHON or MEGAMED_CONTAINER"
    fi
    # Nothing is fetched from the internet, and nobody waits for it.
    export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
    head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    # By its address in Slurm's configuration, which is its name nearly everywhere.
    address="$(scontrol show node "$head" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | head -n 1)"
    address="${address:-$head}"
    port=$((20000 + SLURM_JOB_ID % 20000))
    per_node="${MEGAMED_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}"
    [ -n "$per_node" ] || per_node="$(nvidia-smi -L 2>/dev/null | grep -c ^GPU)" || per_node=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((${SLURM_CPUS_ON_NODE:-1} + per_node - 1) / per_node))}"
    echo "megamed: job $SLURM_JOB_ID, start $((restart + 1)): $nodes nodes x $per_node processes; logs: $logs"
}

# Start a script with one torchrun a node.
#   megamed_torchrun NAME MAX_RESTARTS SCRIPT [argument ...]
megamed_torchrun() {
    local name="$1" restarts="$2"
    shift 2
    "${run[@]}" --output="$logs/start$((restart + 1))-$name-node%n.log" \
        bash slurm/node.sh "$python" -m torch.distributed.run \
        --nnodes="$nodes" --nproc-per-node="$per_node" --max-restarts="$restarts" \
        --rdzv-id="$SLURM_JOB_ID-$restart-$name" --rdzv-backend=c10d --rdzv-endpoint="$address:$port" "$@"
}

# Look at nodes, network and storage, in the first minute and before anything is loaded.
#   megamed_check FOLDER_OF_RUNS
megamed_check() {
    [ "${MEGAMED_CHECK:-1}" != 0 ] || return 0
    local code=0
    megamed_torchrun check 0 tools/check_nodes.py --dir "$1" || code=$?
    grep -h "^megamed: " "$logs/start$((restart + 1))-check-"*.log | sort -u
    [ "$code" = 0 ] || megamed_fail "the check of nodes, network and storage failed (code $code; MEGAMED_CHECK=0 leaves it out)"
}

# Train, and have the job queued again if it was asked to stop before its last step.
#   megamed_train [key=value ...]
megamed_train() {
    local dir=runs word code=0
    for word in "$@"; do [[ $word != run.dir=* ]] || dir="${word#run.dir=}"; done
    export MEGAMED_STOP_FILE="$logs/stopped"
    rm -f "$MEGAMED_STOP_FILE"
    megamed_check "$dir"
    port=$((port + 1))
    megamed_torchrun train "${MEGAMED_MAX_RESTARTS:-3}" launch/pretrain.py run.resume=yes "$@" || code=$?
    if [ -f "$MEGAMED_STOP_FILE" ]; then
        echo "megamed: stopped after step $(cat "$MEGAMED_STOP_FILE"); queued again, to go on from there"
        rm -f "$MEGAMED_STOP_FILE"
        megamed_requeue
    fi
    [ "$code" = 0 ] && exit 0
    grep -h "^megamed: " "$logs/start$((restart + 1))-train-"*.log | sort -u
    if megamed_lost_node "$code"; then
        echo >>"$logs/lost"
        if [ "$(wc -l <"$logs/lost")" -le "${MEGAMED_MAX_REQUEUES:-10}" ]; then
            echo "megamed: a node was lost; queued again, to go on from the last checkpoint"
            megamed_requeue
        fi
        echo "megamed: error: a node was lost, and not for the first time (MEGAMED_MAX_REQUEUES)"
    fi
    exit "$code"
}

# Whether the job failed with a node: its processes were killed from outside, or it does not start any.
megamed_lost_node() {
    [ "$1" -lt 128 ] || return 0
    ! timeout 60 "${run[@]}" true
}

# Put this job back into the queue, which ends this script.
megamed_requeue() {
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
    megamed_fail "the job cannot be queued again; submit it once more, and it goes on"
}
