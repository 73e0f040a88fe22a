#!/usr/bin/env bash
# A SLURM cluster of this one machine, for tests: `slurm.sh start FOLDER`, then commands with SLURM_CONF=FOLDER/slurm.conf, then `slurm.sh stop FOLDER`.
# Everything it writes is in FOLDER. Needs Debian's packages slurm-wlm and munge, and root.
set -euo pipefail
folder=$2
export PATH=$PATH:/usr/sbin SLURM_CONF=$folder/slurm.conf

start() {
  mkdir -p "$folder"/{state,spool}
  (umask 077; head -c 1024 /dev/urandom > "$folder/munge.key")
  cat > "$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# kernels have sessions of their own, so processes are found by their parents
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
ReturnToService=2
KillWait=5
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
END
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
  slurmctld
  slurmd
  for _ in $(seq 100); do sinfo -h -o %T 2> /dev/null | grep -q idle && return; sleep .2; done
  tail -n 5 "$folder"/*.log >&2
  return 1
}

stop() { for daemon in slurmd slurmctld munged; do if [ -s "$folder/$daemon.pid" ]; then kill "$(cat "$folder/$daemon.pid")" || true; fi; done; }

"$1"
