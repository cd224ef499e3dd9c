# puma DIR/config.ru -b tcp://HOST:PORT: puma takes a socket that it is given
# only if it was to bind that very address.
run ->(_env) { [200, { "content-type" => "text/plain" }, ["#{ENV["PGROUP_WORKER"]} #{Process.pid}\n"]] }
