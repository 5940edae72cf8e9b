#!/usr/bin/env bash
# Where a running fastvpn spends its CPU time, kernel included: a flame graph
# if inferno is installed, and tables by thread, by direction and by function.
#
#   tuning/profile.sh [--pid PID] [--seconds N] [--out DIR]
#
#   --pid PID      which process             (default: the one fastvpn there is)
#   --seconds N    how long, 1 to 300        (default: 10)
#   --out DIR      where the results go      (default: fastvpn-profile-PID)
#   --call-graph M fp, dwarf or lbr          (default: fp; dwarf also finds the
#                  way through fastvpn's own functions, at more cost)
#
# Needs perf (package linux-perf) and root or kernel.perf_event_paranoid <= 1.
# A flame graph needs inferno (cargo install inferno); nothing is downloaded.
set -euo pipefail

pid="" seconds=10 out="" call_graph=fp
# Samples per second and CPU: enough for a share of a percent in ten seconds,
# and no multiple of the timer's rate, which it would beat with.
readonly SAMPLES_PER_SECOND=997

usage() {
    [ $# -eq 0 ] || printf 'profile.sh: %s\n' "$*" >&2
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
}

fail() {
    printf 'profile.sh: %s\n' "$*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case "$1" in
        --pid | --seconds | --out | --call-graph)
            [ $# -ge 2 ] || usage "$1 takes a value"
            case "$1" in
                --pid) pid=$2 ;;
                --seconds) seconds=$2 ;;
                --out) out=$2 ;;
                --call-graph) call_graph=$2 ;;
            esac
            shift
            ;;
        -h | --help) usage ;;
        *) usage "what is $1?" ;;
    esac
    shift
done
if ! [[ "$seconds" =~ ^[0-9]{1,3}$ ]] || [ "$seconds" -lt 1 ] || [ "$seconds" -gt 300 ]; then
    usage "--seconds takes 1 to 300"
fi
[[ "$call_graph" =~ ^(fp|dwarf|lbr)$ ]] || usage "--call-graph takes fp, dwarf or lbr"

command_line() { tr '\0' ' ' <"/proc/$1/cmdline"; }

# The one process called fastvpn; both ends of a tunnel may run on one machine,
# and their command lines tell which is which.
if [ -z "$pid" ]; then
    mapfile -t found < <(pgrep -x fastvpn || true)
    case ${#found[@]} in
        0) fail "no fastvpn is running" ;;
        1) pid=${found[0]} ;;
        *)
            for one in "${found[@]}"; do
                printf '  --pid %s   %s\n' "$one" "$(command_line "$one")" >&2
            done
            fail "more than one fastvpn is running: choose one of these"
            ;;
    esac
fi
[[ "$pid" =~ ^[0-9]+$ && -r "/proc/$pid/cmdline" ]] || fail "no process $pid"
command -v perf >/dev/null || fail "no perf here: install the package linux-perf"

# Hardware counters are often missing in virtual machines.
event=cycles
note="hardware cycles"
if perf stat -x, -e cycles true 2>&1 | grep -q 'not supported'; then
    event=cpu-clock
    note="a timer: this machine shows no hardware cycles, so that what runs with interrupts off is counted where they come on again"
fi

[ -n "$out" ] || out="fastvpn-profile-$pid"
mkdir -p "$out"
data="$out/perf.data"
echo "profiling $pid, $(command_line "$pid")"
echo "for $seconds s by $note"
if ! perf record --quiet -e "$event" -F "$SAMPLES_PER_SECOND" --call-graph "$call_graph" \
    -p "$pid" -o "$data" -- sleep "$seconds" 2>"$out/perf.log"; then
    cat "$out/perf.log" >&2
    fail "perf record failed: root, or kernel.perf_event_paranoid <= 1, is needed"
fi

# One line per sample: thread, then the stack, innermost function first.
perf script -i "$data" -F comm,ip,sym 2>/dev/null | awk '
    /^[^ \t]/ { thread = $1; stack = ""; next }
    NF == 0   { if (thread != "") print thread stack; thread = ""; next }
              { $1 = ""; sub(/^ +/, ""); gsub(/ /, "_"); stack = stack " " $0 }
    END       { if (thread != "") print thread stack }
' >"$out/stacks.txt"
samples=$(wc -l <"$out/stacks.txt")
[ "$samples" -gt 0 ] || fail "no samples: the process used no CPU time in $seconds s"

# share TITLE: turns lines on standard input into a table of shares.
share() {
    printf '\n%s\n' "$1"
    sort | uniq -c | sort -rn | head -n "${2:-20}" |
        awk -v all="$samples" '{ n = $1; $1 = ""; printf "%6.1f %% %s\n", 100 * n / all, $0 }'
}

{
    echo "$samples samples of $pid, $note"
    cut -d ' ' -f 1 "$out/stacks.txt" | share "By thread (fastvpn-N is worker N)"

    # What the kernel does for one direction is below one of these calls; the
    # outermost counts, since a send may deliver on the same CPU what another
    # socket receives.
    awk '{
        way = "the loop: fastvpn itself, waiting, the rest of the kernel"
        for (i = NF; i > 1; i--) {
            if ($i ~ /^tun_chr_read_iter/)                { way = "outbound: read from the TUN"; break }
            if ($i ~ /^udp(v6)?_sendmsg/)                 { way = "outbound: send, and deliver on the same CPU"; break }
            if ($i ~ /^udp(v6)?_recvmsg/)                 { way = "inbound: receive"; break }
            if ($i ~ /^tun_chr_write_iter/)               { way = "inbound: write to the TUN, and deliver"; break }
            if ($i ~ /outbound/ || $i ~ /segment/)        { way = "outbound: segment, append to batches"; break }
            if ($i ~ /inbound/ || $i ~ /[Cc]oalesce/)     { way = "inbound: verify, coalesce"; break }
        }
        print $1, way
    }' "$out/stacks.txt" | share "By thread and direction"

    awk '{ print $2 }' "$out/stacks.txt" | share "By function (where the time itself goes)" 30
} | tee "$out/tables.txt"

echo
if command -v inferno-collapse-perf >/dev/null && command -v inferno-flamegraph >/dev/null; then
    perf script -i "$data" 2>/dev/null | inferno-collapse-perf 2>/dev/null |
        inferno-flamegraph --title "fastvpn $pid, $seconds s" >"$out/flame.svg"
    echo "flame graph: $out/flame.svg"
else
    echo "no flame graph: inferno is not installed (cargo install inferno)"
fi
echo "tables: $out/tables.txt; for more: perf report -i $data"
