#!/usr/bin/env bash
# The pipeline on a Slurm allocation: one Ray node per machine, `dvc repro` on the first. From the root of the checkout, which
# must lie on a filesystem that all nodes see, with its .venv:
#
#   mkdir -p .store/slurm && sbatch --nodes=4 --gpus-per-node=4 infra/slurm.sh            # everything that is out of date
#   sbatch --nodes=4 --gpus-per-node=4 infra/slurm.sh train@full                          # one stage and what it needs
#   sbatch infra/slurm.sh -s evaluate                                                     # any arguments of dvc repro
#
# PBE_STORAGE: a folder that all nodes see (default .store of the checkout) or s3://. MLFLOW_TRACKING_URI: a server, as soon as
# there are several nodes. HEAD_IP: the first node's address, where the first one of `hostname -I` is not the network to use.
#
#SBATCH --job-name=pbe
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=.store/slurm/%j.log
# What is killed at the time limit goes on where it was when the same command is given again.
#
# --exclusive is not only for speed: when it ends, `ray symmetric-run` stops every Ray of this user on its nodes.
set -euo pipefail

main() {
    cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
    [[ -x .venv/bin/ray && -f dvc.yaml ]] || die "$PWD is no checkout with its .venv; run sbatch from the root, after make env"
    export PATH="$PWD/.venv/bin:$PATH"
    warn_of_what_is_local

    state="$PWD/.store/slurm/$SLURM_JOB_ID"
    mkdir -p "$state"
    trap clean_up EXIT
    require_a_token

    # Addresses, not names: where a name of the first node resolves to 127.0.1.1 there, no node would think it is the head.
    local head_ip=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
    local address="$head_ip:$((20000 + SLURM_JOB_ID % 10000))" # no other job's

    # Node-local and short: Ray puts sockets there, whose paths have a limit of 107 bytes.
    export RAY_TMPDIR="/tmp/pbe-$SLURM_JOB_ID"
    export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds until all nodes are there; Ray's own 30 are short on NFS
    export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
    # ours alone: in /tmp another user may have made it first
    # shellcheck disable=SC2016 # expanded by the inner shell
    srun --ntasks-per-node=1 bash -c 'mkdir -m 700 "$0" 2>/dev/null || [[ -O "$0" && ! -L "$0" ]]' "$RAY_TMPDIR"

    # RAY_ADDRESS for the command alone: symmetric-run sets none, and without it each stage would start a Ray of its own.
    # It is host:port, so stages run here and connect to it; only http:// would make them submit jobs. Options that only a
    # head takes (--include-dashboard) cannot be given: every node gets them all. The dashboard is on the head's loopback.
    # shellcheck disable=SC2016 # expanded by the inner shell
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=180 \
        ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --object-store-memory=2147483648 \
        -- env RAY_ADDRESS="$address" \
        bash -c 'python -m dvc repro "${@:2}"; code=$?; echo "$code" >"$1"; exit "$code"' repro "$state/exit-code" "$@" \
        || true # extracted below
    # symmetric-run ends with 0 when Ray did not start, so its word is not taken.
    [[ -f "$state/exit-code" ]] || die "Ray did not start; the reason is above"
    exit "$(<"$state/exit-code")"
}

die() {
    echo "slurm.sh: $*" >&2
    exit 1
}

warn_of_what_is_local() {
    if [[ ${MLFLOW_TRACKING_URI:-} != http* && $SLURM_JOB_NUM_NODES -gt 1 ]]; then
        echo "slurm.sh: MLFLOW_TRACKING_URI names no server; several nodes will write one SQLite file on a shared disk" >&2
    fi
}

# Nodes of other jobs reach Ray's ports too, and whoever reaches them may run code. Ray 2.60 starts with a token when
# ~/.ray/auth_token is there, but a driver with RAY_ADDRESS does not send it unless it is told to: so both are told.
require_a_token() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/auth-token"
    (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
}

# Ray's logs of every node are kept beside the job's.
# shellcheck disable=SC2329,SC2016 # called by the trap; expanded by the shells on the nodes
clean_up() {
    rm -f "$state/auth-token"
    [[ -n ${RAY_TMPDIR:-} ]] || return 0
    srun --ntasks-per-node=1 bash -c '
        logs=$(readlink -f "$1/ray/session_latest")/logs
        if [[ -d $logs ]]; then mv "$logs" "$2/ray-logs-$SLURM_NODEID"; fi
        rm -rf "$1"' \
        clean-up "$RAY_TMPDIR" "$state" || true
}

main "$@"
