#!/bin/bash
#SBATCH --job-name=likeness
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=B:TERM@60
# Fine-tune over two machines: sbatch deployments/slurm.sh subject.source=photos subject.class_noun=dog ...
# The checkout and output_dir lie on a file system that all machines share.
set -euo pipefail
cd "${LIKENESS_HOME:?the checkout}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rdzv_endpoint="$head:29500"
work="${LIKENESS_OUTPUT:-runs}/work/training"
mkdir -p "$work"
marker=$(mktemp -p "${LIKENESS_OUTPUT:-runs}" .slurm-XXXXXX)

srun --nodes=1 --ntasks=1 --nodelist="$head" .venv/bin/likeness run training/devices=nodes \
  training.num_nodes="$SLURM_NNODES" training.num_devices="$SLURM_GPUS_ON_NODE" \
  training.rdzv_endpoint="$rdzv_endpoint" "output_dir=${LIKENESS_OUTPUT:-runs}" "$@" &
main=$!
# Slurm sends SIGTERM before the time limit; training then saves a checkpoint and exits.
trap 'kill -TERM "$main"; wait "$main"' TERM

# spec.json appears once the photos are captioned and the class images generated.
spec=
while [ -z "$spec" ] && kill -0 "$main" 2>/dev/null; do
  sleep 5
  spec=$(find "$work" -name spec.json -newer "$marker" 2>/dev/null | head -n 1 || true)
done
if [ -n "$spec" ]; then
  srun --nodes=$((SLURM_NNODES - 1)) --ntasks-per-node=1 --exclude="$head" .venv/bin/python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --rdzv-backend=c10d \
    --rdzv-endpoint="$rdzv_endpoint" --rdzv-id="$(basename "$(dirname "$spec")")" -m tasks.training.process.worker "$spec" &
fi
rm -f "$marker"
wait "$main"
