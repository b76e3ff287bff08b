#!/usr/bin/env bash
# The pipeline on a Slurm allocation: one Ray node per machine, `dvc repro` on the first. Run it from the root of the
# checkout, which must be on a filesystem that all nodes see, with its .venv:
#
#   mkdir -p .store/slurm && sbatch --nodes=4 --gpus-per-node=4 infra/slurm.sh            # all that is out of date
#   sbatch --nodes=4 --gpus-per-node=4 infra/slurm.sh train@full                          # one stage and what it needs
#   sbatch infra/slurm.sh -s evaluate                                                     # any arguments of dvc repro
#
# PBE_STORAGE: a folder that all nodes see (default: .store of the checkout) or s3://. MLFLOW_TRACKING_URI: a server, if
# there are several nodes. HEAD_IP: the first node's address, if the first one of `hostname -I` is the wrong network.
#
#SBATCH --job-name=pbe
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=.store/slurm/%j.log
# If the time limit kills the job, the same command resumes it.
#
# --exclusive is not only for speed: when `ray symmetric-run` ends, it stops every Ray of this user on its nodes.
set -euo pipefail

main() {
    cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
    [[ -x .venv/bin/ray && -f dvc.yaml ]] || die "$PWD is not a checkout with a .venv; run make env, then sbatch from the root"
    export PATH="$PWD/.venv/bin:$PATH"
    warn_if_mlflow_is_local

    state="$PWD/.store/slurm/$SLURM_JOB_ID"
    mkdir -p "$state"
    trap clean_up EXIT
    require_a_token

    # Addresses, not names: if the first node's name resolves to 127.0.1.1 there, no node takes itself for the head.
    local head_ip=${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
    local address="$head_ip:$((20000 + SLURM_JOB_ID % 10000))" # a port that no other job uses

    # Node-local and short: Ray puts sockets there, and a socket's path has at most 107 bytes.
    export RAY_TMPDIR="/tmp/pbe-$SLURM_JOB_ID"
    export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds until all nodes have joined; Ray's default of 30 is short on NFS
    export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
    # must be our own: another user may have made a folder of this name in /tmp
    # shellcheck disable=SC2016 # expanded by the inner shell
    srun --ntasks-per-node=1 bash -c 'mkdir -m 700 "$0" 2>/dev/null || [[ -O "$0" && ! -L "$0" ]]' "$RAY_TMPDIR"

    # RAY_ADDRESS only for the command: symmetric-run sets none, and without it each stage would start its own Ray.
    # It is host:port, so stages run here and connect to it; with http:// they would submit jobs. Every node gets all
    # options, so those for a head alone (--include-dashboard) are impossible. The dashboard is on the head's loopback.
    # shellcheck disable=SC2016 # expanded by the inner shell
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=180 \
        ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --object-store-memory=2147483648 \
        -- env RAY_ADDRESS="$address" \
        bash -c 'python -m dvc repro "${@:2}"; code=$?; echo "$code" >"$1"; exit "$code"' repro "$state/exit-code" "$@" \
        || true # the exit code is read below
    # symmetric-run exits with 0 even if Ray did not start, so its exit code does not count.
    [[ -f "$state/exit-code" ]] || die "Ray did not start; the reason is above"
    exit "$(<"$state/exit-code")"
}

die() {
    echo "slurm.sh: $*" >&2
    exit 1
}

warn_if_mlflow_is_local() {
    if [[ ${MLFLOW_TRACKING_URI:-} != http* && $SLURM_JOB_NUM_NODES -gt 1 ]]; then
        echo "slurm.sh: MLFLOW_TRACKING_URI is not a server; several nodes will write one SQLite file on a shared disk" >&2
    fi
}

# Nodes of other jobs reach Ray's ports too, and anyone who reaches them can run code. Ray 2.60 requires a token if
# ~/.ray/auth_token exists, but a driver with RAY_ADDRESS does not send it by default. So both get these variables.
require_a_token() {
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/auth-token"
    (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
}

# Moves each node's Ray logs beside the job's log.
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
