// node server.js PORT, as Node's own documentation has it: the primary forks four
// workers, which listen on one port. With a socket by systemd's convention, or
// under pgroup's --node-cluster, it is a worker. Each says when it is ready.
const cluster = require('node:cluster');
const http = require('node:http');

const given = process.env.LISTEN_FDS !== undefined;
if (cluster.isPrimary && !given) {
	for (let n = 0; n < 4; n++) cluster.fork();
	process.on('SIGTERM', () => cluster.disconnect());
} else {
	const server = http.createServer((_req, res) => res.end(`${process.pid}\n`));
	const ready = () => console.log('ready');
	if (given) server.listen({ fd: 3 }, ready);
	else server.listen(Number(process.argv[2]), '127.0.0.1', ready);
}
