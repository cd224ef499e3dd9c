#!/usr/bin/env python3
"""A worker in Python that answers each message until the launcher disconnects."""
import json
import os
import socket

channel = socket.socket(fileno=int(os.environ.pop("NODE_CHANNEL_FD"))).makefile("rw")
for line in channel:
    message = json.loads(line)
    if isinstance(message, dict) and str(message.get("cmd", "")).startswith("NODE_"):
        continue  # Node's own business
    print(json.dumps({"you said": message}), file=channel, flush=True)
