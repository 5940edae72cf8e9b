#!/usr/bin/env bash
# Host settings that matter to a tunnel: show them, apply them, and put back
# exactly what was there before.
#
#   tuning/host.sh show                    what is set, what would be, and why
#   tuning/host.sh apply --dev eth0        apply; former values are kept
#   tuning/host.sh revert                  put the former values back
#
#   --dev NIC      the underlay's interface    (default: that of the default route)
#   --tun NAME     the tunnel's interface      (default: fastvpn0)
#   --only LIST    these groups only, as in --only buffers,backlog
#   --with LIST    these groups as well: rps, rfs and busy-poll are not applied
#                  unless they are named, for they can cost more than they bring
#   --dry-run      say what would be written, write nothing
#   --state FILE   where former values are kept (default: /run/fastvpn/host.state)
#
# Values are raised, never lowered. What this host does not have is skipped
# with a word. The state is below /run, since a reboot undoes the settings too.
# Exit status: 0 done, 1 something could not be written, 2 wrong usage.
set -euo pipefail

readonly GROUPS_DEFAULT="buffers backlog budget txqueuelen queues irq xps"
readonly GROUPS_ON_REQUEST="rps rfs busy-poll"

# Wanted values. The socket buffers are those that fastvpn asks for
# (SOCKET_BUFFER_BYTES in src/io/udp.rs).
readonly SOCKET_BUFFER_BYTES=8388608
readonly BACKLOG_PACKETS=4096
readonly BUDGET_PACKETS=600
readonly BUDGET_USECS=8000
readonly TXQUEUELEN_PACKETS=1000
readonly RFS_FLOWS=32768
readonly BUSY_POLL_USECS=50

action="" nic="" tun="fastvpn0" only="" with="" dry_run=false
state_file="/run/fastvpn/host.state"
failures=0

# Why a group is there, and what it was measured to bring.
explain() {
    case "$1" in
        buffers) echo "limits of socket buffers, for a fastvpn without CAP_NET_ADMIN in the initial user namespace (with it, fastvpn goes beyond them). Effect: unmeasured." ;;
        backlog) echo "packets that may wait for a CPU where RPS or a veth put them; too few are lost in /proc/net/softnet_stat, second column. Effect: unmeasured." ;;
        budget) echo "work that one round of receive processing may do before it yields; cut short, it counts in softnet_stat, third column. Effect: unmeasured." ;;
        txqueuelen) echo "packets that may wait to be sent; some virtual NICs come with fewer than Ethernet's 1000. Effect: unmeasured." ;;
        queues) echo "one NIC queue per CPU, so that the datagrams of several workers, which differ in source port, are received on several CPUs. Effect: unmeasured." ;;
        irq) echo "one CPU for the interrupts of each NIC queue, in turn, rather than all on one. Effect: unmeasured." ;;
        xps) echo "the NIC's transmit queues shared out to CPUs, so that two do not wait for one queue's lock. Effect: unmeasured." ;;
        rps) echo "receive processing on all CPUs, for a NIC with fewer queues than CPUs; costs an interrupt between CPUs per batch. Effect: TCP at 0.94 (one stream; 0.82 to 1.02) and 0.84 (four; 0.78 to 0.98) of the rate without, over veth on one machine with two cores, all of them busy, five alternating pairs; with idle cores and a NIC: unmeasured." ;;
        rfs) echo "with RPS: receive processing on the CPU where the worker runs that reads the socket. Effect: unmeasured." ;;
        busy-poll) echo "asks the NIC for packets before sleeping: CPU time for latency. Sockets opened before do not change. Effect: unmeasured." ;;
    esac
}

usage() {
    [ $# -eq 0 ] || printf 'host.sh: %s\n' "$*" >&2
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
}

skip() { printf '  skipped: %s\n' "$*"; }

# --- One setting: read, write, remember --------------------------------------
#
# A setting is named by a path below /proc or /sys, or `channels:NIC` for the
# number of NIC queues. In the state file a line is: name, tab, owner, tab,
# former value. The owner is the interface's index, so that a NIC of the same
# name that came later is left alone; `-` if no interface has part in it.

read_setting() {
    case "$1" in
        channels:*) channels_now "${1#channels:}" ;;
        *) cat "$1" 2>/dev/null ;;
    esac
}

write_setting() {
    case "$1" in
        channels:*) ethtool -L "${1#channels:}" combined "$2" ;;
        # The shell itself would report a failed write in words of its own.
        *) printf '%s\n' "$2" 2>/dev/null >"$1" ;;
    esac
} 2>/dev/null

owner_of() {
    local dev=""
    case "$1" in
        channels:*) dev=${1#channels:} ;;
        /sys/class/net/*) dev=${1#/sys/class/net/} dev=${dev%%/*} ;;
    esac
    if [ -n "$dev" ]; then
        cat "/sys/class/net/$dev/ifindex" 2>/dev/null || echo gone
    else
        echo -
    fi
}

is_saved() { [ -f "$state_file" ] && cut -f1 "$state_file" | grep -qxF -- "$1"; }

# Keeps the value of a setting, unless an older one is kept already.
save() {
    is_saved "$1" && return
    printf '%s\t%s\t%s\n' "$1" "$(owner_of "$1")" "$2" >>"$state_file"
}

forget() {
    local rest
    rest=$(awk -F '\t' -v name="$1" '$1 != name' "$state_file")
    printf '%s' "${rest:+$rest$'\n'}" >"$state_file.new"
    mv "$state_file.new" "$state_file"
}

# Masks are read as `00000003` or `0,0003` and mean the same as `3`.
same_value() {
    [ "$1" = "$2" ] || { [[ "$1$2" =~ ^[0-9a-f,]+$ ]] && [ "$(plain_mask "$1")" = "$(plain_mask "$2")" ]; }
}

plain_mask() { printf '%s' "${1//,/}" | sed 's/^0*//'; }

# setting NAME WANTED: shows it, or sets it and keeps what was there.
setting() {
    local name=$1 wanted=$2 now
    if ! now=$(read_setting "$name") || [ -z "$now" ]; then
        skip "$name: not on this host"
    elif same_value "$now" "$wanted"; then
        printf '  %s = %s\n' "$name" "$now"
    elif [ "$action" = show ] || $dry_run; then
        printf '  %s = %s, would be %s\n' "$name" "$now" "$wanted"
    elif [[ "$name" == /* && ! -w "$name" ]] || [[ "$(stat -c %A -- "$name" 2>/dev/null)" == -r--r--r-- ]]; then
        skip "$name: read-only here (set it in the initial network namespace)"
    else
        local had=false
        is_saved "$name" && had=true
        save "$name" "$now"
        if write_setting "$name" "$wanted"; then
            printf '  %s = %s, was %s\n' "$name" "$wanted" "$now"
        else
            $had || forget "$name"
            printf '  FAILED: %s takes no %s; it stays %s\n' "$name" "$wanted" "$now"
            failures=$((failures + 1))
        fi
    fi
}

# at_least NAME WANTED: the same for a number, which is raised, never lowered.
at_least() {
    local now
    now=$(read_setting "$1") || now=""
    if [[ "$now" =~ ^[0-9]+$ ]] && [ "$now" -ge "$2" ]; then
        printf '  %s = %s\n' "$1" "$now"
    else
        setting "$1" "$2"
    fi
}

# --- CPUs and NIC queues ------------------------------------------------------

cpu_count() { getconf _NPROCESSORS_ONLN; }

# Mask with the bits of the CPUs given, in groups of 32 as the kernel writes it.
cpu_mask() {
    local cpu group highest=0
    local -a words=(0)
    for cpu in "$@"; do
        group=$((cpu / 32))
        while [ "$highest" -lt "$group" ]; do
            highest=$((highest + 1))
            words[highest]=0
        done
        words[group]=$((words[group] | 1 << (cpu % 32)))
    done
    local mask
    mask=$(printf '%x' "${words[highest]}")
    for ((group = highest - 1; group >= 0; group--)); do
        mask+=$(printf ',%08x' "${words[group]}")
    done
    echo "$mask"
}

online_cpus() {
    local part
    local -a parts
    IFS=, read -r -a parts </sys/devices/system/cpu/online
    for part in "${parts[@]}"; do seq "${part%-*}" "${part#*-}"; done
}

count_queues() { find "/sys/class/net/$nic/queues" -maxdepth 1 -name "$1-*" 2>/dev/null | wc -l; }

# `ethtool -l`: the line "Combined:" of the maximums, then that of now.
channels_max() { ethtool -l "$1" 2>/dev/null | awk '/^Combined:/ {print $2; exit}'; }
channels_now() { ethtool -l "$1" 2>/dev/null | awk '/^Combined:/ {n = $2} END {print n}'; }

# --- The groups ---------------------------------------------------------------

group_buffers() {
    at_least /proc/sys/net/core/rmem_max "$SOCKET_BUFFER_BYTES"
    at_least /proc/sys/net/core/wmem_max "$SOCKET_BUFFER_BYTES"
    # The defaults stay: fastvpn asks for what it needs, and they hold for
    # every other socket of the host.
}

group_backlog() { at_least /proc/sys/net/core/netdev_max_backlog "$BACKLOG_PACKETS"; }

group_budget() {
    at_least /proc/sys/net/core/netdev_budget "$BUDGET_PACKETS"
    at_least /proc/sys/net/core/netdev_budget_usecs "$BUDGET_USECS"
}

group_txqueuelen() {
    local dev
    for dev in "$tun" "$nic"; do
        at_least "/sys/class/net/$dev/tx_queue_len" "$TXQUEUELEN_PACKETS"
    done
}

group_queues() {
    local max wanted
    if ! command -v ethtool >/dev/null; then
        skip "number of NIC queues: no ethtool here (package ethtool)"
        return
    fi
    max=$(channels_max "$nic") || max=""
    if ! [[ "$max" =~ ^[0-9]+$ ]]; then
        skip "number of NIC queues: $nic has no combined channels to set"
        return
    fi
    wanted=$(cpu_count)
    [ "$wanted" -le "$max" ] || wanted=$max
    # A driver may lay out its queues anew and set their CPUs as it likes:
    # what they are now has to be kept before.
    if [ "$action" = apply ] && ! $dry_run && [ "$(channels_now "$nic")" -lt "$wanted" ]; then
        save_queue_settings
    fi
    at_least "channels:$nic" "$wanted"
}

save_queue_settings() {
    local path value
    for path in $(queue_files xps_cpus) $(queue_files rps_cpus) $(queue_files rps_flow_cnt); do
        value=$(cat "$path" 2>/dev/null) || value=""
        [ -z "$value" ] || save "$path" "$value"
    done
}

queue_files() { find "/sys/class/net/$nic/queues" -name "$1" 2>/dev/null | sort -V; }

group_irq() {
    local irq queue index=0
    local -a cpus irqs
    mapfile -t cpus < <(online_cpus)
    mapfile -t irqs < <(nic_irqs)
    if [ "$(count_queues rx)" -lt 2 ] || [ "${#irqs[@]}" -lt 2 ]; then
        skip "interrupts: $nic has one receive queue, or no interrupts of its own"
        return
    fi
    if pidof irqbalance >/dev/null 2>&1; then
        skip "interrupts: irqbalance runs and would move them again"
        return
    fi
    for irq in "${irqs[@]}"; do
        queue=$(irq_queue "$irq")
        setting "/proc/irq/$irq/smp_affinity_list" "${cpus[${queue:-$index} % ${#cpus[@]}]}"
        index=$((index + 1))
    done
}

# The interrupts of the NIC's queues: MSI vectors of the device, or of the bus
# device below a virtio one; those that are in use stand in /proc/interrupts.
nic_irqs() {
    local dir irq
    for dir in "/sys/class/net/$nic/device/msi_irqs" "/sys/class/net/$nic/device/../msi_irqs"; do
        [ -d "$dir" ] || continue
        for irq in $(find "$dir/" -mindepth 1 -printf '%f\n' | sort -n); do
            # Not those for configuration changes.
            if grep -E "^ *$irq:" /proc/interrupts | grep -qvE 'config|control'; then
                echo "$irq"
            fi
        done
        return
    done
}

# The queue that an interrupt is for, as drivers write it at the end of its
# name (`virtio2-input.1`, `eth0-TxRx-3`); nothing if there is none. Both
# directions of a queue belong on one CPU.
irq_queue() {
    sed -nE "s/^ *$1:.*(input|output|rx|tx|comp|queue)[-.]?([0-9]+)([@:].*)?\$/\2/Ip" /proc/interrupts
}

group_xps() {
    local queues queue cpu
    local -a cpus mine
    mapfile -t cpus < <(online_cpus)
    queues=$(count_queues tx)
    if [ "$queues" -lt 2 ]; then
        skip "XPS: $nic has one transmit queue"
        return
    fi
    for ((queue = 0; queue < queues; queue++)); do
        mine=()
        for ((cpu = 0; cpu < ${#cpus[@]}; cpu++)); do
            [ $((cpu % queues)) -ne "$queue" ] || mine+=("${cpus[cpu]}")
        done
        # More queues than CPUs: the last ones are left without.
        [ "${#mine[@]}" -eq 0 ] || setting "/sys/class/net/$nic/queues/tx-$queue/xps_cpus" "$(cpu_mask "${mine[@]}")"
    done
}

group_rps() {
    local file queues
    local -a cpus
    mapfile -t cpus < <(online_cpus)
    queues=$(count_queues rx)
    if [ "$queues" -ge "${#cpus[@]}" ]; then
        skip "RPS: $nic has $queues receive queues for ${#cpus[@]} CPUs, its own hash spreads"
        return
    fi
    for file in $(queue_files rps_cpus); do
        setting "$file" "$(cpu_mask "${cpus[@]}")"
    done
}

group_rfs() {
    local file queues
    queues=$(count_queues rx)
    if [ "$queues" -eq 0 ]; then
        skip "RFS: $nic has no receive queues"
        return
    fi
    at_least /proc/sys/net/core/rps_sock_flow_entries "$RFS_FLOWS"
    for file in $(queue_files rps_flow_cnt); do
        at_least "$file" $((RFS_FLOWS / queues))
    done
}

group_busy-poll() {
    at_least /proc/sys/net/core/busy_read "$BUSY_POLL_USECS"
    at_least /proc/sys/net/core/busy_poll "$BUSY_POLL_USECS"
}

# --- The actions --------------------------------------------------------------

do_groups() {
    local group
    for group in "$@"; do
        printf '%s: %s\n' "$group" "$(explain "$group")"
        "group_$group"
    done
}

network_namespace() { readlink /proc/self/ns/net; }

prepare_state() {
    mkdir -p "$(dirname "$state_file")"
    # The first line tells where the values belong.
    [ -s "$state_file" ] || printf '# %s\n' "$(network_namespace)" >"$state_file"
    check_state
}

check_state() {
    local home
    home=$(sed -n '1s/^# //p' "$state_file")
    if [ "$home" != "$(network_namespace)" ]; then
        printf 'host.sh: %s was written in another network namespace: go there, or name another --state\n' "$state_file" >&2
        exit 1
    fi
}

revert() {
    if [ ! -s "$state_file" ]; then
        echo "nothing to revert: no $state_file"
        return
    fi
    check_state
    local name owner value line now
    local -a lines
    # The number of queues first: a driver may reset what belongs to each.
    mapfile -t lines < <(grep '^channels:' "$state_file" || true; grep '^/' "$state_file" | tac || true)
    for line in "${lines[@]}"; do
        IFS=$'\t' read -r name owner value <<<"$line"
        if [ "$(owner_of "$name")" != "$owner" ]; then
            skip "$name: its interface is gone"
        elif ! now=$(read_setting "$name"); then
            skip "$name: gone"
        elif [ "$now" = "$value" ]; then
            printf '  %s = %s\n' "$name" "$value"
        elif $dry_run; then
            printf '  %s = %s, would be %s again\n' "$name" "$now" "$value"
        elif write_setting "$name" "$value"; then
            printf '  %s = %s, was %s\n' "$name" "$value" "$now"
        else
            printf '  FAILED: %s takes no %s; it stays %s\n' "$name" "$value" "$now"
            failures=$((failures + 1))
            continue
        fi
        $dry_run || forget "$name"
    done
    if ! $dry_run && ! grep -qv '^#' "$state_file"; then
        rm -f "$state_file"
    fi
}

default_nic() {
    ip route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1
}

check_groups() {
    local group
    for group in ${1//,/ }; do
        case " $GROUPS_DEFAULT $GROUPS_ON_REQUEST " in
            *" $group "*) ;;
            *) usage "no group $group; there are: $GROUPS_DEFAULT $GROUPS_ON_REQUEST" ;;
        esac
    done
}

while [ $# -gt 0 ]; do
    case "$1" in
        show | apply | revert) [ -z "$action" ] || usage "one of show, apply, revert"; action=$1 ;;
        --dry-run) dry_run=true ;;
        --dev | --tun | --only | --with | --state)
            [ $# -ge 2 ] || usage "$1 takes a value"
            case "$1" in
                --dev) nic=$2 ;;
                --tun) tun=$2 ;;
                --only) only=$2 ;;
                --with) with=$2 ;;
                --state) state_file=$2 ;;
            esac
            shift
            ;;
        -h | --help) usage ;;
        *) usage "what is $1?" ;;
    esac
    shift
done
[ -n "$action" ] || usage "one of show, apply, revert"
check_groups "$only"
check_groups "$with"
if [ "$action" != show ] && ! $dry_run && [ "$(id -u)" -ne 0 ]; then
    echo "host.sh: $action needs root (or add --dry-run)" >&2
    exit 1
fi

if [ "$action" = revert ]; then
    revert
else
    [ -n "$nic" ] || nic=$(default_nic)
    [ -n "$nic" ] || usage "which NIC? There is no default route; use --dev"
    [ -e "/sys/class/net/$nic" ] || usage "no interface $nic here"
    if [ "$action" = apply ] && ! $dry_run; then
        prepare_state
    fi
    if [ -n "$only" ]; then
        groups=$only
    elif [ "$action" = show ]; then
        groups="$GROUPS_DEFAULT $GROUPS_ON_REQUEST"
    else
        groups="$GROUPS_DEFAULT $with"
    fi
    # shellcheck disable=SC2086 # A list of words.
    do_groups ${groups//,/ }
    if [ -s "$state_file" ]; then
        echo "former values: $state_file ($0 revert)"
    fi
fi
[ "$failures" -eq 0 ] || exit 1
