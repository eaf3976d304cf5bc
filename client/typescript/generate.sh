# Generates the API's messages, and those in the details of errors, into src/gen. It needs protoc, and the protos of a clone.
set -eu
cd "$(dirname "$0")"
protos=../../protos
descriptors=../deltawire/v1/descriptors.binpb
mkdir -p src/gen
generate() {
  protoc --plugin=node_modules/.bin/protoc-gen-es --es_out=src/gen --es_opt=target=ts,import_extension=js "$@"
}
generate -I "$protos" "$protos"/deltawire/v1/*.proto
generate --descriptor_set_in="$descriptors" google/rpc/error_details.proto
