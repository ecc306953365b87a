#!/usr/bin/env bash
# Checks megamed on a machine with GPUs and PyTorch, without a network: see usage below.
set -uo pipefail

usage() {
    cat <<'USAGE'
tools/gpu_check.sh [options]: check megamed on a machine with GPUs, in one command.

It needs PyTorch and pip, and, where megamed's requirements are not installed, a folder wheelhouse/ from
`make wheelhouse`; nothing is fetched from a network, and the machine's own packages stay as they are.

  install     what megamed requires, from wheelhouse/ into a folder of its own; torch stays the machine's
  smoke       train 30 steps in bf16 on all GPUs; the loss has to fall
  fp32        train 3 steps in fp32 on one GPU and on the CPU; the losses have to be the same
  attention   train 3 steps in bf16 on one GPU with megamed's attention and with Transformer Engine's; the
              losses have to be the same but for rounding
  tests       the tests that need a GPU
  bench       a training step of the tiny model beside plain PyTorch
  slice       a training step of a slice of InternVL-26B: tokens/s, MFU, memory; with and without
              Transformer Engine
  preflight   a step of a part of InternVL-26B: its memory and time as tools/preflight.py says, and as measured

Options:
  --python PATH      the Python that has PyTorch (default: python3)
  --out DIR          where logs and runs go (default: runs/gpu_check)
  --wheelhouse DIR   (default: wheelhouse)
  --limit SECONDS    longest time of a step (default: 900)
  --dry-run          print the commands and run none
  --cpu-rehearsal    run everything on the CPU, small: checks this script, not a GPU
  --help

Each step ends as PASS, FAIL or SKIPPED with its reason. Exit code: 0 if nothing failed, 1 if something did,
2 if there is no GPU or an option is wrong.
USAGE
}

python=python3 out=runs/gpu_check wheelhouse=wheelhouse limit=900 dry_run= rehearsal=
while [ $# -gt 0 ]; do
    case "$1" in
        --python | --out | --wheelhouse | --limit)
            [ $# -ge 2 ] || { echo "gpu_check: $1 needs a value; see --help" >&2; exit 2; }
            declare "${1#--}=$2"
            shift 2 ;;
        --dry-run) dry_run=1; shift ;;
        --cpu-rehearsal) rehearsal=1; shift ;;
        --help | -h) usage; exit 0 ;;
        *) echo "gpu_check: unknown option $1; see --help" >&2; exit 2 ;;
    esac
done
case $python in */*) python=$(realpath -s "$python") ;; esac
out=$(realpath -m "$out") wheelhouse=$(realpath -m "$wheelhouse")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

num_gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || num_gpus=
if [ -z "$num_gpus" ] && [ -z "$dry_run" ]; then
    echo "gpu_check: $python cannot import torch; name the Python that has PyTorch with --python" >&2
    exit 2
fi
num_gpus=${num_gpus:-0}
if [ -n "$rehearsal" ]; then
    export CUDA_VISIBLE_DEVICES=
    num_gpus=0
elif [ "$num_gpus" = 0 ] && [ -z "$dry_run" ]; then
    echo "gpu_check: no CUDA device here; --cpu-rehearsal runs the same steps on the CPU, --dry-run prints them" >&2
    exit 2
fi
processes=$((num_gpus > 1 ? num_gpus : 1))
site=$out/site
mkdir -p "$out" || exit 2
export PYTHONPATH="$site:$PWD" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
names=() results=() reasons=() failed=0

record() { # name, result, reason
    names+=("$1") results+=("$2") reasons+=("$3")
    if [ "$2" = FAIL ]; then failed=1; fi
    printf '%-8s %-8s %s\n' "$2" "$1" "$3"
}

# Run a command with its output in a log; a dry run prints it instead. Returns the command's exit code.
run() { # log, command...
    local log=$out/$1.log
    shift
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
        return 0
    fi
    timeout "$limit" "$@" >"$log" 2>&1
}

has() { # modules...: whether all of them are installed
    "$python" -c 'import sys, importlib.util as u; sys.exit(None in map(u.find_spec, sys.argv[1:]))' "$@" 2>/dev/null
}

why() { # log: megamed's own word on the failure, else the last exception, else the last line
    if [ -n "$dry_run" ]; then echo "dry run"; return; fi
    { grep -m 1 -E '^megamed: error' "$out/$1.log" || grep -E '^[A-Za-z_.]+(Error|Exception)\b' "$out/$1.log" |
        tail -n 1 | grep . || grep -v '^[[:space:]]*$' "$out/$1.log" | tail -n 1; } | cut -c1-200
}

train() { # name, processes, key=value...
    local name=$1 count=$2
    shift 2
    rm -rf "${out:?}/runs/$name"
    run "$name" ${device_variables:+env $device_variables} "$python" -m torch.distributed.run --standalone \
        --nproc-per-node "$count" launch/pretrain.py +exp=fmri run.dir="$out/runs" run.name="$name" \
        run.resume=no wandb.mode=disabled eval.held_out=false optim.warmup_steps=0 "$@"
}

judge() { # step, question, runs...: PASS or FAIL by the metrics of finished runs
    local step=$1 question=$2 text
    shift 2
    if [ -n "$dry_run" ]; then record "$step" SKIPPED "dry run"; return; fi
    if text=$("$python" tools/gpu_check.py "$question" "${@/%//metrics.jsonl}"); then
        record "$step" PASS "$text"
    else
        record "$step" FAIL "$text"
    fi
}

# ---- install
mkdir -p "$site"
if has megatron.core transformers tokenizers safetensors hydra nibabel pydicom gdcm pyarrow nvidia.dali wandb psutil pytest; then
    record install SKIPPED "what megamed requires is installed"
elif [ ! -f "$wheelhouse/constraints.txt" ]; then
    record install FAIL "no $wheelhouse/: make it with 'make wheelhouse' where there is a network, and copy it here"
else
    # torch and what compiles against it stay the machine's own. setuptools comes first, because one package
    # of the wheelhouse is source.
    grep -Ev '^(torch|flash-attn|ring-flash-attn|transformer-engine)' "$wheelhouse/constraints.txt" \
        >"$out/requirements.txt"
    pip=("$python" -m pip install --no-index --find-links "$wheelhouse" --no-deps --upgrade --target "$site")
    if run setuptools "${pip[@]}" -c "$out/requirements.txt" setuptools &&
        run install "${pip[@]}" --no-build-isolation --use-pep517 -r "$out/requirements.txt"; then
        record install PASS "$(grep -c . "$out/requirements.txt") packages in $site"
    else
        record install FAIL "see $out/setuptools.log and $out/install.log"
    fi
fi

# ---- smoke
# Microbatches are shared out over the GPUs: as many on each.
if train smoke "$processes" train.steps=30 train.dtype=bf16 train.microbatches=$((4 * processes)); then
    judge smoke falls "$out/runs/smoke"
else
    record smoke FAIL "$(why smoke)"
fi

# ---- fp32
if ! train fp32_gpu 1 train.steps=3 train.dtype=fp32 checkpoint.every_steps=0; then
    record fp32 FAIL "on the GPU: $(why fp32_gpu)"
elif ! device_variables=CUDA_VISIBLE_DEVICES= train fp32_cpu 1 train.steps=3 train.dtype=fp32 checkpoint.every_steps=0; then
    record fp32 FAIL "on the CPU: $(why fp32_cpu)"
else
    judge fp32 same "$out/runs/fp32_cpu" "$out/runs/fp32_gpu"
fi

# ---- attention
bf16=(train.steps=3 train.dtype=bf16 checkpoint.every_steps=0)
if [ -z "$dry_run" ] && ! has transformer_engine; then
    record attention SKIPPED "Transformer Engine is not installed"
elif [ -n "$rehearsal" ]; then
    record attention SKIPPED "Transformer Engine needs a GPU"
elif ! train attention_ours 1 "${bf16[@]}" attention.backend=ring; then
    record attention FAIL "megamed's: $(why attention_ours)"
elif ! train attention_te 1 "${bf16[@]}" attention.backend=transformer_engine; then
    record attention FAIL "Transformer Engine's: $(why attention_te)"
else
    judge attention close "$out/runs/attention_ours" "$out/runs/attention_te"
fi

# ---- tests
run tests "$python" -m pytest -q -m gpu tests
case $? in
    0) if [ -z "$dry_run" ] && grep -q ' passed' "$out/tests.log"; then
        record tests PASS "$(why tests)"
    else
        record tests SKIPPED "$(why tests)"
    fi ;;
    5) record tests SKIPPED "no test is marked gpu" ;;
    *) record tests FAIL "$(why tests)" ;;
esac

# ---- bench and slice
bench() { # step, script, arguments...
    local step=$1 script=$2
    shift 2
    if run "$step" "$python" "tools/bench/$script" "$@"; then
        record "$step" $([ -n "$dry_run" ] && echo SKIPPED || echo PASS) \
            "$([ -n "$dry_run" ] && echo "dry run" || summary "$step")"
    else
        record "$step" FAIL "$(why "$step")"
    fi
}

summary() { # step: what its log says of speed
    grep -E '^(megamed / transformers|step |tokens/s|model TFLOP/s|MFU|peak memory|\| 0 |A step)' "$out/$1.log" |
        sed -E 's/ {2,}/ /' | paste -sd ';' | sed 's/;/; /g'
}

slice=(--slice internvl26b --repetitions 10 --profile "$out/slice.md") repetitions=30
if [ -n "$rehearsal" ]; then
    slice=(--slice internvl26b --layers 1 --tiny-widths --seq-length 600 --frames 8 --repetitions 1 --warmup 0)
    repetitions=1
fi
bench bench train_step.py --repetitions "$repetitions"
bench slice train_step.py "${slice[@]}" --no-transformer-engine
if [ -z "$dry_run" ] && ! has transformer_engine; then
    record slice-te SKIPPED "Transformer Engine is not installed"
else
    bench slice-te train_step.py "${slice[@]}"
fi
job=(+exp=internvl26b parallel=single model.language.num_layers=6 model.vision.num_layers=12
    data.seq_length=8192)
[ -z "$rehearsal" ] || job=(+exp=fmri data.seq_length=256)
bench preflight preflight.py "${job[@]}" cluster=h200 train.microbatches=2

# ---- summary
echo
printf '%s\n' "${num_gpus} GPU(s); logs and runs are in $out"
printf '| step | result | note |\n|---|---|---|\n'
for i in "${!names[@]}"; do printf '| %s | %s | %s |\n' "${names[$i]}" "${results[$i]}" "${reasons[$i]}"; done
exit "$failed"
