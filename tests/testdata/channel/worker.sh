#!/bin/sh
# A worker that answers each message until the launcher disconnects. The message
# is one line of JSON: jq(1) would take it apart. dash wants a number below 10.
while read -r message <&"$NODE_CHANNEL_FD"; do
	printf '{"you said":%s}\n' "$message" >&"$NODE_CHANNEL_FD"
done
