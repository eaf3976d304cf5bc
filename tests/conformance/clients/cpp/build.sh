#!/usr/bin/env bash
# Builds the C++ client and its conformance program into the given folder, with Debian 12's packages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../../.." && pwd)

for program in g++ make protoc grpc_cpp_plugin pkg-config; do
  command -v "$program" >/dev/null || { echo "$program is missing: \`make polyglot-packages\` names what to install" >&2; exit 1; }
done

# The stubs take a minute to compile: builds share their objects, one build at a time.
library=$root/.cache/cpp
mkdir -p "$1" "$library"
exec 9>"$library/lock"
flock 9
make -s -C "$root/client/cpp" BUILD="$library" CXXFLAGS="-O0 -Werror" >&2
cp "$library/chat" "$1/"
protoc -I "$root/protos" -I "$here/../.." --cpp_out="$1" "$here/../../conformance.proto"
g++ -std=c++17 -O0 -Wall -Wextra -Werror -I "$1" -I "$root/client/cpp" -I "$library/gen" "$here/main.cc" "$1/conformance.pb.cc" \
  "$library/libdeltawire.a" $(pkg-config --libs grpc++ protobuf) -o "$1/program"
