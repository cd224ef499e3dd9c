# Worker 2 has a daemon that hides its arguments and its environment: mprotect(2)
# takes their pages away, and /proc shows nothing. Worker 1 ends when it is told to.
import ctypes, os, sys, time

if os.environ["PGROUP_WORKER"] == "2":
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        with open("/proc/self/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        first, last = int(fields[45]), int(fields[48])  # arg_start, env_end
        page = os.sysconf("SC_PAGESIZE")
        start = first // page * page
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(-(-(last - start) // page) * page), 0)
        os.write(1, b"hidden\n")
        while True:
            time.sleep(100)
    os.wait()
    time.sleep(1000)
print("up", flush=True)
sys.exit(1 if sys.stdin.readline() == "end\n" else 0)
