#!/bin/sh
# run.sh ADDRESS SCRATCH: nginx, on the socket for ADDRESS that it is given as
# descriptor 3. It takes the socket only if ADDRESS is what it is bound to.
set -eu
prefix=$2/$PGROUP_WORKER
mkdir -p "$prefix"
sed "s/ADDRESS/$1/; s/WORKER/$PGROUP_WORKER/" "$(dirname "$0")/nginx.conf" >"$prefix/nginx.conf"
NGINX='3;' exec nginx -e stderr -p "$prefix/" -c nginx.conf
