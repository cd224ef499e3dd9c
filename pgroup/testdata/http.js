// A server that knows nothing of the cluster but what it tells the test.
const http = require('http')
const cluster = require('cluster')

const options = JSON.parse(process.argv[2] || '{"port":0}')
const server = http.createServer((req, res) => {
  if (req.url === '/slow') {
    res.write('first half')
    process.once('message', () => res.end(', second half'))
    return
  }
  res.end(String(process.pid))
})
if (options.maxConnections) server.maxConnections = options.maxConnections
server.on('error', e => process.send({ error: e.code }))
server.listen(options, () => process.send({ listening: server.address(), worker: cluster.isWorker, id: cluster.worker && cluster.worker.id }))
process.on('message', m => {
  if (m.echo) process.send({ echo: m.echo })
  if (m.disconnect) cluster.worker.disconnect()
  if (m.close) server.close(() => process.send({ closed: true }))
})
