#!/usr/bin/env bash
# Builds the TypeScript client and its conformance program into the given folder, in the layout of a clone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../../.." && pwd)
packages=$root/client/typescript/node_modules
test -d "$packages" || { echo "the TypeScript client's packages are not installed: \`make polyglot\` does it" >&2; exit 1; }

mkdir -p "$1" && cd "$1"
mkdir -p client/typescript node_modules gen
ln -sfn "$root/protos" protos
ln -sfn "$root/client/deltawire" client/deltawire
ln -sfn "$packages" client/typescript/node_modules
cp -r "$root"/client/typescript/{package.json,tsconfig.json,generate.sh,src} client/typescript
(cd client/typescript && npm run --silent build)

ln -sfn "$packages/@bufbuild" "$packages/@types" node_modules
ln -sfn ../client/typescript node_modules/deltawire
# The program has the API's messages a second time, which are the same to it, because those of the protocol refer to them.
protoc -I protos -I "$here/../.." --plugin="$packages/.bin/protoc-gen-es" --es_out=gen --es_opt=target=ts,import_extension=js \
  protos/deltawire/v1/*.proto "$here/../../conformance.proto"
cp "$here"/{*.ts,package.json,tsconfig.json} .
"$packages/.bin/tsc"
