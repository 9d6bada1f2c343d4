#!/usr/bin/env bash
# A private Slurm of several nodes on one machine, with accounting, without systemd: bash tests/slurm/cluster.sh COMMAND
#   install          Debian's packages of slurmctld, slurmd, slurmdbd, munge and MariaDB; as root
#   start | stop     everything it needs lies under $CLUSTER_ROOT; `stop` leaves no process
#   shell            start, open a shell that knows it, stop when the shell ends (`make cluster`)
#   crash NODE       what a dead machine looks like: its slurmd and all tasks on it are gone at once
#   mute NODE        what a machine behind a broken network looks like: slurmd is gone, its tasks live
#   revive NODE      its slurmd again
#   kick JOB         a requeued job need not wait for its turn
#   env              the line that a shell needs to know it
# Nodes n1, n2, … are slurmds on ports of their own; their GPUs are twins of /dev/null.
set -euo pipefail
root=${CLUSTER_ROOT:-/tmp/pixart-cluster} # short: the paths of sockets have at most 107 characters
nodes=${CLUSTER_NODES:-8}
gpus=${CLUSTER_GPUS:-8}
cpus=${CLUSTER_CPUS:-64}    # claimed, as is the memory
port=${CLUSTER_PORT:-16800} # of slurmctld; the next ones are slurmdbd's and MariaDB's, those from 11 on the slurmds'
grace=${CLUSTER_GRACE:-30}  # seconds that preemption leaves
host=$(hostname -s)
export SLURM_CONF=$root/etc/slurm.conf
packages="slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core mariadb-client-core"

install() {
  # shellcheck disable=SC2086
  if dpkg-query -W $packages >/dev/null 2>&1; then return 0; fi
  [ "$(id -u)" = 0 ] || { echo "root is needed to install: $packages" >&2 && return 3; }
  export DEBIAN_FRONTEND=noninteractive
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e $policy ]; then # no service is to start by itself
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=yes
  fi
  apt-get -o DPkg::Lock::Timeout=300 -qq update
  # shellcheck disable=SC2086
  apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends $packages >/dev/null
  [ -z "$made" ] || rm $policy
}

wait_for() { # SECONDS WHAT COMMAND…
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= end)); then echo "cluster: no $what; its logs: $root/log" >&2 && return 1; fi
    sleep 0.1
  done
}

# Where process 1 reaps orphans late, a zombie counts as gone.
gone() { ! grep -qs '^State:[[:space:]][^ZX]' "/proc/$1/status"; }
alive() { [ -f "$1" ] && ! gone "$(cat "$1")"; }

configure() {
  mkdir -p "$root"/{etc,run,log,state,spool,dev,munge}
  chmod 755 "$root" "$root"/{etc,run,log,spool,dev,munge}
  for ((i = 0; i < gpus; i++)); do # gres.conf wants character devices
    [ -e "$root/dev/nvidia$i" ] || mknod -m 666 "$root/dev/nvidia$i" c 1 3
  done
  [ -f "$root/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$root/munge/key")
  cat >"$root/etc/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits as long as a credential lives: 5 s is the least, 120 the default
AuthInfo=socket=$root/munge/sock,cred_expire=5
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
MpiDefault=none
# no cgroups are needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
# nodes claim more than the machine has
SlurmdParameters=config_overrides
SlurmctldParameters=${CLUSTER_PARAMETERS-preempt_send_user_signal}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
# the connection to slurmdbd takes its munge socket from here
AccountingStoragePass=$root/munge/sock
AccountingStorageTRES=gres/gpu,gres/gpu:v100
AccountingStoreFlags=job_script,job_env,job_comment
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# what a loaded machine needs to save: only what ignores a signal waits it out
KillWait=20

# short, so that tests are quick
SlurmdTimeout=15
ReturnToService=2
CompleteWait=0
InactiveLimit=0
UnkillableStepTimeout=30
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
PriorityType=priority/multifactor
PriorityWeightPartition=1000
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 11))-$((port + 10 + nodes))] Boards=1 SocketsPerBoard=2 CoresPerSocket=$((cpus / 2)) ThreadsPerCore=1 RealMemory=384000 Gres=gpu:v100:$gpus Feature=v100-32g State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace DefMemPerCPU=1000 MaxTime=7-0
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF DefMemPerCPU=1000 MaxTime=INFINITE
END
  local devices=nvidia0
  if ((gpus > 1)); then devices="nvidia[0-$((gpus - 1))]"; fi
  echo "NodeName=n[1-$nodes] Name=gpu Type=v100 File=$root/dev/$devices" >"$root/etc/gres.conf"
  cat >"$root/etc/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$root/munge/sock
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
PidFile=$root/run/slurmdbd.pid
LogFile=$root/log/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=root
StorageLoc=slurm_acct
END
  chmod 600 "$root/etc/slurmdbd.conf"
  # ranks meet at a node's name
  grep -q "# $root\$" /etc/hosts || echo "127.0.0.1 $(seq -s' ' -f 'n%g' "$nodes") # $root" >>/etc/hosts
}

start() {
  configure
  alive "$root/run/munged.pid" || munged --socket="$root/munge/sock" --key-file="$root/munge/key" \
    --log-file="$root/log/munged.log" --pid-file="$root/run/munged.pid" --seed-file="$root/munge/seed" --num-threads=10
  [ -d "$root/db" ] || mariadb-install-db --no-defaults --datadir="$root/db" --user=root --innodb-log-file-size=8M \
    --auth-root-authentication-method=normal --skip-test-db >"$root/log/install-db.log" 2>&1
  if ! alive "$root/run/mariadb.pid"; then
    mariadbd --no-defaults --user=root --datadir="$root/db" --socket="$root/run/mariadb.sock" \
      --pid-file="$root/run/mariadb.pid" --bind-address=127.0.0.1 --port=$((port + 2)) --skip-name-resolve --skip-log-bin \
      --log-error="$root/log/mariadb.log" --innodb-log-file-size=8M --innodb-buffer-pool-size=64M \
      --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 </dev/null >/dev/null 2>&1 &
    disown
    wait_for 60 mariadbd bash -c "exec 3<>/dev/tcp/127.0.0.1/$((port + 2))"
  fi
  alive "$root/run/slurmdbd.pid" || slurmdbd
  wait_for 60 slurmdbd sacctmgr -n show cluster
  alive "$root/run/slurmctld.pid" || slurmctld
  wait_for 60 slurmctld scontrol ping
  for ((i = 1; i <= nodes; i++)); do alive "$root/run/slurmd.n$i.pid" || slurmd -N "n$i"; done
  wait_for 60 "$nodes nodes" bash -c "[ \$(sinfo -hN -p gpu -t idle,alloc,mix | wc -l) = $nodes ]"
}

quit() { # PIDFILE…: asks all to end, and waits until they have
  local file process processes=""
  for file in "$@"; do
    [ -f "$file" ] || continue
    process=$(cat "$file")
    kill "$process" 2>/dev/null && processes+=" $process"
  done
  for process in $processes; do
    for _ in $(seq 200); do gone "$process" && break || sleep 0.05; done
    gone "$process" || kill -9 "$process" 2>/dev/null || true
  done
  rm -f "$@"
}

ours() { # processes of this cluster's jobs, one a line; with an argument only those of that node
  local process
  for process in $(grep -lszx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | cut -d/ -f3); do
    if [ "$(cat "/proc/$process/comm" 2>/dev/null)" = slurmstepd ] || grep -qsz '^SLURM_JOB_ID=' "/proc/$process/environ"; then
      if [ -z "${1:-}" ] || grep -qszx "SLURMD_NODENAME=$1" "/proc/$process/environ"; then echo "$process"; fi
    fi
  done
}

stop() {
  scancel -Q -u root 2>/dev/null || true
  for _ in $(seq 100); do [ -n "$(squeue -h -t R,CG,S 2>/dev/null)" ] && sleep 0.1 || break; done
  quit "$root"/run/slurmd.*.pid
  # tasks that outlived their node, and stepds, which try to deliver their last message for minutes
  for process in $(ours); do kill -9 "$process" 2>/dev/null || true; done
  quit "$root/run/slurmctld.pid"
  quit "$root/run/slurmdbd.pid"
  quit "$root/run/mariadb.pid" "$root/run/munged.pid"
  local hosts
  hosts=$(grep -v "# $root\$" /etc/hosts) && echo "$hosts" >/etc/hosts
}

crash() {
  local node=$1 daemons
  daemons=$(cat "$root/run/slurmd.$node.pid")
  daemons+=" $(ss -xlpH 2>/dev/null | grep -F "$root/spool/$node/" | grep -o 'pid=[0-9]*' | cut -d= -f2 | sort -u | tr '\n' ' ')"
  # A dead machine's processes end in one moment; killed one by one, some would react: an srun has a child that kills the step if the
  # srun is gone. So all stop first, and children end before their parents: the kernel wakes a stopped one that becomes an orphan.
  # shellcheck disable=SC2046,SC2086
  kill -STOP $daemons $(ours "$node") 2>/dev/null || true
  # shellcheck disable=SC2046,SC2086
  kill -9 $(ps -o pid= --sort=-start_time,-pid -p "$(echo $daemons $(ours "$node") | tr ' ' ,)") 2>/dev/null || true
}
mute() { kill -9 "$(cat "$root/run/slurmd.$1.pid")"; }
revive() { slurmd -N "$1"; }
# Not within the second of the requeue: slurmd would answer «Job credential revoked», and the job would end FAILED (1:0).
kick() {
  sleep 1.2
  scontrol update JobId="$1" StartTime=now || [ "$(squeue -h -t all -j "$1" -o %T)" != PENDING ] # it has begun by itself
}

shell() {
  install && start
  trap stop EXIT
  echo "a Slurm of $nodes nodes with $gpus GPUs each, none of them real: sinfo, squeue, sbatch; it ends with this shell" >&2
  echo "  pixart-ds launch stage1 --run RUN --profile test-cluster      bash tests/slurm/cluster.sh crash n2" >&2
  "${SHELL:-/bin/bash}" || true
}

case ${1:-} in
  install | start | stop | shell) "$1" ;;
  crash | mute | revive | kick) "$@" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  *) sed -n '2,11s/^# //p' "$0" >&2 && exit 2 ;;
esac
