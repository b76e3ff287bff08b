#!/bin/sh
# Speedrun: photos with boxes in; a model from scratch, its scores and its pictures out. From the repository's root:
#
#   infra/speedrun.sh ROOT                   # one GPU; or: make speedrun ROOT=...
#   infra/speedrun.sh ROOT speedrun-128      # the same at 128 px
#   infra/speedrun.sh ROOT speedrun-cpu      # a rehearsal, on two cores
#
# ROOT/images holds the photos, ROOT itself their box files. Writes params.yaml from the profile, runs the stages in turn,
# by DVC where it is installed, and writes the seconds of each to reports/speedrun.txt. Python: the first on PATH.
# A run that was cut resumes where it was, and adds its seconds to those of before.
set -eu

root=${1:?name the folder of photos and boxes: infra/speedrun.sh ROOT [PROFILE]}
before=$(cat params.yaml 2> /dev/null || :)
python -m pipelines profile "${2:-speedrun}" --root "$root"
python -m pipelines check
mkdir -p reports
times=reports/speedrun.txt
if [ "$before" != "$(cat params.yaml)" ] || grep -qs '^total' $times; then : > $times; fi

# stage NAME [OPTION ENTRY]: OPTION and ENTRY name a variant or a baseline
stage() {
    since=$(date +%s)
    if python -c 'import dvc' 2> /dev/null; then
        python -m dvc repro -s "$1${3:+@$3}"
    else
        python -m pipelines "$1" ${2:+"$2" "$3"}
    fi
    printf '%-22s %5d s\n' "$1${3:+@$3}" $(($(date +%s) - since)) >> $times
}

for name in ingest filter materialize encode; do stage $name; done
for variant in full untrained; do stage train --variant $variant; done
stage bench
for variant in full untrained; do stage edit --variant $variant; done
for baseline in hole_kept copy_paste poisson; do stage baseline --baseline $baseline; done
for name in evaluate sweep study report; do stage $name; done
python -m pipelines summary
# a stage that was cut has several lines
awk '{ if (!($1 in sum)) order[++n] = $1; sum[$1] += $2; total += $2 }
     END { for (i = 1; i <= n; i++) printf "%-22s %5d s\n", order[i], sum[order[i]]; printf "%-22s %5d s\n", "total", total }' \
    $times > $times.new
mv $times.new $times
cat $times
