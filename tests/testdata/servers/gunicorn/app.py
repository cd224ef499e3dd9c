# gunicorn --chdir DIR app
import os


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.environ.get('PGROUP_WORKER')} {os.getpid()}\n".encode()]
