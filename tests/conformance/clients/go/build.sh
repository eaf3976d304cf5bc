#!/usr/bin/env bash
# Builds the Go client and its conformance program into the given folder, with Debian 12's packages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../../.." && pwd)

for program in go protoc protoc-gen-go protoc-gen-go-grpc; do
  command -v "$program" >/dev/null || { echo "$program is missing: \`make polyglot-packages\` names what to install" >&2; exit 1; }
done

mkdir -p "$1/src/deltawire.dev" && cd "$1"
cp -r "$root/client/go" src/deltawire.dev/
mkdir -p src/deltawire.dev/go/conformance/program
cp "$here/main.go" src/deltawire.dev/go/conformance/program/
protoc -I "$root/protos" -I "$here/../.." --go_out=src --go-grpc_out=src "$root"/protos/deltawire/v1/*.proto \
  "$here/../../conformance.proto"
# The cache, which builds share, holds gRPC and what it needs.
export GO111MODULE=off GOPATH="$PWD:/usr/share/gocode" GOCACHE="$root/.cache/go"
go vet -tags grpc133 deltawire.dev/go deltawire.dev/go/chat deltawire.dev/go/conformance/program
go build -tags grpc133 -o program deltawire.dev/go/conformance/program
go build -tags grpc133 -o chat deltawire.dev/go/chat
