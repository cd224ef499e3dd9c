"""A worker that makes the file argv[1], then says that it is ready in the way
that it was asked to, and ends with 0 on TERM."""

import os
import signal
import socket
import sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.alarm(60)
open(sys.argv[1], "w").close()
if fd := os.environ.get("PGROUP_READY_FD"):
    with open(int(fd), "w") as pipe:
        pipe.write("\n")
elif name := os.environ.get("NOTIFY_SOCKET"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(b"READY=1", name.replace("@", "\0", 1))
while True:
    signal.pause()
