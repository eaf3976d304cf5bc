#!/bin/sh
# Builds the conformance program of the Java client into the given folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../../../..
mkdir -p "$1/gen"
protoc -I "$root/protos" -I "$here/../.." --java_out="$1/gen" "$here/../../conformance.proto"
"$root/client/java/build.sh" "$1" -Xlint:all -Werror "$here/Conformance.java"
