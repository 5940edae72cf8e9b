#!/usr/bin/env bash
# The long tier of the tests: soak, stress, and what needs more than Rust and a
# C compiler. Installs what it lacks, so run it as root. `cargo test` is the
# other tier; what it runs is not run again here.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A packages=(
    [nft]=nftables [ip]=iproute2 [ping]=iputils-ping [curl]=curl [socat]=socat [python3]=python3
    [wireguard-go]=wireguard-go [systemctl]=systemd
)
# The largest by far, for which .ci/run has no time either: its trials say so there.
[ -n "${WITHOUT_PROGRAMS:-}" ] || packages[tshark]=tshark
missing=()
for tool in "${!packages[@]}"; do
    command -v "$tool" >/dev/null || missing+=("${packages[$tool]}")
done
if [ "${#missing[@]}" -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi

# Minutes of compiling, which .ci/run has no time for: trials that need them say so there.
[ -n "${WITHOUT_PROGRAMS:-}" ] || tests/programs.sh

cargo test --locked --lib -- --ignored
cargo test --locked --test e2e -- --ignored
tests/kernels/run
