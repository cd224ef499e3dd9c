#!/bin/sh
# A worker that makes the file $1, then says that it is ready in the way that it
# was asked to, and ends with 0 on TERM.
sleep 60 &
trap 'kill $!; exit 0' TERM
: >"$1"
if [ "$PGROUP_READY_FD" ]; then
	echo >&"$PGROUP_READY_FD" # dash knows one digit only
elif [ "$NOTIFY_SOCKET" ]; then
	systemd-notify --ready
fi
wait
