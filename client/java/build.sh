#!/bin/sh
# Generates the stubs, and compiles them with the client and its example: build.sh FOLDER [ARGUMENT-OF-JAVAC]...
#
# With the result, `java @FOLDER/arguments Chat` runs the example. More stubs in FOLDER/gen are compiled too.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
mkdir -p "$1/gen" "$1/classes"
folder=$(cd "$1" && pwd)
shift

protoc -I "$root/protos" --java_out="$folder/gen" --grpc-java_out="$folder/gen" \
  --plugin=protoc-gen-grpc-java=/usr/bin/grpc_java_plugin "$root"/protos/deltawire/v1/*.proto
protoc --descriptor_set_in="$root/client/deltawire/v1/descriptors.binpb" --java_out="$folder/gen" \
  google/rpc/status.proto google/rpc/error_details.proto

# Debian's netty has TLS only with this library, and expects it under another name.
mkdir -p "$folder/classes/META-INF/native"
cp /usr/lib/*/jni/libnetty-tcnative.so "$folder/classes/META-INF/native/libnetty_tcnative.so"

printf -- '-cp "%s:%s"\n' "$folder/classes" "$(paste -sd: "$here/debian-jars")" >"$folder/arguments"
find "$folder/gen" "$here" -name '*.java' -printf '"%p"\n' >"$folder/sources"
# The second of Java's own compilers would take longer than it saves.
javac -J-XX:TieredStopAtLevel=1 -encoding UTF-8 "@$folder/arguments" -d "$folder/classes" "$@" "@$folder/sources"
