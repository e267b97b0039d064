#!/usr/bin/env bash
# Train on Slurm, over as many time limits as it takes: a job that is warned before its time is up, saves, queues itself
# again and carries on.
#
#     bash scripts/slurm.sh --nodes 4 --gpus 8 --time 24:00:00 -- --cfg configs/base.yaml --data-path /imagenet
#
# What stands after -- goes to main.py. Before it:
#
#     --nodes N           hosts (1)
#     --gpus N            GPUs of a host, one process for each (0: no GPU, one process a host)
#     --time LIMIT        of one go, as Slurm writes it (24:00:00)
#     --warn SECONDS      before the limit, to save in; Slurm may warn a minute earlier still (180)
#     --restarts N        so often it queues itself again (100)
#     --seeds "0 1 2"     one run for each, with --seed and a --tag of its own
#     --container IMAGE   a .sif file: apptainer; anything else: pyxis with enroot
#     --mount DIR         to be seen in the container, besides the project's folder; may be given again
#     --sbatch "FLAGS"    more for sbatch: "--partition gpu --account us --cpus-per-task 12"
#     --print             show the job instead of submitting it
#
# Python, and the virtual environment if one is active, are those of the shell that submits.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
nodes=1 gpus=0 time=24:00:00 warn=180 restarts=100 seeds='' container='' more='' submit=sbatch
mounts=("$checkout")

fail() {
    echo "error: $*" >&2
    exit 2
}

whole_number() { [[ $2 =~ ^[0-9]+$ ]] || fail "$1 takes a whole number, not '$2'"; }

while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --print) submit='' && shift && continue ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
    --nodes | --gpus | --time | --warn | --restarts | --seeds | --container | --mount | --sbatch) ;;
    *) fail "unknown flag $1; flags of main.py stand after --" ;;
    esac
    [ $# -gt 1 ] && [ "$2" != -- ] || fail "$1 takes a value"
    case $1 in
    --nodes) whole_number "$1" "$2" && nodes=$2 ;;
    --gpus) whole_number "$1" "$2" && gpus=$2 ;;
    --time) time=$2 ;;
    --warn) whole_number "$1" "$2" && warn=$2 ;;
    --restarts) whole_number "$1" "$2" && restarts=$2 ;;
    --seeds) [[ $2 =~ ^[0-9]+([ ,]+[0-9]+)*$ ]] || fail "--seeds takes whole numbers, not '$2'" && seeds=$2 ;;
    --container) container=$2 ;;
    --mount) mounts+=("$(realpath "$2")") ;;
    --sbatch) more=$2 ;;
    esac
    shift 2
done
[ "${1:-}" = -- ] || fail "the flags of main.py are missing: bash scripts/slurm.sh [FLAGS] -- --cfg configs/small.yaml ..."
shift
[ "$nodes" -gt 0 ] || fail "--nodes must be at least 1"
[ -n "$container" ] && python=python || python=$(command -v python || command -v python3) || fail "there is no python here"

start=(srun --wait=600) # seconds, from when a task has ended until the others are made to
case $container in
'') run=("$python") ;;
*.sif) run=(apptainer exec $([ "$gpus" -gt 0 ] && echo --nv) --bind "$(IFS=, && echo "${mounts[*]}")" "$container" "$python") ;;
*)
    start+=("--container-image=$container" "--container-workdir=$checkout" "--container-mounts=$(IFS=, && echo "${mounts[*]}")")
    run=("$python")
    ;;
esac

tag='' before=''
for word; do
    [ "$before" = --tag ] && tag=$word
    [[ $word = --tag=* ]] && tag=${word#*=}
    before=$word
done

job() {
    echo "#!/usr/bin/env bash"
    echo "#SBATCH --job-name=${tag:-crossformer} --nodes=$nodes --ntasks-per-node=$((gpus > 0 ? gpus : 1)) --time=$time"
    [ "$gpus" -gt 0 ] && echo "#SBATCH --gpus-per-node=$gpus"
    echo "#SBATCH --signal=B:USR1@$warn --requeue --open-mode=append"
    if [ -n "$seeds" ]; then
        echo "#SBATCH --array=$(tr -s ' ,' , <<<"$seeds") --output=slurm-%A_%a.log"
    else
        echo "#SBATCH --output=slurm-%j.log"
    fi
    [ -n "$more" ] && echo "#SBATCH $more"
    printf 'cd %q || exit 2\n' "$checkout"
    # What a task may use of a node is not handed on by itself
    printf '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n'
    printf 'job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} job=${job:-$SLURM_JOB_ID} warned=\n'
    printf '# Slurm warns this script; it asks the processes to save, which end then\n'
    printf "trap 'warned=yes; scancel --signal=USR1 \"\$job\"' USR1\n"
    printf '%q ' "${start[@]}" "${run[@]}" main.py "$@"
    # shellcheck disable=SC2016  # it is the job that is to look up its seed
    [ -n "$seeds" ] && printf -- '--seed "$SLURM_ARRAY_TASK_ID" --tag %q"$SLURM_ARRAY_TASK_ID" ' "${tag:+$tag-}seed"
    cat <<JOB
&
step=\$!
wait "\$step"
status=\$?
if [ -n "\$warned" ]; then # which has ended the wait, unless the step had just ended
    wait "\$step"
    after=\$?
    [ "\$after" = 127 ] || status=\$after
fi
# Before a job that has to make room is ended, its processes are asked to, and this script is not
scontrol show job "\$job" | grep -q 'PreemptTime=[0-9]' && warned=yes
# The highest of all tasks. 3: a process was lost, or hung; from 128 on one was killed, 143 by srun after the end of
# another. An error of the user's (2) would come again
if [ -n "\$warned" ] || [ "\$status" = 3 ] || { [ "\$status" -ge 128 ] && [ "\$status" != 143 ]; }; then
    if [ "\${SLURM_RESTART_COUNT:-0}" -ge $restarts ]; then
        echo "not queued again: that was done $restarts times (--restarts)" >&2
        exit 1
    fi
    for try in 1 2 3 4 5; do
        scontrol requeue "\$job" && sleep 600 # Slurm ends this one
        sleep 20
    done
    echo "Slurm does not queue this job again; submit it once more to carry on" >&2
    exit 1
fi
exit "\$status"
JOB
}

if [ -z "$submit" ]; then
    job "$@"
else
    command -v sbatch >/dev/null || fail "there is no sbatch here; --print shows the job"
    job "$@" | sbatch
fi
