// node DIR/server.js
const http = require('http');
const server = http.createServer((_req, res) => {
	res.end(`${process.env.PGROUP_WORKER} ${process.pid}\n`);
});
server.listen({ fd: 3 });
process.on('SIGTERM', () => server.close(() => process.exit(0)));
