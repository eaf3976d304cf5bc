#!/bin/sh
# Generates the stubs of the Ruby client and of its conformance program into the given folder, with Debian 12's packages.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../../../..
for program in ruby protoc grpc_ruby_plugin; do
  command -v "$program" >/dev/null || {
    echo "$program is missing: \`make polyglot-packages\` names what to install" >&2
    exit 1
  }
done

mkdir -p "$1"
protoc -I "$root/protos" -I "$here/../.." --ruby_out="$1" --grpc_out="$1" \
  --plugin=protoc-gen-grpc="$(command -v grpc_ruby_plugin)" "$root"/protos/deltawire/v1/*.proto "$here/../../conformance.proto"
